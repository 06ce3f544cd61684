"""Folders that appear only when they are complete."""

import fcntl
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_mtp.errors import OutputError

logger = logging.getLogger(__name__)


def check_output(output: Path, option: str, overwrite: bool) -> None:
    """Check a folder that is yet to be written, named by a command line's `option`, once what is left of it by a run
    that was killed is removed.

    Raises OutputError if it exists and may not be replaced, or nothing can be written next to it.
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
    """Raises OutputError for a name that MLX, which takes UTF-8, could not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{str(path)!a}: cannot be written: the name is not UTF-8") from None


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.parents if parent.exists())


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A new empty folder next to the output, which takes its place at the end; removed if anything fails.

    Raises OutputError if writing fails.
    """
    created = [parent for parent in output.parents if not parent.exists()]
    workspace: Path | None = None
    lock: int | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=_workspace_prefix(output), dir=output.parent))
        lock = _lock(workspace)
        # Inside, because the workspace itself is closed to other users.
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
        # Interrupted between the two renames.
        old.rename(output)
    shutil.rmtree(workspace, ignore_errors=True)


def remove_abandoned(output: Path) -> None:
    """Remove what a run that was killed left of a folder it wrote, and name it. Where it was killed while it replaced
    the folder, that is put back."""
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
    """An open descriptor that marks a folder as in use until it is closed, or the process ends; None if another one
    does, or the file system has no locks."""
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
    target = _named(file)
    if not os.path.isdir(target.parent):
        raise OutputError(f"{file}: cannot be written: {target.parent} is not a folder")
    part = _part(target, ".safetensors")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from None


def replace_text(file: Path, text: str) -> None:
    """Write a file that appears only when it is whole. Raises OutputError if it cannot be written."""
    with new_file(file) as part:
        part.write_text(text)


@contextmanager
def new_file(file: Path, ending: str = "") -> Iterator[Path]:
    """A name next to a file, with this ending, for what takes its place at the end; removed if anything fails. Of a
    link, the file that it names is meant.

    Raises OutputError if writing fails, and for a device, a pipe or a folder, which no file may replace.
    """
    target = _named(file)
    part = _part(target, ending)
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _named(file: Path) -> Path:
    """The file that a link names, or the path as it is. Raises OutputError if it is there and no regular file."""
    target = Path(os.path.realpath(file)) if os.path.islink(file) else file
    if os.path.lexists(target) and not os.path.isfile(target):
        raise OutputError(f"{file}: cannot be written: expected a file or a free name, found {_kind(target)}")
    return target


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a link that leads nowhere"
    return "a folder" if path.is_dir() else "a device, pipe or socket"


def _part(file: Path, ending: str) -> Path:
    return file.with_name(f".{file.name}.part{ending}")
