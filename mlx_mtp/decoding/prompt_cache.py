"""The K/V of prompts read before: reused where another prompt begins alike, and kept in files.

Rows of full-attention layers serve every text that begins with the same tokens. A sliding layer's ring holds the last
positions only, so it is kept as it was at a few of them (`Snapshot`): a prompt is read from the last one that lies
within what it shares with an earlier text.
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

from mlx_mtp.checkpoints.output_files import new_file
from mlx_mtp.checkpoints.weights import read_header
from mlx_mtp.errors import PromptCacheError, WeightsError
from mlx_mtp.gemma4.kv_cache import Buffers, KVQuantization, Quantized, Rows, parts_of

# Changes with what a file holds.
FORMAT = 1
# Most snapshots of one text.
_SNAPSHOTS = 8


class Snapshot(NamedTuple):
    """The rings of the sliding layers when `position` tokens were read."""

    position: int
    rings: Buffers


class Kind(NamedTuple):
    """What K/V must have in common to be exchanged: `max_block` is that of `Cache`, on which the rings depend."""

    max_block: int
    quantization: KVQuantization | None


@dataclass
class Entry:
    """A text that was read: its tokens, the rows of full-attention layers, and snapshots by position, the last one at
    the end or the last before it."""

    kind: Kind
    tokens: list[int]
    full: Buffers
    snapshots: list[Snapshot]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> Iterator[mx.array]:
        for buffers in (self.full, *(snapshot.rings for snapshot in self.snapshots)):
            for keys, values in buffers.values():
                yield from (*parts_of(keys), *parts_of(values))

    @property
    def is_quantized(self) -> bool:
        return any(isinstance(keys, Quantized) for keys, _ in self.full.values())

    def drop_snapshot(self) -> None:
        """The one that is missed least: the stretch between its neighbours is smallest for its distance from the end,
        where texts part most often. Never the last."""
        positions = [0, *(snapshot.position for snapshot in self.snapshots)]
        end = positions[-1]
        stretches = [(positions[i + 2] - start) / (end - start) for i, start in enumerate(positions[:-2])]
        del self.snapshots[stretches.index(min(stretches))]


class Reused(NamedTuple):
    """The first `length` tokens of a prompt, as an earlier text has them."""

    entry: Entry
    snapshot: Snapshot
    length: int


@dataclass
class PromptCache:
    """The texts read last, up to `limit` bytes in all. `reused` and `read` count the tokens of all prompts."""

    limit: int
    entries: list[Entry] = field(default_factory=list)
    reused: int = 0
    read: int = 0

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def take(self, prompt: list[int], kind: Kind) -> Reused | None:
        """The longest reusable beginning of a prompt, at least one token short of all of it.

        A text that goes on, or that would not fit twice, leaves the cache and is written in place; of another, whose
        end the prompt does not share, writing makes a copy.
        """
        found = [reused for entry in self.entries if entry.kind == kind for reused in _reusable(entry, prompt)]
        best = max(found, key=lambda reused: reused.length, default=None)
        self.reused += best.length if best else 0
        self.read += len(prompt) - (best.length if best else 0)
        if best is None:
            return None
        entry = best.entry
        self.entries = [other for other in self.entries if other is not entry]
        if prompt[: len(entry.tokens)] != entry.tokens and 2 * entry.nbytes <= self.limit:
            self.entries.append(entry)
        return best

    def put(self, entry: Entry) -> None:
        """Keep a text as the one used last; older ones go, and snapshots, until all fit."""
        while len(entry.snapshots) > 1 and (len(entry.snapshots) > _SNAPSHOTS or entry.nbytes > self.limit):
            entry.drop_snapshot()
        self.entries.append(entry)
        while self.nbytes > self.limit:
            del self.entries[0]

    def clear(self) -> None:
        self.entries.clear()


def _reusable(entry: Entry, prompt: list[int]) -> Iterator[Reused]:
    pairs = zip(entry.tokens, prompt[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    # Below where quantization begins, rows that are not quantized must be seen.
    least = entry.kind.quantization.start if entry.kind.quantization and entry.is_quantized else 1
    for snapshot in entry.snapshots:
        # The spare slots of a ring let it go back by as much as a rejected draft does.
        length = min(shared, snapshot.position)
        if snapshot.position - shared < entry.kind.max_block and length >= max(1, least):
            yield Reused(entry, snapshot, length)


def save(entry: Entry, file: Path, identity: str) -> None:
    """Write a text's K/V to a safetensors file of exactly this name, which appears only when it is whole. `identity` is
    the model's.

    Raises OutputError if it cannot be written.
    """
    last = entry.snapshots[-1]
    # What lies beyond the last snapshot cannot be gone on from.
    tokens = entry.tokens[: last.position]
    arrays = {"tokens": mx.array(tokens, mx.int32)}
    for kind, buffers in (("full", entry.full), ("rings", last.rings)):
        count = len(tokens) if kind == "full" else None
        for layer, pair in buffers.items():
            for name, rows in zip(("keys", "values"), pair, strict=True):
                for index, part in enumerate(parts_of(rows)):
                    arrays[f"{kind}.{layer}.{name}.{index}"] = mx.contiguous(part[:, :, :count])
    header = {"format": FORMAT, "model": identity, "kind": entry.kind, "checksum": _checksum(arrays)}
    # MLX appends the ending to other names.
    with new_file(file, ".safetensors") as part_file:
        try:
            mx.save_safetensors(str(part_file), arrays, {"mlx_mtp": json.dumps(header)})
        except RuntimeError as error:
            # What MLX raises where a file cannot be opened or written.
            raise OSError(str(error)) from None


def check(file: Path) -> None:
    """Raises PromptCacheError if the file is absent, or not what `save` wrote. The model's and the data's fit show when
    it is loaded."""
    _read_header(file)


def load(file: Path, identity: str) -> Entry:
    """The text that `save` wrote, for the model of this identity.

    Raises PromptCacheError if the file is absent, damaged, of another model or of another version.
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
        kind = Kind(max_block, None if quantization is None else KVQuantization(*quantization))
        tokens: list[int] = arrays.pop("tokens").tolist()  # type: ignore[assignment]
        buffers: dict[str, Buffers] = {"full": {}, "rings": {}}
        for part, layer in sorted({tuple(name.split(".")[:2]) for name in arrays}):
            keys, values = (_rows(arrays, f"{part}.{layer}.{name}", kind) for name in ("keys", "values"))
            buffers[part][int(layer)] = keys, values
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PromptCacheError):
            raise
        raise PromptCacheError(f"{file}: a damaged prompt cache: {error!r}") from None
    return Entry(kind, tokens, buffers["full"], [Snapshot(len(tokens), buffers["rings"])])


def _rows(arrays: dict[str, mx.array], name: str, kind: Kind) -> Rows:
    if f"{name}.1" not in arrays or kind.quantization is None:
        return arrays[f"{name}.0"]
    packed, scales, biases = (arrays[f"{name}.{index}"] for index in range(3))
    return Quantized(packed, scales, biases, kind.quantization.bits, kind.quantization.group_size)


def _read_header(file: Path) -> dict[str, Any]:
    """What `save` wrote beside the arrays, once the file is known to be whole."""
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
    """Of all names, shapes and bytes, in order of the names."""
    total = 0
    for name in sorted(arrays):
        array = arrays[name]
        total = zlib.crc32(f"{name} {array.shape} {array.dtype}".encode(), total)
        total = zlib.crc32(np.array(array.view(mx.uint8)).data, total)
    return total
