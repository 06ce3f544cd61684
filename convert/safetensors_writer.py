"""Weights from one checkpoint's files to another's by blocks of rows: cast, split, quantized, never a whole tensor.

A safetensors header names every tensor's place, and the outputs' shapes are known beforehand, so the header is written
first and each block's bytes go straight to their place behind it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoints.config import Quantization
from mlx_mtp.checkpoints.weights import TensorInfo
from mlx_mtp.errors import WeightsError

# Bytes of the source held at a time. Casting and quantizing multiply it a few times.
BLOCK_BYTES = 32 << 20
# As mlx-lm. A tensor larger than this gets a file of its own.
SHARD_BYTES = 5 << 30

_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.int32: "I32",
    mx.uint32: "U32",
    mx.uint8: "U8",
}
# numpy has no bfloat16: its bits are read as integers.
_READ_AS: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Types that token ids may have.
INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
_LARGEST_FLOAT16 = 65504


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the output."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Conversion:
    """How one parameter is made: from `part` of `parts` equal parts of the source along its last axis but one.

    `name` is the output's, `shape` the parameter's before quantization, `dtype` what it is cast to first. `rows`, in
    order, are those to take; None for all.
    """

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    dtype: mx.Dtype
    quantization: Quantization | None = None
    part: int = 0
    parts: int = 1
    rows: tuple[int, ...] | None = None

    def outputs(self) -> list[StoredTensor]:
        """The tensors it writes: one, or a quantized weight with its scales and, in affine mode, biases."""
        # Lazy: MLX itself says the shapes, and computes nothing.
        arrays = self.convert(mx.zeros(self.shape, self.dtype))
        module = self.name.removesuffix(".weight")
        names = [self.name, f"{module}.scales", f"{module}.biases"]
        return [StoredTensor(name, array.dtype, array.shape) for name, array in zip(names, arrays, strict=False)]

    def convert(self, rows: mx.array) -> tuple[mx.array, ...]:
        """The outputs for some rows of the source, [..., columns]."""
        rows = rows.astype(self.dtype)
        q = self.quantization
        return (rows,) if q is None else tuple(mx.quantize(rows, q.group_size, q.bits, mode=q.mode))

    @property
    def source_bytes(self) -> int:
        size = (self.source.end - self.source.start) // self.parts
        return size if self.rows is None else size // self.source.shape[0] * len(self.rows)

    def blocks(self, block_bytes: int) -> Iterator[tuple[int, mx.array]]:
        """The parameter's rows as [rows, columns], in order, at most `block_bytes` or one row at a time, each with the
        index of its first row.

        Raises WeightsError if the file ends early.
        """
        columns = self.shape[-1]
        total = prod(self.shape[:-1])
        run = total if self.parts == 1 else self.shape[-2]
        most = max(1, block_bytes * total // self.source_bytes)
        with self.source.file.open("rb") as stream:
            if self.rows is not None:
                for start in range(0, total, most):
                    yield start, self._gather(stream, self.rows[start : start + most], columns)
                return
            for start in range(0, total, run):
                first = start * self.parts + self.part * run
                for row in range(0, run, most):
                    yield start + row, self._read(stream, first + row, min(most, run - row), columns)

    def _gather(self, stream: BinaryIO, rows: tuple[int, ...], columns: int) -> mx.array:
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = np.split(np.array(rows), breaks)
        return mx.concatenate([self._read(stream, int(run[0]), len(run), columns) for run in runs])

    def _read(self, stream: BinaryIO, first: int, rows: int, columns: int) -> mx.array:
        """Rows of the source. Read, not mapped: pages of a mapped file would count as this process's memory."""
        dtype = np.dtype(_READ_AS[self.source.dtype])
        stream.seek(self.source.start + first * columns * dtype.itemsize)
        values = np.fromfile(stream, dtype, rows * columns)
        if values.size != rows * columns:
            raise WeightsError(f"{self.source.file}: truncated while tensor for {self.name} was read")
        array = mx.array(values)
        if self.source.dtype == "BF16":
            array = array.view(mx.bfloat16)
        if self.dtype == mx.float16 and self.source.dtype != "F16":
            self._check_range(array)
        return array.reshape(rows, columns)

    def _check_range(self, array: mx.array) -> None:
        largest = mx.abs(array).max().item()
        assert isinstance(largest, float)
        if largest > _LARGEST_FLOAT16:
            raise WeightsError(
                f"{self.source.file}: the tensor for {self.name} holds {largest:g}, float16 at most "
                f"{_LARGEST_FLOAT16}; use --dtype bfloat16"
            )


def plan_shards(conversions: list[Conversion], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Conversion]]:
    """Which file holds which parameters, named as mlx-lm names them."""
    shards: list[list[Conversion]] = [[]]
    filled = 0
    for conversion in conversions:
        size = sum(tensor.nbytes for tensor in conversion.outputs())
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(conversion)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shard(path: Path, conversions: list[Conversion], block_bytes: int, advance: Callable[[int], object]) -> None:
    """Write one safetensors file. `advance` is told the bytes of the source done with each block.

    Raises WeightsError if a source file ends early, OSError if the disk fails.
    """
    header, places, size = _layout(conversions)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)
        for conversion in conversions:
            outputs = conversion.outputs()
            for row, block in conversion.blocks(block_bytes):
                arrays = conversion.convert(block)
                mx.eval(arrays)
                for output, array in zip(outputs, arrays, strict=True):
                    row_bytes = output.nbytes // prod(conversion.shape[:-1])
                    stream.seek(places[output.name] + row * row_bytes)
                    stream.write(np.asarray(array.view(mx.uint8)).data)
                advance(block.size * conversion.source_bytes // prod(conversion.shape))
            # On a GPU, freed blocks would otherwise stay with the process.
            mx.clear_cache()


def shard_size(conversions: list[Conversion]) -> int:
    """Bytes of the file `write_shard` writes."""
    return _layout(conversions)[2]


def _layout(conversions: list[Conversion]) -> tuple[bytes, dict[str, int], int]:
    """The header, each tensor's place in the file, and the file's size."""
    outputs = [output for conversion in conversions for output in conversion.outputs()]
    # Wide types first keep every tensor aligned to its type, for readers that map the file.
    outputs.sort(key=lambda output: -output.dtype.size)
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts = {}
    end = 0
    for output in outputs:
        starts[output.name] = end
        entries[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": output.shape,
            "data_offsets": [end, end + output.nbytes],
        }
        end += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: base + start for name, start in starts.items()}, base + end


def index_text(shards: dict[str, list[Conversion]]) -> str:
    """The index file's content, as mlx-lm writes it: which file holds which tensor."""
    conversions = [conversion for shard in shards.values() for conversion in shard]
    weight_map = {
        output.name: file for file, shard in shards.items() for conversion in shard for output in conversion.outputs()
    }
    metadata = {"total_size": stored_bytes(conversions), "total_parameters": parameter_count(conversions)}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=4)


def stored_bytes(conversions: list[Conversion]) -> int:
    return sum(output.nbytes for conversion in conversions for output in conversion.outputs())


def parameter_count(conversions: list[Conversion]) -> int:
    return sum(prod(conversion.shape) for conversion in conversions)
