"""A follower's part: it does what the leader announces until the group ends."""

import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import mlx.core as mx

from mlx_mtp.checkpoints.config import LayerType
from mlx_mtp.errors import MTPError
from mlx_mtp.gemma4.kv_cache import Buffers, Cache, KVQuantization, KVState
from mlx_mtp.gemma4.layers import Between, Projected
from mlx_mtp.gemma4.target import MediaRows, TargetOutput

from .membership import Group, fail, leave
from .shared_target import SharedTarget

# The largest number of shapes whose compiled passes are kept.
_MOST_SHAPES = 64

# Loads the part of this rank, from the group and the fields of a message.
Load = Callable[..., SharedTarget]


def follow(group: Group, load: Load) -> NoReturn:
    """Do what the leader announces, and end the process when the group ends: with status 0 after regular work."""
    follower = Follower(group, load)
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches all ranks of a terminal. The leader decides when the group ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while "end" not in (message := group.peers[0].receive()):
            follower.take(message)
    except MTPError as error:
        _give_up(group, f"rank {group.rank}: {error}")
    except RuntimeError as error:
        _give_up(group, f"rank {group.rank}: a pass failed: {error}")
    group.peers[0].close()
    # The program of the leader is not run here.
    leave(0)


def _give_up(group: Group, reason: str) -> NoReturn:
    group.peers[0].send({"end": reason})
    fail(reason)


class Follower:
    """The caches of a follower, and its part in the passes of the leader's texts."""

    def __init__(self, group: Group, load: Load) -> None:
        self._group = group
        self._load = load
        self._target: SharedTarget | None = None
        # Caches and kept K/V, by their numbers.
        self._caches: dict[int, Cache] = {}
        self._kept: dict[int, Buffers] = {}
        self._passes = _Passes()

    def take(self, message: dict[str, Any]) -> None:
        """Do what a message of the leader asks for: call the method that has the name of its kind."""
        fields = dict(message)
        kinds: dict[str, Callable[..., None]] = {
            "load": self._start,
            "close": self._close,
            "cache": self._make_cache,
            "free": self._free,
            "keep": self._keep,
            "restore": self._restore,
            "take_part": self._take_part,
            "measure": self._measure,
        }
        kinds[fields.pop("kind")](**fields)

    def _start(self, number: int, **fields: Any) -> None:
        # An earlier model may not have been closed.
        self._close()
        self._target = self._load(self._group, **fields)
        self._group.peers[0].send({"loaded": number})

    def _close(self) -> None:
        self._caches.clear()
        self._kept.clear()
        self._passes, self._target = _Passes(), None
        mx.clear_cache()

    def _make_cache(self, number: int, max_block: int, quantization: list[int] | None) -> None:
        kv = None if quantization is None else KVQuantization(*quantization)
        self._caches[number] = Cache(self.target.config, self.target.dtype, max_block=max_block, quantization=kv)

    def _free(self, numbers: list[int]) -> None:
        for number in numbers:
            self._caches.pop(number, None)
            self._kept.pop(number, None)

    def _keep(self, number: int, cache: int, layer_type: LayerType) -> None:
        self._kept[number] = self._caches[cache].buffers(layer_type)

    def _restore(self, cache: int, full: int, rings: int, length: int, written: int) -> None:
        self._caches[cache].restore(self._kept[full], self._kept[rings], length, written)

    def _measure(self, width: int, times: int) -> None:
        for _ in range(times):
            mx.eval(self._group.all_sum(mx.zeros(width)))

    @property
    def target(self) -> SharedTarget:
        """The part of the target."""
        assert self._target is not None
        return self._target

    def _take_part(
        self,
        caches: list[tuple[int, int, int]],
        lengths: list[int],
        is_packed: bool,
        logit_rows: int,
        hidden_rows: int | None,
        has_media: bool,
        has_last_seen: bool,
    ) -> None:
        found = [self._caches[number] for number, _, _ in caches]
        for cache, (_, length, in_flight), rows in zip(found, caches, lengths, strict=True):
            cache.length, cache.in_flight = length, in_flight
            cache.reserve(rows)
        tokens = mx.zeros((1, sum(lengths)), mx.int32)
        if is_packed:
            outputs = self.target.packed(tokens, found, lengths, self._passes.between(self.target, sum(lengths)))
            mx.async_eval(outputs, [each.arrays() for each in found])
            return
        (cache,) = found
        if logit_rows == lengths[0] <= cache.max_block:
            self._passes.run(self.target, cache, logit_rows)
            return
        media = MediaRows([], mx.zeros(lengths, mx.int32) if has_last_seen else None) if has_media else None
        output = self.target(tokens, cache, logit_rows, hidden_rows, media=media)
        mx.async_eval([each for each in output if each.size], cache.arrays())


class _Passes:
    """The compiled passes of a follower. As on the leader, the first pass of a shape is not compiled."""

    def __init__(self) -> None:
        # In order of use. The shape that was not used for the longest time is first, and is dropped.
        self._by_shape: dict[Any, Callable[..., Any]] = {}
        self._between: dict[int, Callable[..., Any]] = {}
        self._seen: set[Any] = set()
        self._always = mx.default_device() != mx.Device(mx.cpu)

    def run(self, target: SharedTarget, cache: Cache, rows: int) -> None:
        """Take part in the verify pass of one text."""
        # The graph must not hold the buffers of the text that it was traced with.
        layout = cache.without_rows()

        def take_part(kv: KVState) -> tuple[KVState, TargetOutput]:
            own = layout.over(kv)
            output = target(mx.zeros((1, rows), mx.int32), own, rows)
            return own.kv, output

        shape = rows, cache.visible, cache.capacity, cache.max_block, cache.quantized_as
        run = self._by_shape.pop(shape, None)
        if run is None and not self._is_new(shape):
            run = mx.compile(take_part)
        if run is not None:
            self._by_shape[shape] = run
        if len(self._by_shape) > _MOST_SHAPES:
            self._by_shape.pop(next(iter(self._by_shape)))
        cache.kv, output = (run or take_part)(cache.kv)
        mx.async_eval(output, cache.arrays())

    def between(self, target: SharedTarget, rows: int) -> Between | None:
        """Return the compiled parts of a packed pass, see `CompiledRounds.between`."""
        if self._is_new(rows):
            return None

        def between(
            index: int, h: mx.array, attended: mx.array, per_layer: mx.array | None, offset: mx.array
        ) -> tuple[mx.array, Projected | None]:
            if index not in self._between:
                self._between[index] = mx.compile(partial(target.between_attentions, index))
            following: tuple[mx.array, Projected | None]
            following = self._between[index](h, attended, per_layer, offset)
            return following

        return between

    def _is_new(self, shape: Any) -> bool:
        is_new = shape not in self._seen and not self._always
        self._seen.add(shape)
        return is_new
