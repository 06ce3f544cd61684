"""Files as publishers leave them: with a byte order mark, as a git-lfs pointer, or as a broken link."""

import os
from pathlib import Path

from mlx_mtp.errors import ConfigError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_POINTER = b"version https://git-lfs"


def read_text(file: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark. Raises OSError or UnicodeDecodeError."""
    return file.read_text(encoding="utf-8-sig")


def fault(file: Path) -> str | None:
    """Return the reason why nothing can be read from a file, or None.

    The file is missing, empty, not permitted, or a git-lfs pointer.
    """
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
    """Raise ConfigError if a file whose name matches a pattern is a broken link.

    Without this check, a broken link would count as a missing file without a message, because some files may be
    missing.
    """
    # `glob` with a pattern without a wildcard would leave out broken links.
    for file in sorted(folder.glob("*")):
        if file.is_symlink() and not file.exists() and any(file.match(pattern) for pattern in patterns):
            raise ConfigError(f"{file}: {fault(file)}")
