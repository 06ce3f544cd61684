"""The worker thread of an event loop: order, limits, cancelling, errors, and its end."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_mtp import BusyError, ClosedError
from mlx_mtp.threads.job_thread import Job, Worker

Start = Callable[[Job[Any]], Iterator[Any]]


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test", max_waiting=2)
    yield worker
    worker.close()


def count(n: int) -> Start:
    return lambda job: iter(range(n))


class Steps:
    """A job that makes its next item on request. It records its start, its end and its thread."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.begun, self.ended = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self, job: Job[int]) -> Iterator[int]:
        self.thread = threading.current_thread()
        self.begun.set()
        try:
            for index in range(100):
                self.go.acquire(timeout=10)
                yield index
        finally:
            self.ended.set()


async def items(job: Job[Any]) -> list[Any]:
    return [item async for item in job]


def test_jobs_run_one_after_the_other_on_one_thread(worker: Worker) -> None:
    seen = []

    def note(name: str) -> Start:
        def start(job: Job[str]) -> Iterator[str]:
            for _ in range(3):
                seen.append((name, threading.current_thread().name))
                yield name

        return start

    async def main() -> None:
        jobs = [worker.submit(note(name)) for name in "abc"]
        # The results are read in another order than the jobs were submitted in.
        assert [await items(job) for job in reversed(jobs)] == [["c"] * 3, ["b"] * 3, ["a"] * 3]
        # A repeated read of a finished job returns nothing.
        assert await items(jobs[0]) == []

    asyncio.run(main())
    assert seen == [(name, "test") for name in "aaabbbccc"]
    assert worker.run(lambda: threading.current_thread().name) == "test"
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 // 0)


def test_so_many_may_wait_and_no_more(worker: Worker) -> None:
    async def main() -> None:
        steps = Steps()
        first = worker.submit(steps)
        waiting = [worker.submit(count(2)) for _ in range(2)]
        await asyncio.to_thread(steps.begun.wait, 10)
        assert (worker.running, worker.waiting) == (1, 2)
        with pytest.raises(BusyError, match="3 generations run or wait, as many as may at once"):
            worker.submit(count(2))
        waiting[0].cancel()
        assert worker.waiting == 1
        last = worker.submit(count(2))
        first.cancel()
        steps.go.release()
        assert await items(waiting[0]) == []
        assert await items(waiting[1]) == await items(last) == [0, 1]
        assert (worker.running, worker.waiting) == (0, 0)

    asyncio.run(main())


def test_cancelling_before_the_start_and_between_items(worker: Worker) -> None:
    async def main() -> None:
        steps, never = Steps(), Steps()
        first, second = worker.submit(steps), worker.submit(never)
        second.cancel()
        steps.go.release()
        assert await first.next() == 0
        with pytest.raises(TimeoutError):
            await first.next(timeout=0.01)
        first.cancel()
        steps.go.release()
        assert await items(first) == []
        assert await items(second) == []
        # The first iterator was closed on the thread. The other one never started.
        assert steps.ended.is_set()
        assert never.thread is None

    asyncio.run(main())


def test_cancelling_where_nothing_is_yielded_yet(worker: Worker) -> None:
    """The prefill of a long prompt calls `check` between its chunks."""
    chunks, go, begun = [], threading.Semaphore(0), threading.Event()

    def read(job: Job[int]) -> Iterator[int]:
        begun.set()
        for chunk in range(100):
            go.acquire(timeout=10)
            job.check()
            chunks.append(chunk)
        yield 1

    async def main() -> None:
        job = worker.submit(read)
        assert await asyncio.to_thread(begun.wait, 10)
        job.cancel()
        go.release()
        assert await items(job) == []

    asyncio.run(main())
    assert chunks == []


def test_errors_reach_whoever_waits(worker: Worker) -> None:
    def fail(job: Job[int]) -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    def fail_at_once(job: Job[int]) -> Iterator[int]:
        raise KeyError("at once")

    async def main() -> None:
        job = worker.submit(fail)
        assert await job.next() == 1
        for _ in range(2):
            with pytest.raises(KeyError, match="lost"):
                await job.next()
        with pytest.raises(KeyError, match="at once"):
            await items(worker.submit(fail_at_once))
        steps = Steps()
        job = worker.submit(steps)
        await asyncio.to_thread(steps.begun.wait, 10)
        worker.cancel(ClosedError("enough"))
        # The error comes at once, before the job reaches its next item.
        with pytest.raises(ClosedError, match="enough"):
            await job.next()
        steps.go.release()
        assert await asyncio.to_thread(steps.ended.wait, 10)

    asyncio.run(main())


def test_only_those_that_wait_are_cancelled(worker: Worker) -> None:
    async def main() -> None:
        steps = Steps()
        first, second = worker.submit(steps), worker.submit(count(2))
        await asyncio.to_thread(steps.begun.wait, 10)
        worker.cancel(ClosedError("going down"), waiting_only=True)
        with pytest.raises(ClosedError, match="going down"):
            await second.next()
        steps.go.release()
        assert await first.next() == 0
        first.cancel()
        steps.go.release()

    asyncio.run(main())


def test_functions_called_on_the_loop(worker: Worker) -> None:
    """They run before the next items. Their exceptions end the job."""
    seen: list[object] = []

    def note(at: int) -> None:
        seen.append((at, threading.current_thread() is threading.main_thread()))
        if at == 2:
            raise KeyError("the callback's own")

    def start(job: Job[int]) -> Iterator[int]:
        report = job.on_loop(note)
        for index in range(1000):
            report(index)
            yield index
            while index == 2:
                job.check()

    async def main() -> None:
        job = worker.submit(start)
        for index in range(2):
            assert await job.next() == index
            assert (index, True) in seen
        with pytest.raises(KeyError, match="the callback's own"):
            await items(job)

    asyncio.run(main())
    assert seen == [(index, True) for index in range(3)]


def test_what_a_function_on_the_loop_raises_comes_first(worker: Worker) -> None:
    """The exception comes first even if the job has already ended."""

    def refuse() -> None:
        raise KeyError("the window is closed")

    def start(job: Job[int]) -> Iterator[int]:
        job.on_loop(refuse)()
        yield from range(3)

    async def main() -> None:
        job = worker.submit(start)
        # The loop is busy until the job is done.
        assert job.done.wait(10)
        for _ in range(2):
            with pytest.raises(KeyError, match="the window is closed"):
                await job.next()

    asyncio.run(main())


def test_a_loop_that_is_closed_ends_its_jobs(worker: Worker) -> None:
    steps = Steps()

    async def main() -> None:
        assert await worker.submit(count(1)).next() == 0
        worker.submit(steps)

    asyncio.run(main())
    for _ in range(2):
        steps.go.release()
    assert steps.ended.wait(10)
    # Another loop can use the same thread.
    assert asyncio.run(_one(worker)) == [0, 1]


async def _one(worker: Worker) -> list[int]:
    return await items(worker.submit(count(2)))


def test_closing(worker: Worker) -> None:
    async def main() -> None:
        steps = Steps()
        jobs = [worker.submit(steps), worker.submit(count(2))]
        await asyncio.to_thread(steps.begun.wait, 10)
        # The first call does not wait, as in a callback of the running job. The second call waits for the thread.
        worker.close(wait=False)
        # Released before, the job could make both items, and then wait for a third until its time is over.
        steps.go.release(2)
        worker.close()
        assert steps.thread is not None
        assert not steps.thread.is_alive()
        for job in jobs:
            with pytest.raises(ClosedError, match="closed while it generated"):
                await items(job)
        for use in (lambda: worker.submit(count(1)), lambda: worker.run(int)):
            with pytest.raises(ClosedError, match="nothing can be generated: it is closed"):
                use()

    asyncio.run(main())


def test_what_a_job_holds_is_let_go_of(worker: Worker) -> None:
    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)

    async def main(held: Big) -> Job[Big]:
        job: Job[Any] = worker.submit(lambda job: iter([held]))
        await items(job)
        return job

    job = asyncio.run(main(big))
    # After the start of the next job, the thread no longer holds this job.
    worker.run(lambda: None)
    del big
    gc.collect()
    assert gone() is None
    assert job.done.is_set()


def test_a_worker_that_nobody_holds_ends() -> None:
    worker = Worker("lost")
    thread = worker.run(threading.current_thread)
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("end", ["", "worker.close()", "del worker", "raise SystemExit"])
def test_the_program_ends_while_it_runs(end: str) -> None:
    """MLX does not abort although the thread used its streams. The program does not wait for the whole job."""
    code = f"""
import asyncio, itertools, mlx.core as mx
from mlx_mtp.threads.job_thread import Worker
worker = Worker("busy")
def start(job):
    for i in itertools.count():
        x = mx.random.normal((64, 64))
        mx.eval(x @ x)
        yield i
async def main():
    job = worker.submit(start)
    for _ in range(3):
        await job.next()
asyncio.run(main())
print("over")
{end}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "over\n", "")
