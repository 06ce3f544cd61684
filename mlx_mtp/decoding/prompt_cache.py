"""Prompt cache: K/V of earlier prompts, reused for prompts with the same beginning, and kept in files.

Rows of full-attention layers serve every text that begins with the same tokens. The ring of a sliding layer holds only
the last positions. The cache therefore keeps copies of the rings at a few positions (`Snapshot`). A prompt is read from
the last snapshot that serves the part that it shares with an earlier text.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoints.output_files import replace_tensors
from mlx_mtp.checkpoints.tensors import read_header
from mlx_mtp.errors import PromptCacheError, WeightsError
from mlx_mtp.gemma4.kv_cache import Buffers, KVQuantization, KVRows, Quantized, parts_of, spare_slots

from .copy_index import CopyIndex

# This number changes when the format of the files changes.
FORMAT = 3
# This is the largest number of snapshots of one text.
_SNAPSHOTS = 8


class Snapshot(NamedTuple):
    """The rings of the sliding layers after `position` tokens.

    `written` is the number of positions that were written to them. It is larger than `position` if the last rounds
    wrote rows of rejected draft tokens.
    """

    position: int
    written: int
    rings: Buffers


class KVFormat(NamedTuple):
    """The properties that two streams must have in common to exchange K/V.

    `max_block` is the value of `Cache`. The rings depend on it.
    """

    max_block: int
    quantization: KVQuantization | None


@dataclass
class CacheEntry:
    """A text in the prompt cache: its tokens, its full-attention rows, and snapshots by position.

    The last snapshot is at the end of the tokens. `copy_index` is the index of the text, if copies were drafted from
    it. Files do not keep it.
    """

    kv_format: KVFormat
    tokens: list[int]
    full: Buffers
    snapshots: list[Snapshot]
    copy_index: CopyIndex | None = None

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> Iterator[mx.array]:
        """Yield all arrays of the entry."""
        for buffers in (self.full, *(snapshot.rings for snapshot in self.snapshots)):
            for keys, values in buffers.values():
                yield from (*parts_of(keys), *parts_of(values))

    @property
    def is_quantized(self) -> bool:
        """True if the full-attention rows are quantized."""
        return any(isinstance(keys, Quantized) for keys, _ in self.full.values())

    def drop_snapshot(self) -> None:
        """Drop the least useful snapshot, but never the last snapshot.

        The gap between the two neighbours of this snapshot is smallest, relative to the distance from the end of the
        text. Texts differ most often near the end.
        """
        positions = [0, *(snapshot.position for snapshot in self.snapshots)]
        end = positions[-1]
        stretches = [(positions[i + 2] - start) / (end - start) for i, start in enumerate(positions[:-2])]
        del self.snapshots[stretches.index(min(stretches))]


class ReusedPrefix(NamedTuple):
    """The first `length` tokens of a prompt, found in an earlier text."""

    entry: CacheEntry
    snapshot: Snapshot
    length: int


@dataclass
class PromptCache:
    """The texts that were used last, up to `limit` bytes in total.

    Over all prompts, `reused` counts the tokens found in the cache, and `read` counts the tokens to be read.
    """

    limit: int
    entries: list[CacheEntry] = field(default_factory=list)
    reused: int = 0
    read: int = 0

    @property
    def nbytes(self) -> int:
        """Size of all entries in bytes."""
        return sum(entry.nbytes for entry in self.entries)

    def take(self, prompt: list[int], kv_format: KVFormat, *, keeps: bool = False) -> ReusedPrefix | None:
        """Return the longest reusable beginning of a prompt, or None if there is none.

        The beginning never includes the last token of the prompt. The entry leaves the cache and is written in place if
        the prompt continues its whole text, or if two copies would not fit. Otherwise, and with `keeps`, the entry
        stays in the cache, and a write makes a copy.
        """
        found = [
            reused
            for entry in self.entries
            if entry.kv_format == kv_format
            for reused in _reusable_prefixes(entry, prompt)
        ]
        best = max(found, key=lambda reused: reused.length, default=None)
        self.reused += best.length if best else 0
        self.read += len(prompt) - (best.length if best else 0)
        if best is None:
            return None
        entry = best.entry
        self.entries = [other for other in self.entries if other is not entry]
        is_continued = prompt[: len(entry.tokens)] == entry.tokens
        if keeps or (not is_continued and 2 * entry.nbytes <= self.limit):
            self.entries.append(entry)
        return best

    def put(self, entry: CacheEntry) -> None:
        """Add a text as the entry used last.

        Snapshots and older entries are dropped until all entries fit.
        """
        while len(entry.snapshots) > 1 and (len(entry.snapshots) > _SNAPSHOTS or entry.nbytes > self.limit):
            entry.drop_snapshot()
        self.entries.append(entry)
        self.shrink(self.limit)

    def shrink(self, nbytes: int) -> None:
        """Drop the oldest texts until the others take at most `nbytes` bytes."""
        while self.entries and self.nbytes > nbytes:
            del self.entries[0]

    def clear(self) -> None:
        """Remove all entries."""
        self.entries.clear()


def _reusable_prefixes(entry: CacheEntry, prompt: list[int]) -> Iterator[ReusedPrefix]:
    pairs = zip(entry.tokens, prompt[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    # Positions before the start of quantization must see rows that are not quantized.
    least = entry.kv_format.quantization.start if entry.kv_format.quantization and entry.is_quantized else 1
    for snapshot in entry.snapshots:
        length = min(shared, snapshot.position)
        # The rows that were written beyond `length` are in spare slots, so they replaced no row of the window.
        if snapshot.written - length < spare_slots(entry.kv_format.max_block) and length >= max(1, least):
            yield ReusedPrefix(entry, snapshot, length)


def save(entry: CacheEntry, file: Path, identity: str) -> None:
    """Write a text's K/V to a safetensors file with exactly this name.

    The file appears only when it is complete. `identity` identifies the model.

    Raises OutputError if the file cannot be written.
    """
    last = entry.snapshots[-1]
    # A stream cannot resume beyond the last snapshot.
    tokens = entry.tokens[: last.position]
    arrays = {"tokens": mx.array(tokens, mx.int32)}
    for group, buffers in (("full", entry.full), ("rings", last.rings)):
        count = len(tokens) if group == "full" else None
        for layer, pair in buffers.items():
            for name, rows in zip(("keys", "values"), pair, strict=True):
                for index, part in enumerate(parts_of(rows)):
                    arrays[f"{group}.{layer}.{name}.{index}"] = mx.contiguous(part[:, :, :count])
    header = {
        "format": FORMAT,
        "model": identity,
        "kind": entry.kv_format,
        "written": last.written,
        "checksum": _checksum(arrays),
    }
    replace_tensors(file, arrays, {"mlx_mtp": json.dumps(header)})


def check(file: Path) -> None:
    """Check that a file is a prompt cache, from its header alone.

    Only `load` checks the data, and whether the file belongs to the model.

    Raises PromptCacheError if the file is absent, or if `save` did not write it.
    """
    _read_header(file)


def load(file: Path, identity: str) -> CacheEntry:
    """Read the text that `save` wrote for the model with this identity.

    Raises PromptCacheError if the file is absent or damaged, or if it belongs to another model or another version.
    """
    header = _read_header(file)
    for name, expected, what in (("format", FORMAT, "version"), ("model", identity, "model")):
        if header.get(name) != expected:
            raise PromptCacheError(
                f"{file}: a prompt cache of another {what}: its field {name} is {header.get(name)!r}, "
                f"expected {expected!r}"
            )
    try:
        arrays: dict[str, mx.array] = mx.load(str(file), format="safetensors")  # type: ignore[assignment]
        if header.get("checksum") != _checksum(arrays):
            raise PromptCacheError(f"{file}: a damaged prompt cache: its checksum is not that of its data")
        max_block, quantization = header["kind"]
        kv_format = KVFormat(max_block, None if quantization is None else KVQuantization(*quantization))
        tokens: list[int] = arrays.pop("tokens").tolist()  # type: ignore[assignment]
        buffers: dict[str, Buffers] = {"full": {}, "rings": {}}
        for group, layer in sorted({tuple(name.split(".")[:2]) for name in arrays}):
            keys, values = (_kv_rows(arrays, f"{group}.{layer}.{name}", kv_format) for name in ("keys", "values"))
            buffers[group][int(layer)] = keys, values
        snapshot = Snapshot(len(tokens), int(header["written"]), buffers["rings"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PromptCacheError):
            raise
        raise PromptCacheError(f"{file}: a damaged prompt cache: {error!r}") from None
    return CacheEntry(kv_format, tokens, buffers["full"], [snapshot])


def _kv_rows(arrays: dict[str, mx.array], name: str, kv_format: KVFormat) -> KVRows:
    if f"{name}.1" not in arrays or kv_format.quantization is None:
        return arrays[f"{name}.0"]
    packed, scales, biases = (arrays[f"{name}.{index}"] for index in range(3))
    return Quantized(packed, scales, biases, kv_format.quantization.bits, kv_format.quantization.group_size)


def _read_header(file: Path) -> dict[str, Any]:
    """Read the fields that `save` wrote beside the arrays, after a check that the file is complete."""
    try:
        with file.open("rb") as stream:
            read_header(file)
            content = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header: dict[str, Any] = json.loads(content["__metadata__"]["mlx_mtp"])
        if not isinstance(header, dict):
            raise TypeError(f"expected fields, found {header!r}")
    except OSError as error:
        raise PromptCacheError(f"{file}: no prompt cache: {error}") from None
    except WeightsError as error:
        raise PromptCacheError(str(error)) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PromptCacheError(f"{file}: not a prompt cache: its header cannot be read: {error!r}") from None
    return header


def _checksum(arrays: dict[str, mx.array]) -> int:
    """Return a CRC-32 of all names, shapes, types and bytes, in order of the names."""
    total = 0
    for name in sorted(arrays):
        array = arrays[name]
        total = zlib.crc32(f"{name} {array.shape} {array.dtype}".encode(), total)
        total = zlib.crc32(np.array(array.view(mx.uint8)).data, total)
    return total
