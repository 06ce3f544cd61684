"""Writer of safetensors files that casts, splits and quantizes weights in blocks of rows, never a whole tensor.

A safetensors header gives the place of each tensor, and the shapes of the outputs are known in advance. The writer
writes the header first, and then each block directly to its place.
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
from mlx_mtp.checkpoints.tensors import DTYPES, TensorInfo, stored_name
from mlx_mtp.errors import WeightsError

# Bytes of the source in memory at a time. A cast and quantization need a few times this size.
BLOCK_BYTES = 32 << 20
# The size is mlx-lm's. A tensor larger than this size gets its own file.
SHARD_BYTES = 5 << 30

_LARGEST_FLOAT16 = 65504


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the output file."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Conversion:
    """Conversion of one source tensor, or of one part of it, to one parameter.

    The source has `parts` equal parts along its second-to-last axis, and the parameter comes from part number `part`.
    `name` is the parameter's name in the output. `shape` is its shape before quantization. The source is cast to
    `dtype` before quantization. `rows` lists the rows to take, in order; None takes all rows.
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
        """Return the output tensors: one, or a quantized weight with its scales and, in affine mode, biases."""
        # These arrays are lazy: MLX gives their shapes and computes nothing.
        arrays = self.convert(mx.zeros(self.shape, self.dtype))
        module = self.name.removesuffix(".weight")
        names = [self.name, f"{module}.scales", f"{module}.biases"]
        return [StoredTensor(name, array.dtype, array.shape) for name, array in zip(names, arrays, strict=False)]

    def convert(self, rows: mx.array) -> tuple[mx.array, ...]:
        """Cast and quantize rows of the source, [..., columns]. Return one array for each output tensor."""
        rows = rows.astype(self.dtype)
        q = self.quantization
        return (rows,) if q is None else tuple(mx.quantize(rows, q.group_size, q.bits, mode=q.mode))

    @property
    def source_bytes(self) -> int:
        """Number of source bytes that this conversion reads."""
        size = (self.source.end - self.source.start) // self.parts
        return size if self.rows is None else size // self.source.shape[0] * len(self.rows)

    def blocks(self, block_bytes: int) -> Iterator[tuple[int, mx.array]]:
        """Read the parameter's rows in blocks, and yield the index of each block's first row with the block.

        A block is [rows, columns] and has at most `block_bytes` bytes, but at least one row. The blocks are in order.

        Raises WeightsError if the file ends early.
        """
        columns = self.shape[-1] if self.shape else 1
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

    def _read(self, stream: BinaryIO, first: int, count: int, columns: int) -> mx.array:
        """Read `count` rows of the source, [count, columns].

        The file is not mapped, because the pages of a mapped file count as memory of this process.
        """
        dtype = DTYPES[self.source.dtype]
        stream.seek(self.source.start + first * columns * dtype.mlx.size)
        values = np.fromfile(stream, dtype.numpy, count * columns)
        if values.size != count * columns:
            raise WeightsError(f"{self.source.file}: truncated while tensor for {self.name} was read")
        array = mx.array(values).view(dtype.mlx)
        if self.dtype == mx.float16 and self.source.dtype != "F16":
            self._check_range(array)
        return array.reshape(count, columns)

    def _check_range(self, array: mx.array) -> None:
        largest = mx.abs(array).max().item()
        assert isinstance(largest, float)
        if largest > _LARGEST_FLOAT16:
            raise WeightsError(
                f"{self.source.file}: the tensor for {self.name} holds {largest:g}, float16 at most "
                f"{_LARGEST_FLOAT16}; use --dtype bfloat16"
            )


def plan_shards(conversions: list[Conversion], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Conversion]]:
    """Distribute the parameters over files of at most `shard_bytes` bytes, with mlx-lm's file names as keys.

    A larger parameter gets its own file.
    """
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
    """Write one safetensors file. After each block, call `advance` with the block's number of source bytes.

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
            # Without this call, the process keeps the memory of freed blocks on a GPU.
            mx.clear_cache()


def shard_size(conversions: list[Conversion]) -> int:
    """Return the size in bytes of the file that `write_shard` writes."""
    return _layout(conversions)[2]


def _layout(conversions: list[Conversion]) -> tuple[bytes, dict[str, int], int]:
    """Return the header, the byte position of each tensor in the file, and the file size in bytes."""
    outputs = [output for conversion in conversions for output in conversion.outputs()]
    # Wide types come first. This order keeps each tensor aligned to its type, for readers that map the file.
    outputs.sort(key=lambda output: -output.dtype.size)
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts = {}
    end = 0
    for output in outputs:
        starts[output.name] = end
        entries[output.name] = {
            "dtype": stored_name(output.dtype),
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
    """Return the text of the index file, which names the file of each tensor, in mlx-lm's format."""
    conversions = [conversion for shard in shards.values() for conversion in shard]
    weight_map = {
        output.name: file for file, shard in shards.items() for conversion in shard for output in conversion.outputs()
    }
    metadata = {"total_size": stored_bytes(conversions), "total_parameters": parameter_count(conversions)}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=4)


def stored_bytes(conversions: list[Conversion]) -> int:
    """Return the size of all output tensors in bytes, without file headers."""
    return sum(output.nbytes for conversion in conversions for output in conversion.outputs())


def parameter_count(conversions: list[Conversion]) -> int:
    """Return the number of values of all parameters, before quantization."""
    return sum(prod(conversion.shape) for conversion in conversions)
