"""The leader's part: it announces everything that the followers must do to take part in its passes."""

import contextlib
import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from types import FrameType
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.config import LayerType
from mlx_mtp.errors import GroupError, PromptCacheError
from mlx_mtp.gemma4.kv_cache import Buffers, Cache, KVQuantization
from mlx_mtp.gemma4.target import MediaRows, Target

from .membership import Group


class Leader:
    """Announces caches and passes to the followers, in the order in which they take place.

    Caches and kept K/V have numbers. The followers make the same ones, and free them with the next announcement after
    they were freed here.
    """

    def __init__(self, group: Group, target: Target) -> None:
        self.group = group
        # A model that nobody holds any more was not closed. The next load frees its parts.
        self._end = weakref.finalize(target, group.give_back)
        self._end.atexit = False
        self._numbers = count()
        self._freed: deque[int] = deque()

    def tell(self, kind: str, **fields: Any) -> None:
        """Send a message to all followers. Raises GroupError if a rank was lost."""
        freed = []
        # Objects are freed on any thread, at any time.
        while self._freed:
            freed.append(self._freed.popleft())
        # All followers must get a message, or none.
        with self.undisturbed():
            if freed:
                self.group.tell({"kind": "free", "numbers": freed})
            self.group.tell({"kind": kind, **fields})

    def close(self) -> None:
        """Let the followers free the target and all K/V, and the group be free for another model."""
        if self._end.detach() is None:
            return
        self.group.give_back()
        # Without followers, there is nothing to free.
        with contextlib.suppress(GroupError):
            self.tell("close")

    def number(self, owner: object) -> int:
        """Return a number for an object. The followers free their own object when `owner` is freed."""
        number = next(self._numbers)
        # At the end of the process, all followers end.
        weakref.finalize(owner, self._freed.append, number).atexit = False
        return number

    def make_cache(self, target: Target, max_block: int, quantization: KVQuantization | None) -> "LeadingCache":
        """Make the cache of a new text, here and on the followers."""
        cache = LeadingCache(self, target, max_block, quantization)
        self.tell("cache", number=cache.number, max_block=max_block, quantization=quantization)
        return cache

    def announce(
        self,
        caches: Sequence[Cache],
        lengths: Sequence[int],
        *,
        is_packed: bool = False,
        logit_rows: int = 0,
        hidden_rows: int | None = None,
        media: MediaRows | None = None,
    ) -> None:
        """Tell the followers to take part in a pass. See `Target` for its parameters."""
        self.tell(
            "take_part",
            caches=[_place(cache) for cache in caches],
            lengths=list(lengths),
            is_packed=is_packed,
            logit_rows=logit_rows,
            hidden_rows=hidden_rows,
            has_media=media is not None,
            has_last_seen=media is not None and media.last_seen is not None,
        )

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Let Ctrl-C wait until the statement has ended."""
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            # Ctrl-C interrupts the main thread only.
            yield
            return
        came: list[tuple[int, FrameType | None]] = []
        signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            for number, frame in came[:1]:
                handler(number, frame)

    def evaluate(self, *arrays: Any) -> None:
        """Evaluate arrays that depend on passes, and wait. Raises GroupError if a rank is lost meanwhile."""
        with self.group.waiting():
            mx.eval(*arrays)

    def async_evaluate(self, *arrays: Any) -> None:
        """Evaluate arrays that depend on passes. Raises GroupError if a rank is lost meanwhile."""
        with self.group.waiting():
            mx.async_eval(*arrays)


def _place(cache: Cache) -> tuple[int, int, int]:
    """Return the number of a cache, its length, and the number of rows in flight behind it."""
    assert isinstance(cache, LeadingCache)
    return cache.number, cache.length, cache.in_flight


class KeptBuffers(Buffers):
    """K/V that the leader keeps for later texts. The followers keep theirs under the same number."""

    number: int


class LeadingCache(Cache):
    """The leader's cache of a text. The followers have caches of the same number."""

    def __init__(self, leader: Leader, target: Target, max_block: int, quantization: KVQuantization | None) -> None:
        super().__init__(target.config, target.dtype, max_block=max_block, quantization=quantization)
        self._leader = leader
        self.number = leader.number(self)

    def buffers(self, layer_type: LayerType) -> Buffers:
        """Return the keys and values of all layers of a type. The followers keep theirs as long as the result lives."""
        kept = KeptBuffers(super().buffers(layer_type))
        kept.number = self._leader.number(kept)
        self._leader.tell("keep", number=kept.number, cache=self.number, layer_type=layer_type)
        return kept

    def restore(self, full: Buffers, rings: Buffers, length: int, written: int) -> None:
        """Continue after the first `length` positions of buffers that were kept before. See `Cache`.

        Raises PromptCacheError if the followers have no such buffers, as for a file.
        """
        if not (isinstance(full, KeptBuffers) and isinstance(rings, KeptBuffers)):
            raise PromptCacheError("the K/V of a file are those of one machine: several machines cannot use them")
        self._leader.tell(
            "restore", cache=self.number, full=full.number, rings=rings.number, length=length, written=written
        )
        super().restore(full, rings, length, written)
