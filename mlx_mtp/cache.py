"""K/V buffers of one stream: fixed capacity, written at a device-side offset; a rollback is arithmetic on one number.

Full-attention layers hold position p in row p. Sliding layers hold it in slot p % ring of a ring of `sliding_window +
max_block` slots: the `max_block` spare slots keep rejected rows from overwriting a key still inside the window. Which
position a slot holds follows from the offset alone, and masks are made from positions, so the order of rows in the ring
does not matter (keys are stored rotated). Rows at or beyond the offset are never visible; the next pass overwrites
them.
"""

from typing import NamedTuple

import mlx.core as mx

from .config import LayerType, TextConfig

# Full-attention buffers grow by at least this many rows at a time.
CAPACITY_STEP = 256


class View(NamedTuple):
    """K/V rows a layer attends to, and which of them each query sees.

    `keys` and `values` are [1, kv_heads, rows, head_dim], `mask` is boolean [queries, rows].
    """

    keys: mx.array
    values: mx.array
    mask: mx.array


class Cache:
    """The K/V buffers of one stream.

    `offset` (device) and `length` (host) are the number of valid positions; they are the same number, and `length` is
    what the host last knew. `max_block` is the largest number of rows one verify pass may write. `visible` is how many
    rows of the full-attention buffers a pass and the drafter look at: no fewer than are valid, in steps, so that passes
    of the same shape follow each other, at a cost that does not depend on the capacity.
    """

    def __init__(self, config: TextConfig, dtype: mx.Dtype, *, max_block: int, capacity: int = CAPACITY_STEP) -> None:
        self.config = config
        self.max_block = max_block
        self.ring = config.sliding_window + max_block
        self.capacity = _round_up(capacity)
        self.offset = mx.array(0, mx.int32)
        self.length = 0
        self.visible = self.capacity
        self.keys: dict[int, mx.array] = {}
        self.values: dict[int, mx.array] = {}
        for index, layer in enumerate(config.layers):
            if layer.has_kv:
                rows = self.capacity if layer.layer_type == "full_attention" else self.ring
                shape = (1, layer.num_kv_heads, rows, layer.head_dim)
                self.keys[index] = mx.zeros(shape, dtype)
                self.values[index] = mx.zeros(shape, dtype)

    def start(self, length: int) -> "Pass":
        """A forward pass that will write `length` rows at the offset. The offset itself is the caller's to advance."""
        self.reserve(length)
        return Pass(self, length)

    def reserve(self, length: int) -> None:
        """Make room for `length` more rows, and make them visible."""
        self.visible = self.rows_for(length)
        self._grow(self.visible)

    def rows_for(self, length: int) -> int:
        """How many rows are visible with room for `length` more."""
        return _round_up(self.length + length)

    def set_length(self, length: int) -> None:
        """Set the number of valid positions, known on the host. Rows beyond it are forgotten."""
        self.length = length
        self.offset = mx.array(length, mx.int32)

    def draft_view(self, layer_type: LayerType) -> View:
        """What the drafter sees of the last K/V layer of this type: valid rows only, never those of rejected tokens.

        A sliding layer shows the last `sliding_window + 1` rows, as transformers' drafter mask does.
        """
        layer = self.config.last_kv_layer(layer_type)
        if layer_type == "full_attention":
            rows = self.visible
            mask = mx.arange(rows) < self.offset
            return View(self.keys[layer][:, :, :rows], self.values[layer][:, :, :rows], mask[None])
        positions = ring_positions(self.offset, self.ring)
        mask = (positions >= 0) & (positions >= self.offset - 1 - self.config.sliding_window)
        return View(self.keys[layer], self.values[layer], mask[None])

    def arrays(self) -> list[mx.array]:
        """Every array of the state, to be evaluated together: the offset, then keys and values in order of layers."""
        # Not in the order of the dictionaries, which growing changes.
        return [self.offset, *(buffers[layer] for buffers in (self.keys, self.values) for layer in sorted(buffers))]

    def take_arrays(self) -> list[mx.array]:
        """The same, leaving the cache without buffers: one is updated in place only if nothing else holds it."""
        arrays = self.arrays()
        self.keys, self.values = {}, {}
        return arrays

    def set_arrays(self, arrays: list[mx.array]) -> None:
        """Give the cache every array of its state, in the order of `arrays`."""
        layers = [index for index, layer in enumerate(self.config.layers) if layer.has_kv]
        self.offset = arrays[0]
        self.keys = dict(zip(layers, arrays[1 : 1 + len(layers)], strict=True))
        self.values = dict(zip(layers, arrays[1 + len(layers) :], strict=True))

    def _grow(self, grown: int) -> None:
        if grown <= self.capacity:
            return
        for index, layer in enumerate(self.config.layers):
            if layer.has_kv and layer.layer_type == "full_attention":
                shape = (1, layer.num_kv_heads, grown - self.capacity, layer.head_dim)
                for buffers in (self.keys, self.values):
                    old = buffers.pop(index)
                    buffers[index] = mx.concatenate([old, mx.zeros(shape, old.dtype)], axis=2)
                    del old
                    # One buffer at a time, so that two copies of all of them never exist together.
                    mx.eval(buffers[index])
        self.capacity = grown


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
            view = View(
                self._write_full(self.cache.keys, layer, keys),
                self._write_full(self.cache.values, layer, values),
                self._full_mask,
            )
        else:
            view = View(
                self._write_ring(self.cache.keys, layer, keys),
                self._write_ring(self.cache.values, layer, values),
                self._sliding_mask,
            )
        self._views[layer] = view
        return view

    def read(self, layer: int) -> View:
        """What an earlier layer attended to in this pass, for the layers that share its K/V."""
        return self._views[layer]

    def _write_full(self, buffers: dict[int, mx.array], layer: int, rows: mx.array) -> mx.array:
        buffers[layer] = mx.slice_update(buffers[layer], rows, self.offset[None], axes=(2,))
        return buffers[layer][:, :, : self.cache.visible]

    def _write_ring(self, buffers: dict[int, mx.array], layer: int, rows: mx.array) -> mx.array:
        old = buffers[layer]
        kept = rows[:, :, -self._slots.size :]
        slots = mx.broadcast_to(self._slots[None, None, :, None], kept.shape)
        buffers[layer] = mx.put_along_axis(old, slots, kept, axis=2)
        return buffers[layer] if self._fits else mx.concatenate([old, rows], axis=2)


def ring_positions(end: mx.array, ring: int) -> mx.array:
    """Position held by each slot after 0..end-1 were written: the largest p < end with p % ring == slot.

    int32 [ring]; negative where nothing was written yet.
    """
    last = end - 1
    return last - (last - mx.arange(ring)) % ring


def _round_up(rows: int) -> int:
    """To a multiple of a step that grows with the number, at most an eighth more than needed beyond 4096."""
    step = max(CAPACITY_STEP, 1 << rows.bit_length() >> 4)
    return -(-rows // step) * step
