"""K/V cache of one stream: buffers that are written at an offset on the device.

A rollback changes one number, the offset. Full-attention layers hold position p in row p. Sliding layers hold it in
slot p % ring of a ring of `sliding_window + max_block` slots. The `max_block` spare slots prevent rejected rows from
overwriting a key that is still inside the window. The offset alone determines which position a slot holds. Masks are
made from positions, so the order of rows in the ring does not matter (keys are stored rotated). Rows at or beyond the
offset are never visible. The next pass overwrites them.

Full-attention buffers may be quantized. Passes from position `KVQuantization.start` on write and see quantized rows
only. Passes before this position write and see no quantized rows. No pass lies on both sides of it. The K/V that a row
sees therefore depend on its position alone, and not on the number of rows in a pass. Rings have a fixed size and are
never quantized.
"""

from collections.abc import Callable, Sequence
from copy import copy
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.checkpoints.config import LayerType, TextConfig
from mlx_mtp.errors import OptionError

# Full-attention buffers grow by at least this number of rows at a time.
CAPACITY_STEP = 256


class KVQuantization(NamedTuple):
    """Quantization of the K/V of full-attention layers, and the position at which it begins.

    The quantization is affine, along head_dim.
    """

    bits: int
    group_size: int
    start: int


class Quantized(NamedTuple):
    """Quantized K/V rows.

    `packed` is uint32 [1, kv_heads, rows, head_dim * bits / 32].
    `scales` and `biases` are [1, kv_heads, rows, head_dim / group_size].
    """

    packed: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def parts(self) -> tuple[mx.array, mx.array, mx.array]:
        """The packed values, the scales and the biases."""
        return self.packed, self.scales, self.biases

    def each(self, change: Callable[[mx.array], mx.array]) -> "Quantized":
        """Return a copy with `change` applied to each part."""
        packed, scales, biases = map(change, self.parts)
        return Quantized(packed, scales, biases, self.bits, self.group_size)


# K/V rows are [1, kv_heads, rows, head_dim] if they are not quantized.
KVRows = mx.array | Quantized


class View(NamedTuple):
    """The K/V rows that a layer attends to, and a mask of the rows that each query sees.

    `mask` is boolean [queries, rows].
    """

    keys: KVRows
    values: KVRows
    mask: mx.array

    def of_heads(self, heads: slice) -> "View":
        """Return the view of some of the K/V heads."""
        return self._replace(keys=_of_heads(self.keys, heads), values=_of_heads(self.values, heads))


# The view of a pass, or the views of the streams of a packed pass.
Views = View | list[View]

# These are keys and values by layer.
Buffers = dict[int, tuple[KVRows, KVRows]]


class KVState(NamedTuple):
    """The arrays of a cache.

    `offset`, int32 [], is the number of valid positions. `keys` and `values` are the buffers by layer.
    """

    offset: mx.array
    keys: dict[int, KVRows]
    values: dict[int, KVRows]

    @staticmethod
    def none() -> "KVState":
        """Return a state without buffers."""
        return KVState(mx.array(0, mx.int32), {}, {})


class Cache:
    """The K/V buffers of one stream: their layout, known on the host, and their arrays, `kv`.

    `offset` (device) and `length` (host) are the number of valid positions. `length` is the last value that the host
    knew. `in_flight` is the number of rows that rounds in flight write after it. `written` is the number of positions
    that any pass may have written, rejected rows included. `max_block` is the largest number of rows that one verify
    pass may write. `visible` is the number of full-attention rows that a pass and the drafter see. It is at least the
    number of valid rows, and grows in steps. Successive passes therefore have the same shape, and their cost does not
    depend on the capacity. `is_quantized` tells whether the full-attention buffers are quantized. Once they are
    quantized, they stay quantized.

    Raises OptionError if the groups of `quantization` do not divide the full-attention heads.
    """

    def __init__(
        self,
        config: TextConfig,
        dtype: mx.Dtype,
        *,
        max_block: int,
        capacity: int = CAPACITY_STEP,
        quantization: KVQuantization | None = None,
    ) -> None:
        self.config = config
        if quantization is not None:
            check_group_size(config, quantization)
        self.quantization = quantization
        self.is_quantized = quantization is not None and quantization.start <= 0
        self.max_block = max_block
        ring = config.sliding_window + spare_slots(max_block)
        # The slots of a ring, int32 [ring].
        self.slots = _numbers(ring)
        self.capacity = rows_in_buffers(capacity)
        # 0, 1, 2, ... for the rows of the full-attention buffers.
        self.row_numbers = _numbers(self.capacity)
        self.kv = KVState.none()
        self.length = 0
        self.in_flight = 0
        self.written = 0
        self.visible = self.capacity
        for index, layer in enumerate(config.layers):
            if layer.has_kv:
                is_full = layer.layer_type == "full_attention"
                quantized = quantization if is_full and self.is_quantized else None
                shape = (1, layer.num_kv_heads, self.capacity if is_full else ring, layer.head_dim)
                self.keys[index] = _zeros(shape, dtype, quantized)
                self.values[index] = _zeros(shape, dtype, quantized)

    @property
    def offset(self) -> mx.array:
        """The number of valid positions, int32 []."""
        return self.kv.offset

    @offset.setter
    def offset(self, offset: mx.array) -> None:
        self.kv = self.kv._replace(offset=offset)

    @property
    def keys(self) -> dict[int, KVRows]:
        """The buffers of keys by layer."""
        return self.kv.keys

    @property
    def values(self) -> dict[int, KVRows]:
        """The buffers of values by layer."""
        return self.kv.values

    @property
    def quantized_as(self) -> KVQuantization | None:
        """The quantization of the full-attention buffers, or None while they are not quantized."""
        if self.quantization is None or not self.is_quantized:
            return None
        # The position where quantization began does not matter any more.
        return self.quantization._replace(start=0)

    def over(self, kv: KVState) -> "Cache":
        """Return a cache of the same layout over other arrays. A pass over it does not change `kv`."""
        other = copy(self)
        other.kv = KVState(kv.offset, dict(kv.keys), dict(kv.values))
        return other

    def without_rows(self) -> "Cache":
        """Return a cache of the same layout without buffers."""
        return self.over(KVState.none())

    def start(self, length: int, last_seen: mx.array | None = None) -> "Pass":
        """Start a forward pass that writes `length` rows at the offset. The caller advances the offset.

        `last_seen` are the last positions that the rows see in sliding layers, int32 [length] (default: their own).
        """
        self.reserve(length)
        return Pass(self, length, last_seen)

    def reserve(self, length: int) -> None:
        """Make room for `length` more rows after all rows in flight, and make them visible.

        If the start position of quantization is reached, the buffers are quantized here.
        """
        if self.quantization is not None and not self.is_quantized and self.length >= self.quantization.start:
            self._quantize(self.quantization)
        length += self.in_flight
        self.written = max(self.written, self.length + length)
        self.visible = self.rows_for(length)
        self._grow(self.visible)

    def rows_for(self, length: int) -> int:
        """Return the number of visible rows with room for `length` more rows."""
        return rows_in_buffers(self.length + length)

    def longest_pass(self, length: int) -> int:
        """Return how many of `length` rows the next pass can write.

        No pass goes beyond the position where quantization begins. Otherwise its rows would see other K/V
        than the rows of shorter passes do.
        """
        start = 0 if self.quantization is None else self.quantization.start
        return min(length, start - self.length) if self.length < start else length

    def is_uniform(self, least: int, most: int) -> bool:
        """Return whether passes that end `least` to `most` rows after the last known length see the same rows."""
        if self.quantization is not None and not self.is_quantized and self.length + most > self.quantization.start:
            return False
        return self.rows_for(least) == self.rows_for(most)

    def set_length(self, length: int) -> None:
        """Set the number of valid positions, known on the host. Rows beyond it are forgotten."""
        self.length = length
        self.offset = mx.array(length, mx.int32)

    def buffers(self, layer_type: LayerType) -> Buffers:
        """Return the keys and values of all layers of a type that own K/V.

        If the caller still holds them, the next write copies them.
        """
        return {
            index: (keys, self.values[index])
            for index, keys in self.keys.items()
            if self.config.layers[index].layer_type == layer_type
        }

    def restore(self, full: Buffers, rings: Buffers, length: int, written: int) -> None:
        """Continue after the first `length` positions of the given buffers.

        `written` is the value of the cache that the rings are from. They serve `length` if `written` - `length` is
        less than the spare slots (see `spare_slots`).
        """
        for index, (keys, values) in (full | rings).items():
            self.keys[index], self.values[index] = keys, values
        keys, _ = next(iter(full.values()))
        self.is_quantized = isinstance(keys, Quantized)
        self.capacity = parts_of(keys)[0].shape[2]
        self.row_numbers = _numbers(self.capacity)
        self.written = written
        self.set_length(length)

    def draft_view(self, layer_type: LayerType) -> View:
        """Return the K/V that the drafter sees: the valid rows of the last K/V layer of this type.

        Rows of rejected tokens are never visible. A sliding layer shows the last `sliding_window + 1` rows, as
        transformers' drafter mask does.
        """
        layer = self.config.last_kv_layer(layer_type)
        if layer_type == "full_attention":
            rows = self.visible
            mask = self.row_numbers[:rows] < self.offset
            return View(_first(self.keys[layer], rows), _first(self.values[layer], rows), mask[None])
        positions = ring_positions(self.offset, self.slots)
        mask = (positions >= 0) & (positions >= self.offset - 1 - self.config.sliding_window)
        return View(self.keys[layer], self.values[layer], mask[None])

    def arrays(self) -> list[mx.array]:
        """Return all arrays, which are to be evaluated together."""
        rows = [rows for buffers in (self.keys, self.values) for rows in buffers.values()]
        return [self.offset, *(part for each in rows for part in parts_of(each))]

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self.arrays())

    def _grow(self, grown: int) -> None:
        if grown <= self.capacity:
            return
        self._replace_full(lambda rows: _extend(rows, grown - self.capacity))
        self.capacity = grown
        self.row_numbers = _numbers(grown)

    def _quantize(self, quantization: KVQuantization) -> None:
        self._replace_full(lambda rows: _quantize(rows, quantization) if isinstance(rows, mx.array) else rows)
        self.is_quantized = True

    def _replace_full(self, change: Callable[[KVRows], KVRows]) -> None:
        """Replace full-attention buffers one at a time, so that two copies of all never exist together."""
        for index, layer in enumerate(self.config.layers):
            if layer.has_kv and layer.layer_type == "full_attention":
                for buffers in (self.keys, self.values):
                    buffers[index] = change(buffers[index])
                    mx.eval(parts_of(buffers[index]))


class Pass:
    """One forward pass of `length` rows over a cache.

    It writes the K/V of each layer and returns the view that the layer attends to. `Cache.start` has `last_seen`.
    """

    def __init__(self, cache: Cache, length: int, last_seen: mx.array | None = None) -> None:
        self.cache = cache
        self.length = length
        self.offset = cache.offset
        self._views: dict[int, View] = {}
        # The position of each row, int32 [length].
        self.positions = self.offset + cache.row_numbers[:length]
        queries = self.positions[:, None]
        self._full_mask = cache.row_numbers[None, : cache.visible] <= queries
        # A block that fits the spare slots is read back from the ring. A longer block (prefill) would overwrite keys
        # that its own first rows still need. It therefore attends to the old ring plus its own rows.
        self._fits = length <= cache.max_block
        # A sum with `length` would be another kernel for each length.
        end = queries[-1, 0] + 1 if self._fits else self.offset
        positions = ring_positions(end, cache.slots)[None]
        if not self._fits:
            positions = mx.concatenate([positions, queries.T], axis=1)
        last = queries if last_seen is None else last_seen[:, None]
        self._sliding_mask = (
            (positions >= 0) & (positions <= last) & (positions > queries - cache.config.sliding_window)
        )
        self._slots = queries[-min(length, cache.slots.size) :, 0] % ring_size(cache.slots)

    def write(self, layer: int, keys: mx.array, values: mx.array) -> View:
        """Store the new rows of a layer, and return the view that the layer attends to.

        `keys` and `values` are [1, kv_heads, length, head_dim] each.
        """
        if self.cache.config.layers[layer].layer_type == "full_attention":
            write, mask = self._write_full, self._full_mask
        else:
            write, mask = self._write_ring, self._sliding_mask
        view = View(write(self.cache.keys, layer, keys), write(self.cache.values, layer, values), mask)
        self._views[layer] = view
        return view

    def read(self, layer: int) -> View:
        """Return the view of an earlier layer in this pass, for the layers that share its K/V."""
        return self._views[layer]

    def _write_full(self, buffers: dict[int, KVRows], layer: int, rows: mx.array) -> KVRows:
        old = buffers[layer]
        if isinstance(old, mx.array):
            buffers[layer] = self._update(old, rows)
        else:
            new = iter(_quantize(rows, old).parts)
            buffers[layer] = old.each(lambda part: self._update(part, next(new)))
        return _first(buffers[layer], self.cache.visible)

    def _update(self, buffer: mx.array, rows: mx.array) -> mx.array:
        return mx.slice_update(buffer, rows, self.offset[None], axes=(2,))

    def _write_ring(self, buffers: dict[int, KVRows], layer: int, rows: mx.array) -> mx.array:
        old = buffers[layer]
        assert isinstance(old, mx.array)
        kept = rows[:, :, -self._slots.size :]
        slots = mx.broadcast_to(self._slots[None, None, :, None], kept.shape)
        new = mx.put_along_axis(old, slots, kept, axis=2)
        buffers[layer] = new
        return new if self._fits else mx.concatenate([old, rows], axis=2)


class PackedPass:
    """One forward pass over the rows of several streams, one stream after the other.

    Each stream has a pass and a cache of its own. `offset` is the position of each row, int32 [rows].
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = passes
        self._ends = list(accumulate(each.length for each in passes))[:-1]
        self.offset = mx.concatenate([each.positions for each in passes])

    def write(self, layer: int, keys: mx.array, values: mx.array) -> list[View]:
        """Store the new rows of a layer, and return the views that the layer attends to, one for each stream.

        `keys` and `values` are [1, kv_heads, rows, head_dim] each.
        """
        split = zip(self._passes, self.split(keys, 2), self.split(values, 2), strict=True)
        return [each.write(layer, new_keys, new_values) for each, new_keys, new_values in split]

    def read(self, layer: int) -> list[View]:
        """Return the views of an earlier layer in this pass, for the layers that share its K/V."""
        return [each.read(layer) for each in self._passes]

    def split(self, rows: mx.array, axis: int) -> list[mx.array]:
        """Return the rows of each stream, which are along `axis`."""
        return list(mx.split(rows, self._ends, axis=axis))


def spare_slots(max_block: int) -> int:
    """Return the number of slots that a ring has beyond the window.

    A row that is written replaces the row of a position one ring before it. The spare slots keep this position outside
    the window, although the text may end up to two blocks before the last row that was written.
    """
    return 2 * max_block


def ring_size(slots: mx.array) -> mx.array:
    """Return the number of slots, int32 [1], as an array of the device.

    MLX writes a Python number into the code of a compiled kernel: each size would need kernels of its own.
    """
    return slots[-1:] + 1


def ring_positions(end: mx.array, slots: mx.array) -> mx.array:
    """Return the position in each slot after 0..end-1 were written, int32 [ring].

    `slots` are 0..ring-1. The position is the largest p < end with p % ring == slot. It is negative if nothing was
    written to the slot yet.
    """
    last = end - 1
    return last - (last - slots) % ring_size(slots)


def check_group_size(config: TextConfig, quantization: KVQuantization) -> None:
    """Check that the quantization groups divide the full-attention heads.

    Raises OptionError if they do not.
    """
    head_dim, group_size = config.layers[config.last_kv_layer("full_attention")].head_dim, quantization.group_size
    if head_dim % group_size:
        raise OptionError(
            f"kv_group_size is {group_size}, which does not divide the {head_dim} values of a full-attention head"
        )


def _numbers(count: int) -> mx.array:
    """Return 0..count-1, int32 [count]. They are evaluated, so that a compiled round takes them as they are."""
    numbers = mx.arange(count)
    mx.eval(numbers)
    return numbers


def _zeros(shape: tuple[int, ...], dtype: mx.Dtype, quantization: KVQuantization | None) -> KVRows:
    """Return rows of zeros. Quantized rows have scales and biases of zero."""
    if quantization is None:
        return mx.zeros(shape, dtype)
    bits, group_size, _ = quantization
    *lead, head_dim = shape
    scales = (*lead, head_dim // group_size)
    packed = mx.zeros((*lead, head_dim * bits // 32), mx.uint32)
    return Quantized(packed, mx.zeros(scales, dtype), mx.zeros(scales, dtype), bits, group_size)


def _quantize(rows: mx.array, how: KVQuantization | Quantized) -> Quantized:
    """Quantize each row separately, so that its bits do not depend on the number of rows."""
    packed, scales, biases = mx.quantize(rows, group_size=how.group_size, bits=how.bits)
    return Quantized(packed, scales, biases, how.bits, how.group_size)


def parts_of(rows: KVRows) -> tuple[mx.array, ...]:
    """Return the arrays of which the rows consist."""
    return (rows,) if isinstance(rows, mx.array) else rows.parts


def _first(rows: KVRows, count: int) -> KVRows:
    return rows[:, :, :count] if isinstance(rows, mx.array) else rows.each(lambda part: part[:, :, :count])


def _of_heads(rows: KVRows, heads: slice) -> KVRows:
    return rows[:, heads] if isinstance(rows, mx.array) else rows.each(lambda part: part[:, heads])


def _extend(rows: KVRows, more: int) -> KVRows:
    """Append `more` rows of zeros."""

    def extend(part: mx.array) -> mx.array:
        *lead, _, width = part.shape
        return mx.concatenate([part, mx.zeros((*lead, more, width), part.dtype)], axis=2)

    return extend(rows) if isinstance(rows, mx.array) else rows.each(extend)


def rows_in_buffers(rows: int) -> int:
    """Return the number of rows that full-attention buffers have for `rows` positions.

    It is a multiple of a step that grows with `rows`. Beyond 4096 rows, it is at most an eighth more than needed.
    """
    step = max(CAPACITY_STEP, 1 << rows.bit_length() >> 4)
    return -(-rows // step) * step
