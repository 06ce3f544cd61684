"""K/V buffers of one stream: fixed capacity, written at a device-side offset; a rollback is arithmetic on one number.

Full-attention layers hold position p in row p. Sliding layers hold it in slot p % ring of a ring of `sliding_window +
max_block` slots: the `max_block` spare slots keep rejected rows from overwriting a key still inside the window. Which
position a slot holds follows from the offset alone, and masks are made from positions, so the order of rows in the ring
does not matter (keys are stored rotated). Rows at or beyond the offset are never visible; the next pass overwrites
them.

Full-attention buffers may be quantized. Passes from position `KVQuantization.start` on write and see quantized rows
only, passes before it none, and no pass lies on both sides: what a row sees depends on its position alone, however many
rows a pass has. Rings, whose size is fixed, are never quantized.
"""

from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.checkpoints.config import LayerType, TextConfig
from mlx_mtp.errors import OptionError

# Full-attention buffers grow by at least this many rows at a time.
CAPACITY_STEP = 256


class KVQuantization(NamedTuple):
    """How the K/V of full-attention layers are quantized (affine, along head_dim), and the position it begins at."""

    bits: int
    group_size: int
    start: int


class Quantized(NamedTuple):
    """Quantized K/V rows: `packed` is uint32 [1, kv_heads, rows, head_dim * bits / 32], `scales` and `biases` are
    [1, kv_heads, rows, head_dim / group_size]."""

    packed: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def parts(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.packed, self.scales, self.biases

    def each(self, change: Callable[[mx.array], mx.array]) -> "Quantized":
        """With every part changed in the same way."""
        packed, scales, biases = map(change, self.parts)
        return Quantized(packed, scales, biases, self.bits, self.group_size)


# K/V rows, [1, kv_heads, rows, head_dim] where they are not quantized.
Rows = mx.array | Quantized


class View(NamedTuple):
    """K/V rows a layer attends to, and which of them each query sees: `mask` is boolean [queries, rows]."""

    keys: Rows
    values: Rows
    mask: mx.array


# Keys and values by layer.
Buffers = dict[int, tuple[Rows, Rows]]


class KVState(NamedTuple):
    """The arrays of a cache: how many positions are valid, int32 [], and the buffers of keys and values by layer."""

    offset: mx.array
    keys: dict[int, Rows]
    values: dict[int, Rows]

    @staticmethod
    def none() -> "KVState":
        """A state without buffers."""
        return KVState(mx.array(0, mx.int32), {}, {})


class Cache:
    """The K/V buffers of one stream: their layout, known on the host, and their arrays, `kv`.

    `offset` (device) and `length` (host) are the number of valid positions; they are the same number, and `length` is
    what the host last knew. `max_block` is the largest number of rows one verify pass may write. `visible` is how many
    rows of the full-attention buffers a pass and the drafter look at: no fewer than are valid, in steps, so that passes
    of the same shape follow each other, at a cost that does not depend on the capacity. `is_quantized` says whether the
    full-attention buffers are quantized yet; once they are, they stay so.

    Raises OptionError if groups of `quantization` do not divide the full-attention heads.
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
        self.ring = config.sliding_window + max_block
        self.capacity = rows_in_buffers(capacity)
        self.kv = KVState.none()
        self.length = 0
        self.visible = self.capacity
        for index, layer in enumerate(config.layers):
            if layer.has_kv:
                is_full = layer.layer_type == "full_attention"
                quantized = quantization if is_full and self.is_quantized else None
                shape = (1, layer.num_kv_heads, self.capacity if is_full else self.ring, layer.head_dim)
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
    def keys(self) -> dict[int, Rows]:
        """The buffers of keys by layer."""
        return self.kv.keys

    @property
    def values(self) -> dict[int, Rows]:
        """The buffers of values by layer."""
        return self.kv.values

    @property
    def quantized_as(self) -> KVQuantization | None:
        """How the full-attention buffers are quantized; None as long as they are not."""
        if self.quantization is None or not self.is_quantized:
            return None
        # Where quantization began does not matter any more.
        return self.quantization._replace(start=0)

    def over(self, kv: KVState) -> "Cache":
        """A cache of the same layout over other arrays. A pass over it leaves `kv` as it is."""
        other = copy(self)
        other.kv = KVState(kv.offset, dict(kv.keys), dict(kv.values))
        return other

    def without_rows(self) -> "Cache":
        """A cache of the same layout that holds no buffers."""
        return self.over(KVState.none())

    def start(self, length: int) -> "Pass":
        """A forward pass that will write `length` rows at the offset. The offset itself is the caller's to advance."""
        self.reserve(length)
        return Pass(self, length)

    def reserve(self, length: int) -> None:
        """Make room for `length` more rows, and make them visible. Where quantization begins, it does here."""
        if self.quantization is not None and not self.is_quantized and self.length >= self.quantization.start:
            self._quantize(self.quantization)
        self.visible = self.rows_for(length)
        self._grow(self.visible)

    def rows_for(self, length: int) -> int:
        """How many rows are visible with room for `length` more."""
        return rows_in_buffers(self.length + length)

    def longest_pass(self, length: int) -> int:
        """How many of `length` rows the next pass can write: none goes beyond where quantization begins, since its rows
        would see others than those of shorter passes do."""
        start = 0 if self.quantization is None else self.quantization.start
        return min(length, start - self.length) if self.length < start else length

    def set_length(self, length: int) -> None:
        """Set the number of valid positions, known on the host. Rows beyond it are forgotten."""
        self.length = length
        self.offset = mx.array(length, mx.int32)

    def buffers(self, layer_type: LayerType) -> Buffers:
        """Keys and values of all layers of a type that own any. A write after this copies those still held."""
        return {
            index: (keys, self.values[index])
            for index, keys in self.keys.items()
            if self.config.layers[index].layer_type == layer_type
        }

    def restore(self, full: Buffers, rings: Buffers, length: int) -> None:
        """Go on after the first `length` positions of what such buffers hold. Rings made at an offset serve any length
        up to it, and down to `max_block` - 1 below."""
        for index, (keys, values) in (full | rings).items():
            self.keys[index], self.values[index] = keys, values
        keys, _ = next(iter(full.values()))
        self.is_quantized = isinstance(keys, Quantized)
        self.capacity = parts_of(keys)[0].shape[2]
        self.set_length(length)

    def draft_view(self, layer_type: LayerType) -> View:
        """What the drafter sees of the last K/V layer of this type: valid rows only, never those of rejected tokens.

        A sliding layer shows the last `sliding_window + 1` rows, as transformers' drafter mask does.
        """
        layer = self.config.last_kv_layer(layer_type)
        if layer_type == "full_attention":
            rows = self.visible
            mask = mx.arange(rows) < self.offset
            return View(_first(self.keys[layer], rows), _first(self.values[layer], rows), mask[None])
        positions = ring_positions(self.offset, self.ring)
        mask = (positions >= 0) & (positions >= self.offset - 1 - self.config.sliding_window)
        return View(self.keys[layer], self.values[layer], mask[None])

    def arrays(self) -> list[mx.array]:
        """Every array, to be evaluated together."""
        rows = [rows for buffers in (self.keys, self.values) for rows in buffers.values()]
        return [self.offset, *(part for each in rows for part in parts_of(each))]

    def _grow(self, grown: int) -> None:
        if grown <= self.capacity:
            return
        self._replace_full(lambda rows: _extend(rows, grown - self.capacity))
        self.capacity = grown

    def _quantize(self, quantization: KVQuantization) -> None:
        self._replace_full(lambda rows: _quantize(rows, quantization) if isinstance(rows, mx.array) else rows)
        self.is_quantized = True

    def _replace_full(self, change: Callable[[Rows], Rows]) -> None:
        """Replace the buffers of full attention one at a time, so that two copies of all never exist together."""
        for index, layer in enumerate(self.config.layers):
            if layer.has_kv and layer.layer_type == "full_attention":
                for buffers in (self.keys, self.values):
                    buffers[index] = change(buffers[index])
                    mx.eval(parts_of(buffers[index]))


class Pass:
    """One forward pass of `length` rows over a cache: writes each layer's K/V and says what it attends to."""

    def __init__(self, cache: Cache, length: int) -> None:
        self.cache = cache
        self.length = length
        self.offset = cache.offset
        self._views: dict[int, View] = {}
        queries = (self.offset + mx.arange(length))[:, None]
        self._full_mask = mx.arange(cache.visible)[None] <= queries
        # A block that fits the spare slots is read back from the ring. A longer one (prefill) would overwrite keys its
        # own first rows still need, so it attends to the ring as it was plus its own rows.
        self._fits = length <= cache.max_block
        end = self.offset + length if self._fits else self.offset
        positions = ring_positions(end, cache.ring)[None]
        if not self._fits:
            positions = mx.concatenate([positions, queries.T], axis=1)
        self._sliding_mask = (
            (positions >= 0) & (positions <= queries) & (positions > queries - cache.config.sliding_window)
        )
        self._slots = queries[-min(length, cache.ring) :, 0] % cache.ring

    def write(self, layer: int, keys: mx.array, values: mx.array) -> View:
        """Store a layer's new rows, [1, kv_heads, length, head_dim] each, and return what that layer attends to."""
        if self.cache.config.layers[layer].layer_type == "full_attention":
            write, mask = self._write_full, self._full_mask
        else:
            write, mask = self._write_ring, self._sliding_mask
        view = View(write(self.cache.keys, layer, keys), write(self.cache.values, layer, values), mask)
        self._views[layer] = view
        return view

    def read(self, layer: int) -> View:
        """What an earlier layer attended to in this pass, for the layers that share its K/V."""
        return self._views[layer]

    def _write_full(self, buffers: dict[int, Rows], layer: int, rows: mx.array) -> Rows:
        old = buffers[layer]
        if isinstance(old, mx.array):
            buffers[layer] = self._update(old, rows)
        else:
            new = iter(_quantize(rows, old).parts)
            buffers[layer] = old.each(lambda part: self._update(part, next(new)))
        return _first(buffers[layer], self.cache.visible)

    def _update(self, buffer: mx.array, rows: mx.array) -> mx.array:
        return mx.slice_update(buffer, rows, self.offset[None], axes=(2,))

    def _write_ring(self, buffers: dict[int, Rows], layer: int, rows: mx.array) -> mx.array:
        old = buffers[layer]
        assert isinstance(old, mx.array)
        kept = rows[:, :, -self._slots.size :]
        slots = mx.broadcast_to(self._slots[None, None, :, None], kept.shape)
        new = mx.put_along_axis(old, slots, kept, axis=2)
        buffers[layer] = new
        return new if self._fits else mx.concatenate([old, rows], axis=2)


def ring_positions(end: mx.array, ring: int) -> mx.array:
    """Position held by each slot after 0..end-1 were written: the largest p < end with p % ring == slot.

    int32 [ring]; negative where nothing was written yet.
    """
    last = end - 1
    return last - (last - mx.arange(ring)) % ring


def check_group_size(config: TextConfig, quantization: KVQuantization) -> None:
    """Raises OptionError if the groups do not divide the full-attention heads."""
    head_dim, group_size = config.layers[config.last_kv_layer("full_attention")].head_dim, quantization.group_size
    if head_dim % group_size:
        raise OptionError(
            f"kv_group_size is {group_size}, which does not divide the {head_dim} values of a full-attention head"
        )


def _zeros(shape: tuple[int, ...], dtype: mx.Dtype, quantization: KVQuantization | None) -> Rows:
    """Rows of zeros, which quantized have scales and biases of zero."""
    if quantization is None:
        return mx.zeros(shape, dtype)
    bits, group_size, _ = quantization
    *lead, head_dim = shape
    scales = (*lead, head_dim // group_size)
    packed = mx.zeros((*lead, head_dim * bits // 32), mx.uint32)
    return Quantized(packed, mx.zeros(scales, dtype), mx.zeros(scales, dtype), bits, group_size)


def _quantize(rows: mx.array, how: KVQuantization | Quantized) -> Quantized:
    """Each row by itself, so that its bits do not depend on how many there are."""
    packed, scales, biases = mx.quantize(rows, group_size=how.group_size, bits=how.bits)
    return Quantized(packed, scales, biases, how.bits, how.group_size)


def parts_of(rows: Rows) -> tuple[mx.array, ...]:
    """The arrays that rows consist of."""
    return (rows,) if isinstance(rows, mx.array) else rows.parts


def _first(rows: Rows, count: int) -> Rows:
    return rows[:, :, :count] if isinstance(rows, mx.array) else rows.each(lambda part: part[:, :, :count])


def _extend(rows: Rows, more: int) -> Rows:
    """With `more` rows of zeros."""

    def extend(part: mx.array) -> mx.array:
        *lead, _, width = part.shape
        return mx.concatenate([part, mx.zeros((*lead, more, width), part.dtype)], axis=2)

    return extend(rows) if isinstance(rows, mx.array) else rows.each(extend)


def rows_in_buffers(rows: int) -> int:
    """Rows of full-attention buffers for so many positions: a multiple of a step that grows with the number, at most an
    eighth more than needed beyond 4096."""
    step = max(CAPACITY_STEP, 1 << rows.bit_length() >> 4)
    return -(-rows // step) * step
