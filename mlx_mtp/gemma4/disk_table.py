"""Mapped per-layer embeddings of E2B and E4B: the table stays in its files, and rows are read when needed.

The table has one row per token of the vocabulary and is a large part of the weights. A pass over n tokens needs only n
rows. Rows are kept as they are in the files. They are dequantized in the same way as the rows of a resident table, so
the bits are the same.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_mtp.checkpoints.tensors import DTYPES, TensorInfo
from mlx_mtp.errors import WeightsError

# This is the number of bytes of rows kept in memory. It holds 13000 rows of E2B at 4 bit. A long text has fewer
# distinct tokens.
KEPT_BYTES = 64 << 20

# These are rows of each tensor of a table, [1, length, columns]: the weights and, for a quantized table, the scales and
# biases.
PerLayerRows = tuple[mx.array, ...]


class EmbeddingStats(NamedTuple):
    """Counts of rows found in memory, rows read from the files, and bytes read.

    Equal tokens of a pass share a row, which counts once.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    def since(self, earlier: "EmbeddingStats") -> "EmbeddingStats":
        """Return the counts since an earlier state."""
        return EmbeddingStats(*(now - before for now, before in zip(self, earlier, strict=True)))

    def plus(self, other: "EmbeddingStats") -> "EmbeddingStats":
        """Return the sum of both counts."""
        return EmbeddingStats(*(one + another for one, another in zip(self, other, strict=True)))


class MappedEmbedding(nn.Module):
    """An embedding whose table stays in its files.

    It replaces `table`, an `nn.Embedding` or an `nn.QuantizedEmbedding`, and has the same quantization. `tensors` give
    the places of the parameters `weight` and, if there are any, `scales` and `biases`. The rows used last are kept in
    memory, up to `kept_bytes`. The files stay open as long as this object exists. A file that is deleted in the
    meantime can still be read.

    Raises WeightsError if a tensor has a type that its parameter cannot have, or if a file cannot be opened.
    """

    def __init__(self, table: nn.Module, tensors: Mapping[str, TensorInfo], kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__()
        self.is_quantized = isinstance(table, nn.QuantizedEmbedding)
        if self.is_quantized:
            self.group_size, self.bits, self.mode = table.group_size, table.bits, table.mode
        names = [name for name in ("weight", "scales", "biases") if name in tensors]
        for name in names:
            found, expected = tensors[name].dtype, table[name].dtype
            # The float types were checked together with all other tensors.
            if mx.issubdtype(expected, mx.integer) and (found not in DTYPES or DTYPES[found].mlx != expected):
                raise WeightsError(
                    f"{tensors[name].file}: the per-layer table's {name} is {found}, expected U{8 * expected.size}"
                )
        types = [DTYPES[tensors[name].dtype].mlx for name in names]
        floats = [dtype for dtype in types if mx.issubdtype(dtype, mx.floating)]
        # This parameter has no values. `set_dtype` of the target casts it, and `read` casts the rows to its type.
        self.like = mx.zeros((0,), floats[0] if floats else mx.float32)
        self.reader = _RowReader([tensors[name] for name in names], kept_bytes)

    @property
    def stats(self) -> EmbeddingStats:
        """Counts since this object was made."""
        return self.reader.stats

    def read(self, tokens: Sequence[int]) -> PerLayerRows:
        """Read the rows of these tokens, and do not dequantize them.

        Raises WeightsError if a file was truncated or changed, or has no row for a token.
        """
        rows = [mx.array(rows).view(dtype)[None] for rows, dtype in self.reader.read(tokens)]
        return tuple(r.astype(self.like.dtype) if mx.issubdtype(r.dtype, mx.floating) else r for r in rows)

    def unpack(self, rows: PerLayerRows) -> mx.array:
        """Return the embeddings, [1, length, width], of the rows that `read` returned."""
        if not self.is_quantized:
            return rows[0]
        weight, scales, *biases = rows
        quantization = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return mx.dequantize(weight, scales, biases[0] if biases else None, **quantization)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the embeddings of tokens, int32 [1, length].

        The call waits for the tokens, so it cannot be part of a compiled function.
        """
        ids: list[int] = tokens[0].tolist()  # type: ignore[assignment]
        return self.unpack(self.read(ids))


class _RowReader:
    """Reader of the rows of a table whose tensors, [rows, columns] each, lie in files.

    The rows used last are kept in memory.
    """

    def __init__(self, tensors: Sequence[TensorInfo], kept_bytes: int) -> None:
        self.stats = EmbeddingStats()
        self._tensors = tensors
        self._rows = tensors[0].shape[0]
        self._files: dict[Path, int] = {}
        # A kept row has the bytes of all its tensors, one after the other. The bounds tell where each tensor begins and
        # ends.
        self._bounds = np.cumsum([0, *((info.end - info.start) // self._rows for info in tensors)]).tolist()
        self._most = min(self._rows, kept_bytes // self._bounds[-1])
        # This array takes memory only as rows are written.
        self._kept = np.empty((self._most, self._bounds[-1]), np.uint8)
        # This maps a token to the place of its row in `_kept`. The row used last is at the end.
        self._places: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._files)
        for info in tensors:
            if info.file not in self._files:
                try:
                    self._files[info.file] = os.open(info.file, os.O_RDONLY)
                except OSError as error:
                    raise WeightsError(f"{info.file}: cannot be opened: {error}") from None
        self._states = {file: _state(number) for file, number in self._files.items()}

    def read(self, tokens: Sequence[int]) -> list[tuple[NDArray[np.generic], mx.Dtype]]:
        """Return the rows of these tokens for each tensor, [tokens, columns], and the type of their bits."""
        if not all(0 <= token < self._rows for token in tokens):
            raise WeightsError(f"{self._tensors[0].file}: the per-layer table has no row for token {max(tokens)}")
        ids, places = np.unique(np.asarray(tokens, np.int64), return_inverse=True)
        with self._lock:
            rows = self._gather(ids.tolist())[places]
        parts = []
        for info, begin, end in zip(self._tensors, self._bounds, self._bounds[1:], strict=False):
            dtype = DTYPES[info.dtype]
            parts.append((np.ascontiguousarray(rows[:, begin:end]).view(dtype.numpy), dtype.mlx))
        return parts

    def _gather(self, ids: list[int]) -> NDArray[np.uint8]:
        rows = np.empty((len(ids), self._bounds[-1]), np.uint8)
        missing = []
        for index, token in enumerate(ids):
            if token in self._places:
                rows[index] = self._kept[self._places[token]]
                self._places.move_to_end(token)
            else:
                missing.append(index)
        if missing:
            self._read_files(rows, ids, missing)
            for index in missing[: self._most]:
                # Free places are taken in order. After that, a row takes the place of the row that was not used for the
                # longest time.
                is_full = len(self._places) == self._most
                place = self._places.popitem(last=False)[1] if is_full else len(self._places)
                self._kept[place] = rows[index]
                self._places[ids[index]] = place
        size = len(missing) * self._bounds[-1]
        self.stats = self.stats.plus(EmbeddingStats(len(ids) - len(missing), len(missing), size))
        return rows

    def _read_files(self, rows: NDArray[np.uint8], ids: list[int], missing: list[int]) -> None:
        """Read rows[index] of the token ids[index] for each missing index.

        The method reads at a file position, and not through a memory map. If a mapped file is truncated, an access to
        its pages ends the process with SIGBUS. Pages that were accessed would also count as memory of the process. The
        system caches the file's pages in both cases.
        """
        for info, begin, end in zip(self._tensors, self._bounds, self._bounds[1:], strict=False):
            number, size = self._files[info.file], end - begin
            for index in missing:
                try:
                    data = os.pread(number, size, info.start + ids[index] * size)
                except OSError as error:
                    raise WeightsError(f"{info.file}: cannot be read any more: {error}") from None
                if len(data) < size:
                    raise WeightsError(f"{info.file}: was truncated while the model was in use; load it again")
                rows[index, begin:end] = np.frombuffer(data, np.uint8)
        for file, number in self._files.items():
            # Check this after the read: data that was read before the file changed is still right.
            if _state(number) != self._states[file]:
                raise WeightsError(f"{file}: was changed while the model was in use; load it again")


def _state(number: int) -> tuple[int, int]:
    """Return the size of an open file and the time of its last change, which change with each write."""
    found = os.fstat(number)
    return found.st_size, found.st_mtime_ns


def _close(files: dict[Path, int]) -> None:
    for number in files.values():
        os.close(number)
