"""Compiled rounds, kept by shape."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import Cache, KVQuantization
from mlx_mtp.gemma4.layers import Between, Projected
from mlx_mtp.gemma4.target import Target

from .round import RoundParts, Steps, round_steps

# This is the largest number of shapes that each thread keeps.
_MOST_SHAPES = 64


class Shape(NamedTuple):
    """The shape for which a round is compiled.

    It has `k` draft tokens. The other fields are the number of K/V rows that a pass sees, the number of rows in the
    buffers, their quantization, and the key of the stream.
    """

    k: int
    visible: int
    capacity: int
    quantized_as: KVQuantization | None
    key: tuple[Any, ...]


class _StepsByShape(threading.local):
    """The steps of this thread by shape. The value is None for a shape that occurred once.

    The function that `mx.compile` returns must stay on one thread (MLX 0.32.2 to 0.32.4). Each thread that calls it
    keeps the graph under the address of the Python function. When the function is deleted, only one thread drops its
    graph. The other threads keep the weights of the graph in memory. They also use the graph for the next function at
    this address.
    """

    def __init__(self) -> None:
        self.found: dict[Shape, Steps | None] = {}
        # The parts of packed passes between attentions, by network and layer.
        self.between: dict[tuple[type, int], Callable[..., Any]] = {}
        # The numbers of rows of packed passes that occurred, by network.
        self.rows: set[tuple[type, int]] = set()


class CompiledRounds:
    """Compiled steps of rounds, shared by the streams of one target and drafter.

    The weights of both networks must not change. Steps are compiled by shape: the number of draft tokens, the number of
    K/V rows they see and that the buffers hold, the K/V quantization, and the options of the stream. A shape is
    compiled when it occurs for the second time, or for the first time if `always` is set. If the host has a part in a
    round, draft and verify are compiled separately; with a guide, the draft is not compiled. `traces` lists the shape
    of each trace of a verify pass.
    """

    def __init__(self, *, always: bool = False) -> None:
        self.always = always
        self.traces: list[Shape] = []
        self._steps = _StepsByShape()

    def steps(self, parts: RoundParts, layout: Cache, k: int, key: tuple[Any, ...]) -> Steps:
        """Return the steps of a round of k draft tokens.

        `key` distinguishes the options of one stream from the options of another stream.
        """
        shape = Shape(k, layout.visible, layout.capacity, layout.quantized_as, key)
        found = self._steps.found
        is_new = shape not in found and not self.always
        # The dictionary is in order of use. The shape that was not used for the longest time is first, and is dropped.
        steps = found.pop(shape, None)
        if steps is None and not is_new:
            steps = self._compile(parts, layout, k, shape)
        found[shape] = steps
        if len(found) > _MOST_SHAPES:
            found.pop(next(iter(found)))
        # A new shape may never occur again, so its first round is not compiled. For example, rounds near the end of a
        # text draft fewer tokens.
        return steps or round_steps(parts, layout, k)

    def between(self, network: Target | Drafter, rows: int) -> Between | None:
        """Return the compiled parts of a packed pass of this number of rows between its attentions.

        Return None for a number of rows that occurs for the first time, unless `always` is set.
        """
        found, kind = self._steps, type(network)
        is_new = (kind, rows) not in found.rows and not self.always
        found.rows.add((kind, rows))
        if is_new:
            return None

        def between(
            index: int, h: mx.array, attended: mx.array, per_layer: mx.array | None, offset: mx.array
        ) -> tuple[mx.array, Projected | None]:
            if (kind, index) not in found.between:
                found.between[kind, index] = mx.compile(partial(network.between_attentions, index))
            following: tuple[mx.array, Projected | None]
            following = found.between[kind, index](h, attended, per_layer, offset)
            return following

        return between

    def _compile(self, parts: RoundParts, layout: Cache, k: int, shape: Shape) -> Steps:
        # The graph must not hold the buffers of the stream that it was traced with.
        parts = parts._replace(target=parts.target.in_graph)
        plain = round_steps(parts, layout.without_rows(), k)
        traces = self.traces

        def traced(step: Callable[..., Any]) -> Callable[..., Any]:
            def trace(*arguments: Any) -> Any:
                traces.append(shape)
                return step(*arguments)

            return mx.compile(trace)

        return Steps(mx.compile(plain.draft), traced(plain.verify), traced(plain.whole), is_compiled=True)
