"""Output folders and files that appear only when they are complete."""

import fcntl
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from mlx_mtp.errors import OutputError

logger = logging.getLogger(__name__)


def check_output(output: Path, option: str, overwrite: bool) -> None:
    """Check that an output folder can be written. `option` is the command-line option that names it.

    First, the remains of a run that was killed are removed.

    Raises OutputError if the folder exists and must not be replaced, or if nothing can be written next to it.
    """
    _check_name(output)
    remove_abandoned(output)
    if os.path.lexists(output):
        if not overwrite:
            raise OutputError(f"{output}: exists already; choose another {option}, or replace it with --overwrite")
        if not (output / "config.json").is_file():
            raise OutputError(f"{output}: not replaced: expected a model's folder, found no config.json in it")
    parent = existing_parent(output)
    if not parent.is_dir():
        raise OutputError(f"{output}: cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: cannot be written: no permission to write in {parent}")


def _check_name(path: Path) -> None:
    """Raise OutputError for a name that is not UTF-8, because MLX could not open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{str(path)!a}: cannot be written: the name is not UTF-8") from None


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that exists."""
    return next(parent for parent in path.parents if parent.exists())


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Create an empty folder next to the output. It takes the place of the output at the end.

    The new folder is removed if anything fails. Raises OutputError if writing fails.
    """
    created = [parent for parent in output.parents if not parent.exists()]
    workspace: Path | None = None
    lock: int | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=_workspace_prefix(output), dir=output.parent))
        lock = _lock(workspace)
        # The new folder is inside the workspace, because other users have no access to the workspace itself.
        new = workspace / "new"
        new.mkdir()
        yield new
        if os.path.lexists(output):
            output.rename(workspace / "old")
        new.rename(output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error}") from error
    finally:
        if workspace is not None:
            _clean_up(output, workspace)
        if lock is not None:
            os.close(lock)
        if not os.path.lexists(output):
            with suppress(OSError):
                for parent in created:
                    parent.rmdir()


def _clean_up(output: Path, workspace: Path) -> None:
    old = workspace / "old"
    if os.path.lexists(old) and not os.path.lexists(output):
        # The run was interrupted between the two renames.
        old.rename(output)
    shutil.rmtree(workspace, ignore_errors=True)


def remove_abandoned(output: Path) -> None:
    """Remove the remains of a run that was killed while it wrote a folder, and log their names.

    If the run was killed while it replaced the folder, the old folder is put back.
    """
    for workspace in sorted(output.parent.glob(f"{glob.escape(_workspace_prefix(output))}*")):
        lock = _lock(workspace)
        if lock is None:
            continue
        try:
            logger.warning("%s: left by a run that was killed, removed", workspace)
            _clean_up(output, workspace)
        finally:
            os.close(lock)


def _workspace_prefix(output: Path) -> str:
    return f".{output.name}.partial-"


def _lock(workspace: Path) -> int | None:
    """Mark a folder as in use. Return an open descriptor, or None.

    The mark lasts until the descriptor is closed or the process ends. The result is None if another descriptor marks
    the folder, or if the file system has no locks.
    """
    descriptor: int | None = None
    try:
        descriptor = os.open(workspace, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def check_file(file: Path) -> None:
    """Raise OutputError if no file can be written under this name."""
    _check_name(file)
    target = _behind_link(file)
    if not os.path.isdir(target.parent):
        raise OutputError(f"{file}: cannot be written: {target.parent} is not a folder")
    temporary = _temporary_file(target, ".safetensors")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from None


def replace_text(file: Path, text: str) -> None:
    """Write a text file that appears only when it is complete. Raises OutputError if it cannot be written."""
    with new_file(file) as temporary:
        temporary.write_text(text)


def replace_tensors(file: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file that appears only when it is complete. Raises OutputError if it cannot be written."""
    # MLX appends the ending to a name that lacks it.
    with new_file(file, ".safetensors") as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, metadata)
        except RuntimeError as error:
            # MLX raises RuntimeError if a file cannot be opened or written.
            raise OSError(str(error)) from None


@contextmanager
def new_file(file: Path, ending: str = "") -> Iterator[Path]:
    """Yield a path next to a file. The new file at that path takes the place of the file at the end.

    The path has this ending. The new file is removed if anything fails. If `file` is a link, the file behind it is
    replaced.

    Raises OutputError if writing fails, or if `file` is a device, a pipe or a folder, which no file may replace.
    """
    target = _behind_link(file)
    temporary = _temporary_file(target, ending)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _behind_link(file: Path) -> Path:
    """Return the file that a link names, or the path itself. Raises OutputError if it exists but is no regular file."""
    target = Path(os.path.realpath(file)) if os.path.islink(file) else file
    if os.path.lexists(target) and not os.path.isfile(target):
        raise OutputError(f"{file}: cannot be written: expected a file or a free name, found {_describe(target)}")
    return target


def _describe(path: Path) -> str:
    if path.is_symlink():
        return "a link that leads nowhere"
    return "a folder" if path.is_dir() else "a device, pipe or socket"


def _temporary_file(file: Path, ending: str) -> Path:
    return file.with_name(f".{file.name}.part{ending}")
