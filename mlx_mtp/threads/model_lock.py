"""Whether a model is open: one thread at a time uses it, and what is open ends when it is closed."""

import threading
import weakref
from collections.abc import Generator
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Any, Self

from mlx_mtp.errors import ClosedError

from .job_thread import Worker


class Lifetime:
    """Of a model, until `end`. In a `with` statement, which threads enter one after the other, it stays open.

    Entering it again in the same thread is fine, as callbacks of a generation do. Raises ClosedError after `end`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        self._is_closed = False
        self._generators: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
        # A lock of its own: whoever asks for the worker must not wait for a generation.
        self._worker_lock = threading.Lock()
        self._worker: Worker | None = None

    def __enter__(self) -> Self:
        self._lock.acquire()
        try:
            self.check()
        except ClosedError:
            self._lock.release()
            raise
        self._owner = threading.get_ident()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def check(self) -> None:
        """Raises ClosedError after `end`."""
        if self._is_closed:
            raise ClosedError("the model is closed: load it again")

    def guard(self, items: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """The items of a generator that holds parts of the model, each made in a `with` statement of this."""
        self._generators.add(items)
        return self._take_turns(items)

    def _take_turns(self, items: Generator[Any, None, None]) -> Generator[Any, None, None]:
        try:
            while True:
                with self:
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
                del item
        finally:
            with self._lock:
                items.close()

    def worker(self) -> Worker:
        """A thread for jobs that use the model. Raises ClosedError after `end`."""
        with self._worker_lock:
            self.check()
            if self._worker is None:
                self._worker = Worker("mlx-mtp")
            return self._worker

    def end(self) -> bool:
        """End what runs, and close the generators that are open. False if that was done before.

        Waits for the round or the part of a prompt that is being computed, but for one whose callback called this.
        """
        with self._worker_lock:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return False
        if self._worker is not None:
            # It may wait for the generation whose callback this is.
            self._worker.close(wait=self._owner != threading.get_ident())
        with self._lock:
            for items in list(self._generators):
                if getgeneratorstate(items) != GEN_RUNNING:
                    items.close()
        return True
