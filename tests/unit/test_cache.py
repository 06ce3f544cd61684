"""The caches: equal to a fresh fill after any history, updated in place, and without visible rejected rows."""

import time
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import WINDOW, two_layers, unquantized

from mlx_mtp.gemma4.kv_cache import CAPACITY_STEP, Cache, View, ring_positions

MAX_BLOCK = 4


def rows(positions: np.ndarray, salt: int) -> mx.array:
    """Return K/V rows that hold their positions and a salt. The salt marks rows of rejected tokens."""
    return mx.array(np.stack([positions, np.full_like(positions, salt)], axis=-1)[None, None], mx.float32)


def write(cache: Cache, length: int, salt: int = 0) -> list[View]:
    """Run one pass of `length` rows at the offset. Return the view of each layer."""
    step = cache.start(length)
    new = rows(np.arange(cache.length, cache.length + length), salt)
    return [step.write(layer, new, -new) for layer in range(2)]


def visible(view: View, query: int) -> list[tuple[float, float]]:
    """Return (position, salt) of the rows that a query sees, in order of position. Keys and values must agree."""
    mask = np.array(view.mask)[query]
    keys, values = np.array(view.keys)[0, 0][mask], np.array(view.values)[0, 0][mask]
    assert (keys == -values).all()
    return sorted(map(tuple, keys.tolist()))


def expected(query: int, window: int | None) -> list[tuple[float, float]]:
    first = 0 if window is None else max(0, query - window + 1)
    return [(float(position), 0.0) for position in range(first, query + 1)]


# A history is a list of passes: (rows written, rows kept). Prefill chunks keep all their rows.
passes = st.one_of(
    st.integers(1, 3 * (WINDOW + MAX_BLOCK)).map(lambda n: (n, n)),
    st.integers(1, MAX_BLOCK).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(passes, min_size=1, max_size=12), st.integers(1, MAX_BLOCK))
def test_any_history_leaves_the_cache_like_a_fresh_fill(history: list[tuple[int, int]], final: int) -> None:
    cache = Cache(two_layers(), mx.float32, max_block=MAX_BLOCK)
    for length, kept in history:
        start = cache.length
        step = cache.start(length)
        positions = np.arange(start, start + length)
        # Rows of rejected tokens are marked. The test detects them if they become visible.
        new = rows(positions, 0)
        if kept < length:
            new = mx.concatenate([new[:, :, :kept], rows(positions[kept:], 1)], axis=2)
        for layer in range(2):
            step.write(layer, new, -new)
        cache.set_length(start + kept)
    drafted = cache.draft_view("sliding_attention"), cache.draft_view("full_attention")
    assert visible(drafted[0], 0) == expected(cache.length - 1, WINDOW + 1)
    assert visible(drafted[1], 0) == expected(cache.length - 1, None)
    start = cache.length
    sliding, full = write(cache, final)
    for query in range(final):
        assert visible(sliding, query) == expected(start + query, WINDOW)
        assert visible(full, query) == expected(start + query, None)


@pytest.mark.parametrize("end", [0, 1, 5, 12, 13, 100])
def test_ring_positions(end: int) -> None:
    ring = 12
    written = [-1] * ring
    for position in range(end):
        written[position % ring] = position
    positions: list[int] = ring_positions(mx.array(end), mx.arange(ring)).tolist()  # type: ignore[assignment]
    found = [position if position >= 0 else -1 for position in positions]
    assert found == written


def test_the_cache_grows_in_steps_and_keeps_its_rows() -> None:
    cache = Cache(two_layers(), mx.float32, max_block=MAX_BLOCK)
    for _ in range(CAPACITY_STEP // 100 + 2):
        write(cache, 100)
        cache.set_length(cache.length + 100)
    assert cache.capacity == 2 * CAPACITY_STEP
    assert visible(cache.draft_view("full_attention"), 0) == expected(cache.length - 1, None)


def test_buffers_grow_seldom_and_little() -> None:
    """Beyond 4096 rows, buffers grow by at most an eighth and at least a sixteenth.

    The upper bound leaves little memory idle. The lower bound keeps copies and compiled shapes few.
    """
    cache = Cache(two_layers(), mx.float32, max_block=MAX_BLOCK)
    capacities = [cache.capacity]
    for length in range(0, 40_000, 50):
        cache.set_length(length)
        cache.reserve(1)
        needed, capacity = length + 1, cache.capacity
        assert needed <= capacity == cache.visible == unquantized(cache.keys[1]).shape[2]
        assert capacity - needed < max(CAPACITY_STEP, needed / 8)
        if capacity != capacities[-1]:
            capacities.append(capacity)
    steps = [(large - small, small) for small, large in pairwise(capacities)]
    assert all(step == CAPACITY_STEP for step, small in steps if small < 4096)
    assert all(step >= small / 16 for step, small in steps if small >= 4096)


def test_growing_leaves_the_order_of_the_layers() -> None:
    """Compiled rounds take the buffers in this order. A full-attention layer can come before the others."""
    few = two_layers()
    cache = Cache(replace(few, layers=(few.layers[1], *few.layers)), mx.float32, max_block=MAX_BLOCK)
    before = [array.shape for array in cache.arrays()]
    cache.reserve(CAPACITY_STEP + 1)
    after = [array.shape for array in cache.arrays()]
    grown = [new != old for new, old in zip(after, before, strict=True)]
    assert grown == [False, True, False, True, True, False, True]
    assert list(cache.keys) == list(cache.values) == [0, 1, 2]


def test_growing_holds_one_buffer_twice_at_a_time() -> None:
    few = two_layers(head_dim=64)
    cache = Cache(replace(few, layers=(few.layers[1],) * 6), mx.float32, max_block=MAX_BLOCK, capacity=16 * 1024)
    mx.eval(cache.arrays())
    before = sum(array.nbytes for array in cache.arrays())
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    cache.reserve(17 * 1024)
    after = sum(array.nbytes for array in cache.arrays())
    # The peak is the added memory plus a larger copy of the last buffer.
    assert mx.get_peak_memory() - active < after - before + 1.2 * after / 12


def test_sliding_layers_cost_the_same_at_any_length() -> None:
    cache = Cache(two_layers(), mx.float32, max_block=MAX_BLOCK, capacity=8192)
    shapes = []
    for length in (100, 8000):
        cache.set_length(length)
        sliding, full = write(cache, 2)
        drafted = cache.draft_view("sliding_attention")
        shapes.append((unquantized(sliding.keys).shape, sliding.mask.shape, unquantized(drafted.keys).shape))
        assert unquantized(full.keys).shape[2] < length + CAPACITY_STEP + 1024
    assert shapes[0] == shapes[1]


def _cost_of_a_round(capacity: int) -> tuple[float, int, int]:
    """Return seconds of the fastest round, peak bytes above the active memory, and bytes of the buffers."""
    cache = Cache(two_layers(window=32, head_dim=256, kv_heads=4), mx.float32, max_block=MAX_BLOCK, capacity=capacity)
    new = mx.ones((1, 4, MAX_BLOCK, 256))
    mx.eval(cache.arrays(), new)
    times = []
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        started = time.perf_counter()
        step = cache.start(MAX_BLOCK)
        seen = [unquantized(step.write(layer, new, new).keys).sum() for layer in range(2)]
        cache.offset = cache.offset + 1
        del step
        mx.eval(seen, cache.arrays())
        cache.length += 1
        times.append(time.perf_counter() - started)
    return min(times), mx.get_peak_memory() - active, sum(buffer.nbytes for buffer in cache.arrays())


@pytest.mark.in_place
def test_buffers_are_updated_in_place() -> None:
    """A copied buffer per round would raise the peak by the buffer's size. Times are printed, but not asserted."""
    small_time, small_peak, _ = _cost_of_a_round(1024)
    large_time, large_peak, large_bytes = _cost_of_a_round(32 * 1024)
    print(
        f"32k against 1k rows: {large_time / small_time:.2f} times the time, peak {small_peak} and {large_peak} bytes"
    )
    assert large_bytes > 250e6
    assert large_peak < small_peak + 1e6
