"""Files as publishers leave them: with a byte order mark, as a git-lfs pointer, as a link to nowhere."""

import os
from pathlib import Path

from mlx_mtp.errors import ConfigError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_POINTER = b"version https://git-lfs"


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises OSError, or UnicodeDecodeError."""
    return file.read_text(encoding="utf-8-sig")


def fault(file: Path) -> str | None:
    """Why nothing can be read in a file: it is absent, empty, not permitted, or holds a git-lfs pointer. Else None."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except FileNotFoundError:
        return f"a link to {os.readlink(file)}, which is not there" if file.is_symlink() else "no such file"
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    if start == _POINTER:
        return "a git-lfs pointer in place of the file: run `git lfs pull` in its folder"
    return None if start else "truncated: an empty file"


def check_links(folder: Path, patterns: tuple[str, ...]) -> None:
    """Raise ConfigError if a file whose name matches a pattern is a link to nowhere: it would count as absent
    without a word, and some files may be absent."""
    # A pattern without a wildcard would leave out links to nowhere.
    for file in sorted(folder.glob("*")):
        if file.is_symlink() and not file.exists() and any(file.match(pattern) for pattern in patterns):
            raise ConfigError(f"{file}: {fault(file)}")
