"""Tensors on disk: the safetensors files of a checkpoint folder, their headers, and the types of values in them.

Headers are read without the tensors, so a bad checkpoint fails at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import WeightsError

from .config import read_json
from .files import fault

INDEX_NAME = "model.safetensors.index.json"

# The number of bytes of two tensors that are compared at a time.
_COMPARED = 1 << 24


class Dtype(NamedTuple):
    """A type of values in safetensors files.

    `mlx` is the type in MLX, which also gives the size. NumPy reads the bits as `numpy`: it has no bfloat16.
    """

    mlx: mx.Dtype
    numpy: type[np.generic]


# All types that the package reads or writes, by their names in safetensors headers.
DTYPES = {
    "F32": Dtype(mx.float32, np.float32),
    "F16": Dtype(mx.float16, np.float16),
    "BF16": Dtype(mx.bfloat16, np.uint16),
    "I8": Dtype(mx.int8, np.int8),
    "I16": Dtype(mx.int16, np.int16),
    "I32": Dtype(mx.int32, np.int32),
    "I64": Dtype(mx.int64, np.int64),
    "U8": Dtype(mx.uint8, np.uint8),
    "U16": Dtype(mx.uint16, np.uint16),
    "U32": Dtype(mx.uint32, np.uint32),
    "U64": Dtype(mx.uint64, np.uint64),
}
# The types of unquantized weights.
FLOAT_TYPES = tuple(name for name, dtype in DTYPES.items() if mx.issubdtype(dtype.mlx, mx.floating))
# The types that token ids can have.
INTEGER_TYPES = tuple(name for name, dtype in DTYPES.items() if mx.issubdtype(dtype.mlx, mx.integer))
_STORED_NAMES = {dtype.mlx: name for name, dtype in DTYPES.items()}


def stored_name(dtype: mx.Dtype) -> str:
    """Return the name of a type in safetensors headers, such as BF16."""
    return _STORED_NAMES[dtype]


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the name of a type in configs and in other libraries, such as bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: bytes `start`..`end` of `file`.

    `dtype` is a name of `DTYPES`, or one that the package cannot read.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.start


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a checkpoint folder by its name in the file, from the headers alone.

    If several files hold a tensor, the file that the index names for it is used.

    Raises WeightsError if there is no safetensors file, a shard of the index is missing, a file is truncated, a tensor
    of the index is in no file, or no index chooses between two files with the same tensor.
    """
    index = folder / INDEX_NAME
    weight_map = _read_index(index) if index.is_file() else {}
    files = [folder / name for name in sorted(set(weight_map.values()))] or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: the folder has no model*.safetensors")
    copies: dict[str, list[TensorInfo]] = {}
    for file in files:
        for name, info in read_header(file).items():
            copies.setdefault(name, []).append(info)
    for name, shard in weight_map.items():
        if name not in copies:
            raise WeightsError(f"{index}: names tensor {name} in {shard}, which does not hold it")
    return {name: _choose_copy(folder, name, found, weight_map.get(name)) for name, found in copies.items()}


def _read_index(index: Path) -> dict[str, str]:
    """Return the file name of each tensor in an index. Raises WeightsError if one of the files is missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index}: field weight_map must name a file for each tensor, found {weight_map!r:.200}")
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index}: names {name}, which is not in the folder")
    return weight_map


def _choose_copy(folder: Path, name: str, copies: list[TensorInfo], shard: str | None) -> TensorInfo:
    if len(copies) == 1:
        return copies[0]
    for info in copies:
        if shard is not None and info.file == folder / shard:
            return info
    files = " and ".join(info.file.name for info in copies[:2])
    if shard is None:
        reason = f"no {INDEX_NAME} says which one is meant: remove the older file"
    else:
        reason = f"{INDEX_NAME} names {shard} for it, which does not hold it"
    raise WeightsError(f"{folder}: {files} both hold tensor {name}, and {reason}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file. Raises WeightsError if it is truncated or no safetensors file."""
    if (reason := fault(file)) is not None:
        raise WeightsError(f"{file}: {reason}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise WeightsError(
                f"{file}: truncated or not a safetensors file: expected a header of {header_size} bytes, "
                f"found {size} bytes in all"
            )
        header = stream.read(header_size)
    base = 8 + header_size
    tensors = {}
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), base + start, base + end)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{file}: not a safetensors file: its header cannot be read: {error!r}") from None
    expected = max((tensor.end for tensor in tensors.values()), default=base)
    if expected != size:
        raise WeightsError(f"{file}: truncated: its header describes {expected} bytes, found {size}")
    return tensors


def have_equal_content(first: TensorInfo, second: TensorInfo) -> bool:
    """Return whether two tensors in files have the same type, shape and bytes. Stop reading at the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        for start in range(0, first.nbytes, _COMPARED):
            size = min(_COMPARED, first.nbytes - start)
            if one.read(size) != other.read(size):
                return False
    return True
