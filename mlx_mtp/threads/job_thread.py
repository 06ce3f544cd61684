"""A thread that runs jobs, for callers on an asyncio event loop.

MLX's streams belong to threads. Callers on an event loop give their work to this thread, and get the items back on the
loop. A `Schedule` decides the order of the work.
"""

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import mlx.core as mx

from mlx_mtp.errors import BusyError, ClosedError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class CancelledJob(Exception):  # noqa: N818 - it is not an error: the caller no longer needs the rest.
    """The exception that ends a job on the worker's thread after `Job.cancel`."""


class _End:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Job(Generic[T]):
    """The items of one piece of a `Worker`'s work, as an asynchronous iterator on the loop that submitted it.

    `start` makes the work on the worker's thread: whatever the worker's schedule runs, such as an iterator of items. An
    exception of the work is raised on the loop. `cancel` ends the job before it begins, at its next item, or at its
    next `check`. `on_begin`, `on_item` and `on_end` are called on the worker's thread: when the work begins, with each
    item, and with the exception that ended the job, or None.
    """

    def __init__(self, start: "Callable[[Job[T]], Any]") -> None:
        self._start: Callable[[Job[T]], Any] | None = start
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self._is_over = False
        # These events are set when the job has begun, has ended, and is cancelled.
        self.started = threading.Event()
        self.done = threading.Event()
        self._cancelled = threading.Event()
        self.on_begin: Callable[[], object] | None = None
        self.on_item: Callable[[T], object] | None = None
        self.on_end: Callable[[BaseException | None], object] | None = None

    def check(self) -> None:
        """Raise CancelledJob if the job is cancelled. Only the worker's thread calls it."""
        if self._cancelled.is_set():
            raise CancelledJob

    def put(self, item: T) -> None:
        """Hand over an item. Only the worker's thread calls it. Raises CancelledJob if the job is cancelled."""
        self.check()
        if self.on_item is not None:
            self.on_item(item)
        self._put(item)

    def on_loop(self, function: Callable[P, object]) -> Callable[P, None]:
        """Return a function for the worker's thread that calls `function` on the loop, unless the job is cancelled.

        If `function` raises, the job is cancelled and the reader of its items gets the exception.
        """

        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            if self._cancelled.is_set():
                return
            try:
                function(*args, **kwargs)
            except Exception as error:
                # The reader gets the error at once, before items that the worker's thread has scheduled meanwhile.
                self._receive(_End(error))
                self.cancel()

        def schedule(*args: P.args, **kwargs: P.kwargs) -> None:
            self._call_on_loop(partial(call, *args, **kwargs))

        return schedule

    def cancel(self, error: BaseException | None = None) -> None:
        """End the job, from any thread. If an error is given, the reader of the items gets it."""
        if error is not None:
            self._put(_End(error))
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """True after `cancel`."""
        return self._cancelled.is_set()

    @property
    def is_waiting(self) -> bool:
        """True if the job has not begun, and has neither failed nor been cancelled before."""
        return not (self.started.is_set() or self.done.is_set() or self._cancelled.is_set())

    @property
    def is_running(self) -> bool:
        """True if the job has begun and has not ended."""
        return self.started.is_set() and not self.done.is_set()

    async def next(self, timeout: float | None = None) -> T:
        """Return the next item.

        Raises TimeoutError after `timeout` seconds without an item, and StopAsyncIteration at the end.
        """
        item = await asyncio.wait_for(self._items.get(), timeout)
        if not isinstance(item, _End):
            return item
        # The next call must find the end again.
        self._items.put_nowait(item)
        if item.error is not None:
            raise item.error
        raise StopAsyncIteration

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        return await self.next()

    def make(self) -> Any:
        """Make the work, and return it. If that fails, or the job is cancelled, end the job and return None.

        Only the worker's thread calls it.
        """
        # The job must not keep alive what `start` holds, such as a model, after its end.
        start, self._start = self._start, None
        try:
            self.check()
            assert start is not None
            return start(self)
        except BaseException as error:
            self.end(error)
            return None

    def begin(self) -> None:
        """Note that the work begins. Only the worker's thread calls it."""
        self.started.set()
        if self.on_begin is not None:
            self.on_begin()

    def end(self, error: BaseException | None = None) -> None:
        """End the job. Only the worker's thread calls it. The reader of the items gets the error, if there is one."""
        if self.done.is_set():
            return
        self.done.set()
        if self.on_end is not None:
            self.on_end(error)
        # The end must not keep alive what they hold.
        self.on_begin = self.on_item = self.on_end = None
        self._put(_End(None if isinstance(error, CancelledJob) else error))

    def _put(self, item: T | _End) -> None:
        self._call_on_loop(partial(self._receive, item))

    def _receive(self, item: T | _End) -> None:
        """Receive an item on the loop. Ignore items after the first end."""
        if not self._is_over:
            self._is_over = isinstance(item, _End)
            self._items.put_nowait(item)

    def _call_on_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            # The loop is closed, so nobody can read the item.
            self._cancelled.set()


class Schedule(Protocol):
    """The order in which a worker's thread runs its jobs. Only this thread calls it."""

    @property
    def has_work(self) -> bool:
        """True if a turn has something to do."""

    def add(self, job: Job[Any]) -> None:
        """Take in a job."""

    def turn(self) -> None:
        """Do the next piece of work. The thread takes in new jobs between two turns."""

    def close(self) -> None:
        """End all jobs."""


class OneByOne:
    """A schedule of jobs whose work is an iterator of items. They run one after the other."""

    def __init__(self) -> None:
        self._jobs: deque[Job[Any]] = deque()

    @property
    def has_work(self) -> bool:
        """True if a job waits."""
        return bool(self._jobs)

    def add(self, job: Job[Any]) -> None:
        """Let a job wait for its turn."""
        self._jobs.append(job)

    def turn(self) -> None:
        """Run a job from its start to its end."""
        job = self._jobs.popleft()
        job.begin()
        items = job.make()
        if items is None:
            return
        end: BaseException | None = None
        try:
            try:
                for item in items:
                    job.put(item)
            finally:
                # A generator's own clean-up must run on this thread as well.
                if (close := getattr(items, "close", None)) is not None:
                    close()
        except BaseException as error:
            end = error
        job.end(end)

    def close(self) -> None:
        """End the jobs that wait."""
        while self._jobs:
            self._jobs.popleft().end()


_Queue = SimpleQueue[Job[Any] | Callable[[], None] | None]


class Worker:
    """A thread that runs jobs.

    The thread ends with `close`, when the worker is garbage-collected, or with the program.
    """

    def __init__(
        self, name: str, max_waiting: int | None = None, schedule: Schedule | None = None, concurrency: int = 1
    ) -> None:
        """Start the thread.

        `max_waiting` is the largest number of jobs that may wait; None means no limit. `schedule` is the order of the
        jobs, by default `OneByOne`. It runs at most `concurrency` jobs at the same time.
        """
        self._queue: _Queue = SimpleQueue()
        # The largest number of jobs that run or wait, or None.
        self.most = None if max_waiting is None else max_waiting + concurrency
        self._jobs: list[Job[Any]] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=_work, args=[self._queue, schedule or OneByOne()], name=name, daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._queue, self._thread, self._jobs)

    def submit(self, start: Callable[[Job[T]], Any]) -> Job[T]:
        """Queue a job, whose work `start` makes on the thread. The caller must be on a running event loop.

        Raises BusyError if too many jobs wait, and ClosedError after `close`.
        """
        job = Job(start)
        with self._lock:
            self._check_open()
            self._jobs[:] = [other for other in self._jobs if other.is_waiting or other.is_running]
            if self.most is not None and len(self._jobs) >= self.most:
                raise BusyError(f"{len(self._jobs)} generations run or wait, as many as may at once")
            self._jobs.append(job)
            self._queue.put(job)
        return job

    def run(self, function: Callable[[], R]) -> R:
        """Run a function on the thread between two turns, and wait for it. Raises ClosedError after `close`."""
        future: Future[R] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._check_open()
            self._queue.put(call)
        return future.result()

    @property
    def waiting(self) -> int:
        """Number of jobs that have not begun."""
        with self._lock:
            return sum(job.is_waiting for job in self._jobs)

    @property
    def running(self) -> int:
        """Number of jobs that have begun and not ended."""
        with self._lock:
            return sum(job.is_running for job in self._jobs)

    def cancel(self, error: BaseException | None = None, *, waiting_only: bool = False) -> None:
        """End all jobs, or only the waiting jobs. If an error is given, the readers of their items get it."""
        with self._lock:
            self._cancel(error, waiting_only)

    def close(self, *, wait: bool = True) -> None:
        """End all jobs and the thread. The readers of the jobs get a ClosedError.

        The call waits for the thread unless `wait` is False.
        """
        with self._lock:
            if self._end.detach() is not None:
                self._cancel(ClosedError("closed while it generated"))
                self._queue.put(None)
        if wait:
            _join(self._thread)

    def _cancel(self, error: BaseException | None, waiting_only: bool = False) -> None:
        for job in self._jobs:
            if job.is_waiting or (job.is_running and not waiting_only):
                job.cancel(error)

    def _check_open(self) -> None:
        if not self._end.alive:
            raise ClosedError("nothing can be generated: it is closed")


def _work(queue: _Queue, schedule: Schedule) -> None:
    try:
        while _take_in(queue, schedule):
            if schedule.has_work:
                schedule.turn()
        schedule.close()
    finally:
        # MLX may abort the program at its end if a thread ends without this call.
        mx.clear_streams()


def _take_in(queue: _Queue, schedule: Schedule) -> bool:
    """Hand new jobs to the schedule, and run functions. Wait for them if there is no other work.

    Return False at the end of the thread.
    """
    while True:
        try:
            task = queue.get(block=not schedule.has_work)
        except Empty:
            return True
        if task is None:
            return False
        if isinstance(task, Job):
            schedule.add(task)
        else:
            task()
        # The task must not stay alive while the thread waits for the next one.
        del task


def _end(queue: _Queue, thread: threading.Thread, jobs: list[Job[Any]]) -> None:
    for job in jobs:
        job.cancel()
    queue.put(None)
    _join(thread)


def _join(thread: threading.Thread) -> None:
    if thread is not threading.current_thread():
        thread.join()
