"""The schedule of a worker whose jobs are generations: they wait for a place in a batch, and then decode together."""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.errors import ContextLengthError
from mlx_mtp.threads.job_thread import CancelledJob, Job

from .batch import Batch, Step
from .generation import Generation
from .memory_plan import usable_memory

logger = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    job: Job[Any]
    generation: Generation


class Scheduler:
    """A schedule of jobs whose work is a `Generation`. At most `concurrency` of them run at the same time.

    A job's prompt and options are checked when it arrives, so that their errors do not wait. Then the jobs run in the
    order of their arrival, as far as the K/V of all texts fit when they are as long as they may become. They may use
    the memory limit of their model, or what the device recommends. The K/V of earlier prompts give way. A job that is
    cancelled ends before the next turn.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.batch = Batch()
        self._waiting: deque[_Waiting] = deque()
        self._jobs: dict[int, Job[Any]] = {}
        # The number of the text whose wait for memory was logged last.
        self._too_early: int | None = None

    @property
    def has_work(self) -> bool:
        """True if a job waits or runs."""
        return bool(self._waiting or self._jobs)

    def add(self, job: Job[Any]) -> None:
        """Check a job's prompt and options, and let it wait for a place."""
        generation = job.make()
        if generation is None:
            return
        limit = generation.model.memory_limit
        if limit is not None and (needed := self._needed([generation]) - self._held()) > limit:
            job.end(_too_large(generation, needed, limit))
        else:
            self._waiting.append(_Waiting(job, generation))

    def turn(self) -> None:
        """Run one turn of the batch, after jobs were cancelled and others have taken their place.

        If the pass of all texts fails, or the model is closed, all jobs end with the error.
        """
        try:
            self._drop_cancelled()
            while self._waiting and len(self._jobs) < self.concurrency and self._has_room(self._waiting[0].generation):
                self._begin(*self._waiting.popleft())
            if self._jobs:
                self._run()
        except BaseException as error:
            self._fail(error)

    def close(self) -> None:
        """End all jobs."""
        self._fail(None)

    def _drop_cancelled(self) -> None:
        for each in list(self.batch.generations):
            if self._jobs[id(each)].is_cancelled:
                self.batch.remove(each)
                self._end(each, CancelledJob())
        for waiting in [each for each in self._waiting if each.job.is_cancelled]:
            self._waiting.remove(waiting)
            waiting.job.end(CancelledJob())

    def _has_room(self, generation: Generation) -> bool:
        """Return whether the K/V of one more text fit. Those of earlier prompts give way."""
        needed = self._needed([*self.batch.generations, generation])
        given = generation.model.memory_limit
        limit = usable_memory() if given is None else given
        if needed <= limit:
            generation.model.prompt_cache.shrink(limit - needed)
        elif self._jobs:
            if self._too_early != id(generation):
                logger.info(
                    "a text of %d tokens waits: with it, %.3g GB would be in use, and the limit is %.3g GB",
                    generation.memory.tokens,
                    needed / 1e9,
                    limit / 1e9,
                )
            self._too_early = id(generation)
            return False
        # A text alone has its turn: it was checked when it arrived.
        return True

    def _needed(self, generations: Sequence[Generation]) -> int:
        """Return the bytes in use when these texts are as long as they may become, without those of earlier prompts."""
        cached = generations[0].model.prompt_cache.nbytes
        work = max(each.work for each in generations) + sum(each.memory.more_work for each in generations[1:])
        return mx.get_active_memory() - cached + sum(each.growth for each in generations) + work

    def _held(self) -> int:
        """Return the bytes of the K/V of the texts that run."""
        return sum(each.held for each in self.batch.generations)

    def _begin(self, job: Job[Any], generation: Generation) -> None:
        job.begin()
        self._too_early = None
        self._jobs[id(generation)] = job
        self.batch.add(generation)

    def _run(self) -> None:
        with self.batch.generations[0].model.life:
            steps = self.batch.turn()
        for step in steps:
            self._hand_over(step)

    def _hand_over(self, step: Step) -> None:
        """Hand the responses of a step to its job."""
        generation, responses, error = step
        job = self._jobs[id(generation)]
        try:
            for response in responses:
                job.put(response)
        except CancelledJob:
            self.batch.remove(generation)
            # The one that was caught would keep alive this frame, and with it the generation.
            error = CancelledJob()
        if error is not None or generation.is_ended:
            self._end(generation, error)

    def _end(self, generation: Generation, error: Exception | None) -> None:
        self._jobs.pop(id(generation)).end(error)

    def _fail(self, error: BaseException | None) -> None:
        """End all jobs."""
        while self._waiting:
            self._waiting.popleft().job.end(error)
        try:
            self.batch.close()
        except Exception as other:
            logger.warning("the K/V of texts that ended are not kept: %s", other)
        while self._jobs:
            self._jobs.popitem()[1].end(error)


def _too_large(generation: Generation, needed: int, limit: int) -> ContextLengthError:
    return ContextLengthError(
        f"prompt and max_tokens are {generation.memory.tokens} tokens, with which {needed / 1e9:.3g} GB would be in "
        f"use: expected at most the memory limit of {limit / 1e9:.3g} GB"
    )
