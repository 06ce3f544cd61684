"""Where media come from: their files, the packages that decode them, their names in errors, and their hash."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlx_mtp.checkpoints.files import fault
from mlx_mtp.errors import MediaError

# A medium in a file, or the bytes of such a file.
FileData = str | Path | bytes

# The number of characters of a path that errors show. Other text that was given for a path may be megabytes long.
_SHOWN = 300


def source_name(data: object, place: str, kind: str) -> str:
    """Return the name of a medium in errors: its place in the request and its path, or its kind if it has neither."""
    path = str(data) if isinstance(data, str | Path) else ""
    shown = path if len(path) <= _SHOWN else path[:_SHOWN] + "..."
    return ": ".join(part for part in (place, shown) if part) or kind


def open_source(data: object, name: str) -> BinaryIO:
    """Open a file, or the bytes of a file. The caller closes it.

    Raises MediaError if the data is neither a path nor bytes, if there are no bytes, or if the path is not a regular
    file that can be read.
    """
    if isinstance(data, bytes):
        if not data:
            raise MediaError(f"{name}: expected the bytes of a file, found 0 bytes")
        return BytesIO(data)
    if not isinstance(data, str | Path):
        raise MediaError(f"{name}: expected a path or bytes, found {type(data).__name__}")
    if "\0" in str(data):
        raise MediaError(f"{name!r}: expected a path, found text with a null character")
    # Reading a pipe or a device could wait for ever.
    is_special = os.path.exists(data) and not os.path.isfile(data)
    reason = "expected a file, found a folder or a device" if is_special else fault(Path(data))
    if reason:
        raise MediaError(f"{name}: {reason}")
    return Path(data).open("rb")


def require(package: str, distribution: str, extra: str, name: str) -> Any:
    """Import a package that an extra of this package installs. Raises MediaError, which names the extra, without it."""
    try:
        return import_module(package)
    except ImportError:
        raise MediaError(f"{name}: needs {distribution}: pip install 'mlx-mtp[{extra}]'") from None


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Raise MediaError for whatever a decoder raises. Damaged data makes decoders raise errors of almost any kind."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = "expected data that can be decoded, found damaged or truncated data"
        raise MediaError(f"{name}: {expected}: {reason}") from error


def content_hash(kind: str, values: NDArray[np.generic], budget: int = 0) -> str:
    """Return the SHA-256, in hexadecimal, of a medium as the networks read it.

    Two media have the same hash only if their kind, budget, shape, type and values are the same.
    """
    digest = hashlib.sha256(f"{kind} {budget} {values.shape} {values.dtype.str}\n".encode())
    digest.update(values.tobytes())
    return digest.hexdigest()
