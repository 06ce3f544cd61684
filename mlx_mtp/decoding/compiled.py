"""Compiled rounds, by shape."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.gemma4.kv_cache import Cache, KVQuantization

from .round import RoundParts, Steps, round_steps

# How many shapes each thread keeps.
_MOST_SHAPES = 64


class Shape(NamedTuple):
    """What a round is compiled for: `k` draft tokens, the K/V rows that a pass sees, the rows of the buffers, their
    quantization, and the key of the stream."""

    k: int
    visible: int
    capacity: int
    quantized_as: KVQuantization | None
    key: tuple[Any, ...]


class _StepsByShape(threading.local):
    """The steps by shape, of this thread alone; None for a shape that came once.

    What `mx.compile` returns must stay on one thread (MLX 0.32.2 to 0.32.4). Each thread that calls it keeps the graph,
    by the address of the Python function, and when the function is gone only one of them forgets it. The others keep
    its weights in memory, and use the graph for the next function that has this address.
    """

    def __init__(self) -> None:
        self.found: dict[Shape, Steps | None] = {}


class CompiledRounds:
    """Compiled steps of rounds, shared by the streams of one target and drafter. Their weights must stay as they are.

    Steps are compiled by their shape: the number of draft tokens, the K/V rows they see, whether these are quantized,
    and the options of the stream. A shape is compiled when it comes a second time or, if `always`, the first time.
    Where the host has a part in a round, draft and verify are compiled apart. `traces` lists the shape of each trace.
    """

    def __init__(self, *, always: bool = False) -> None:
        self.always = always
        self.traces: list[Shape] = []
        self._steps = _StepsByShape()

    def steps(self, parts: RoundParts, layout: Cache, k: int, key: tuple[Any, ...]) -> Steps:
        """The steps of a round of k draft tokens. `key` tells the options of one stream from those of another."""
        shape = Shape(k, layout.visible, layout.capacity, layout.quantized_as, key)
        found = self._steps.found
        is_new = shape not in found and not self.always
        # The shape that was used last is the last one in the dictionary; the first one is dropped.
        steps = found.pop(shape, None)
        if steps is None and not is_new:
            steps = self._compile(parts, layout, k, shape)
        found[shape] = steps
        if len(found) > _MOST_SHAPES:
            found.pop(next(iter(found)))
        # A new shape may be the last of its kind: near the end of a text, fewer tokens are drafted.
        return steps or round_steps(parts, layout, k)

    def _compile(self, parts: RoundParts, layout: Cache, k: int, shape: Shape) -> Steps:
        # The graph must not hold the buffers of the stream that it was traced with.
        draft, verify, whole = round_steps(parts, layout.without_rows(), k)
        traces = self.traces

        def traced(step: Callable[..., Any]) -> Callable[..., Any]:
            def trace(*arguments: Any) -> Any:
                traces.append(shape)
                return step(*arguments)

            return mx.compile(trace)

        return Steps(mx.compile(draft), traced(verify), traced(whole))
