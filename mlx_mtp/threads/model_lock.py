"""The lifetime of a model: one thread at a time uses it, and open generators end when it is closed."""

import threading
import weakref
from collections.abc import Callable, Generator
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Any, Self

from mlx_mtp.errors import ClosedError

from .job_thread import Worker


class Lifetime:
    """The lifetime of a model, until `end`. The model stays open during a `with` statement.

    Only one thread at a time can be in the `with` statement. The same thread may enter it again, as callbacks of a
    generation do. Entering it after `end` raises ClosedError.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        self._is_closed = False
        self._generators: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
        # This is a lock of its own, because a caller of `worker` must not wait for a generation.
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
        """True after `end` was called."""
        return self._is_closed

    def check(self) -> None:
        """Raise ClosedError after `end`."""
        if self._is_closed:
            raise ClosedError("the model is closed: load it again")

    def guard(self, items: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """Return the items of a generator that holds parts of the model. `end` closes the generator.

        Each item is made in a `with` statement of this object.
        """
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

    def worker(self, make: Callable[[], Worker]) -> Worker:
        """Return the thread for jobs that use the model, which `make` starts once. Raises ClosedError after `end`."""
        with self._worker_lock:
            self.check()
            if self._worker is None:
                self._worker = make()
            return self._worker

    def end(self) -> bool:
        """End running jobs and close open generators. Return False if this was done before.

        The call waits for the round, or the chunk of a prompt, that is being computed. It does not wait for a
        generation whose callback makes the call.
        """
        with self._worker_lock:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return False
        if self._worker is not None:
            # If a callback of a generation makes this call, the worker may wait for that generation. Then this call
            # must not wait for the worker.
            self._worker.close(wait=self._owner != threading.get_ident())
        with self._lock:
            for items in list(self._generators):
                if getgeneratorstate(items) != GEN_RUNNING:
                    items.close()
        return True
