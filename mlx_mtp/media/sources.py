"""Where media come from: their files, the packages that decode them, their names in errors, and their hash."""

import base64
import hashlib
import os
import re
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

# The beginning of an address, such as "https://".
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# The number of characters of a path that errors show. Other text that was given for a path may be megabytes long.
_SHOWN = 300


def source_name(data: object, place: str, kind: str) -> str:
    """Return the name of a medium in errors: its place in the request and its path, or its kind if it has neither."""
    path = str(data) if isinstance(data, str | Path) and not _is_data_url(data) else ""
    shown = path if len(path) <= _SHOWN else path[:_SHOWN] + "..."
    return ": ".join(part for part in (place, shown) if part) or kind


def open_source(data: object, name: str) -> BinaryIO:
    """Open a file, the bytes of a file, or the file in a `data:` URL. The caller closes it.

    Raises MediaError if the data is none of them, if there are no bytes, or if a path is not a regular file that can be
    read. Other addresses are not fetched.
    """
    if isinstance(data, str) and _is_data_url(data):
        data = data_url_bytes(data, name)
    if isinstance(data, bytes):
        if not data:
            raise MediaError(f"{name}: expected the bytes of a file, found 0 bytes")
        return BytesIO(data)
    if not isinstance(data, str | Path):
        raise MediaError(f"{name}: expected a path or bytes, found {type(data).__name__}")
    if not str(data):
        raise MediaError(f"{name}: expected a path, found an empty text")
    if _ADDRESS.match(str(data)):
        raise MediaError(f"{name}: expected a file or data, found an address: nothing is fetched")
    if "\0" in str(data):
        raise MediaError(f"{name!r}: expected a path, found text with a null character")
    # Reading a pipe or a device could wait for ever.
    is_special = os.path.exists(data) and not os.path.isfile(data)
    reason = "expected a file, found a folder or a device" if is_special else fault(Path(data))
    if reason:
        raise MediaError(f"{name}: {reason}")
    return Path(data).open("rb")


def _is_data_url(data: str | Path) -> bool:
    return isinstance(data, str) and data[:5].lower() == "data:"


def data_url_bytes(url: str, name: str) -> bytes:
    """Return the bytes of a `data:` URL in base64. Raises MediaError if it is not valid."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise MediaError(f"{name}: expected a data: URL with ;base64, found {head[:_SHOWN]!r}")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise MediaError(f"{name}: not base64: {error}") from None


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
