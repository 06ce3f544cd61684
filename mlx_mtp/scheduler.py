"""The schedule of a worker whose jobs are generations: they wait for a place in a batch, and then decode together."""

from collections import deque
from typing import Any, NamedTuple

from mlx_mtp.threads.job_thread import CancelledJob, Job

from .batch import Batch, Step
from .generation import Generation


class _Waiting(NamedTuple):
    job: Job[Any]
    generation: Generation


class Scheduler:
    """A schedule of jobs whose work is a `Generation`. At most `concurrency` of them run at the same time.

    A job's prompt and options are checked when it arrives, so that their errors do not wait. Then the jobs run in the
    order of their arrival. A job that is cancelled ends before the next turn.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.batch = Batch()
        self._waiting: deque[_Waiting] = deque()
        self._jobs: dict[int, Job[Any]] = {}

    @property
    def has_work(self) -> bool:
        """True if a job waits or runs."""
        return bool(self._waiting or self._jobs)

    def add(self, job: Job[Any]) -> None:
        """Check a job's prompt and options, and let it wait for a place."""
        generation = job.make()
        if generation is not None:
            self._waiting.append(_Waiting(job, generation))

    def turn(self) -> None:
        """Run one turn of the batch, after jobs were cancelled and others have taken their place."""
        self._drop_cancelled()
        while self._waiting and len(self._jobs) < self.concurrency:
            self._begin(*self._waiting.popleft())
        if self._jobs:
            self._run()

    def close(self) -> None:
        """End all jobs."""
        while self._waiting:
            self._waiting.popleft().job.end()
        self._fail(None)

    def _drop_cancelled(self) -> None:
        for each in list(self.batch.generations):
            if self._jobs[id(each)].is_cancelled:
                self.batch.remove(each)
                self._end(each, CancelledJob())
        for waiting in [each for each in self._waiting if each.job.is_cancelled]:
            self._waiting.remove(waiting)
            waiting.job.end(CancelledJob())

    def _begin(self, job: Job[Any], generation: Generation) -> None:
        job.started.set()
        self._jobs[id(generation)] = job
        self.batch.add(generation)

    def _run(self) -> None:
        try:
            with self.batch.generations[0].model.life:
                steps = self.batch.turn()
        # The pass of all texts failed, or the model is closed.
        except Exception as error:
            self._fail(error)
            return
        for step in steps:
            self._hand_over(step)

    def _hand_over(self, step: Step) -> None:
        """Hand the responses of a step to its job."""
        generation, responses, error = step
        job = self._jobs[id(generation)]
        try:
            for response in responses:
                job.put(response)
        except CancelledJob as cancelled:
            self.batch.remove(generation)
            error = cancelled
        if error is not None or generation.is_ended:
            self._end(generation, error)

    def _end(self, generation: Generation, error: Exception | None) -> None:
        self._jobs.pop(id(generation)).end(error)

    def _fail(self, error: Exception | None) -> None:
        """End all jobs that run."""
        generations = list(self.batch.generations)
        try:
            self.batch.close()
        finally:
            for each in generations:
                self._end(each, error)
