"""Checkpoints with random weights, written in blocks: only a part of one tensor is in memory at a time."""

import json
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.checkpoints.weights import lazy_parameters

from .sizes import GROUP_SIZE, quantize

Shapes = dict[str, tuple[int, ...]]

# The prefix of the target's tensors in the layout of Hugging Face.
HF_PREFIX = "model.language_model."
BLOCK_BYTES = 32 << 20
# This number of random values is repeated in a larger tensor. New values would take much longer to write.
RANDOM_VALUES = 1 << 22
# The names and sizes of the types of tensors in safetensors files.
TYPES = {"float32": "F32", "bfloat16": "BF16", "uint32": "U32", "int32": "I32"}
SIZES = {"F32": 4, "BF16": 2, "U32": 4, "I32": 4}


class Weights:
    """The tensors of a checkpoint: the parameters of a module, with their names in the file.

    Floating-point tensors have the type `dtype`. If `bits` is given, the module is quantized first.
    """

    def __init__(self, module: nn.Module, prefix: str, dtype: str, bits: int | None = None) -> None:
        if bits is not None:
            quantize(module, bits)
        self.bits = bits
        parameters = {prefix + name: value for name, value in lazy_parameters(module).items()}
        self.shapes: Shapes = {name: value.shape for name, value in parameters.items()}
        self._types = {name: TYPES[_type_of(value, dtype)] for name, value in parameters.items()}

    def nbytes(self, name: str) -> int:
        return prod(self.shapes[name]) * SIZES[self._types[name]]

    def total_bytes(self) -> int:
        return sum(map(self.nbytes, self.shapes))

    def write(self, folder: Path, shard_bytes: int | None = None) -> None:
        """Write one file, or files of about `shard_bytes` bytes and their index."""
        if shard_bytes is None:
            self._write_file(folder / "model.safetensors", list(self.shapes))
            return
        shards = list(self._shards(shard_bytes))
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for file, names in zip(files, shards, strict=True):
            self._write_file(folder / file, names)
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def _shards(self, shard_bytes: int) -> Iterator[list[str]]:
        shard: list[str] = []
        for name in self.shapes:
            shard.append(name)
            if sum(map(self.nbytes, shard)) > shard_bytes:
                yield shard
                shard = []
        if shard:
            yield shard

    def write_header(self, folder: Path) -> None:
        """Write one file that has its header and its full size, but no data."""
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(self._header(list(self.shapes)))
            stream.truncate(stream.tell() + self.total_bytes())

    def _write_file(self, file: Path, names: list[str]) -> None:
        with file.open("wb") as stream:
            stream.write(self._header(names))
            for name in names:
                for block in self._blocks(name):
                    stream.write(block)

    def _header(self, names: list[str]) -> bytes:
        """Return the first bytes of a file with these tensors: the size of the header, and the header."""
        header: dict[str, Any] = {}
        end = 0
        for name in names:
            start, end = end, end + self.nbytes(name)
            header[name] = {"dtype": self._types[name], "shape": self.shapes[name], "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded

    def _blocks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor in blocks.

        Packed weights (U32) are random, with scales and biases that give them unit gain. Unquantized matrices are
        random with unit gain. Index tensors (I32) count from 0. All other values, which are norms and scalars, are 1.
        """
        shape, kind = self.shapes[name], self._types[name]
        count = prod(shape)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if kind == "I32":
            yield np.arange(count, dtype=np.int32).tobytes()
        elif kind == "U32":
            for start in range(0, 4 * count, BLOCK_BYTES):
                yield rng.bytes(min(BLOCK_BYTES, 4 * count - start))
        elif name.endswith((".scales", ".biases")):
            assert self.bits is not None
            value = quantization_value(name, shape[-1], self.bits)
            yield from _repeated(np.full(min(count, RANDOM_VALUES), value, np.float32), count, kind)
        elif len(shape) > 1:
            normal = rng.standard_normal(min(count, RANDOM_VALUES), np.float32)
            yield from _repeated(normal * np.float32(shape[-1] ** -0.5), count, kind)
        else:
            yield from _repeated(np.ones(count, np.float32), count, kind)


def quantization_value(name: str, groups: int, bits: int) -> float:
    """Return the value of all scales or biases of a matrix that has random packed weights and so many groups in a row.

    They map the weights to values between -1 and 1 times a bound. The bound gives unit gain.
    """
    bound: float = (3 / (GROUP_SIZE * groups)) ** 0.5
    return -bound if name.endswith(".biases") else 2 * bound / (2**bits - 1)


def _type_of(value: mx.array, dtype: str) -> str:
    return dtype if mx.issubdtype(value.dtype, mx.floating) else str(value.dtype).removeprefix("mlx.core.")


def _repeated(values: np.ndarray, count: int, kind: str) -> Iterator[bytes]:
    """Yield float32 values as `count` values of a type, in blocks. The values repeat."""
    # The upper half of a float32 is a bfloat16, rounded towards zero.
    block = (values.view(np.uint32) >> 16).astype(np.uint16) if kind == "BF16" else values
    for start in range(0, count, block.size):
        yield block[: count - start].tobytes()
