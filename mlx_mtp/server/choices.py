"""Several answers to one request, which are generated together: the choices of OpenAI's API."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlx_mtp.responses import GenerationResponse

from .answers import JsonObject, usage
from .openai_answers import ChatWriter, CompletionWriter
from .service import GenerationJob, Prefill


class ChoiceResponse(NamedTuple):
    """A response of one choice, which is named by its index."""

    choice: int
    response: GenerationResponse


class ChoicesJob:
    """The items of several jobs as those of one: the responses of all, and the progress of the first prompt."""

    def __init__(self, jobs: Sequence[GenerationJob]) -> None:
        self._jobs = jobs
        self._going = set(range(len(jobs)))
        self._tasks: dict[asyncio.Task[GenerationResponse | Prefill], int] = {}

    async def next(self, timeout: float | None = None) -> ChoiceResponse | Prefill:
        """Return the next item.

        Raises TimeoutError after `timeout` seconds without an item, and StopAsyncIteration at the end of all jobs.
        """
        while self._going:
            for index in self._going - set(self._tasks.values()):
                self._tasks[asyncio.ensure_future(self._jobs[index].next())] = index
            done, _ = await asyncio.wait(self._tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError
            task = next(iter(done))
            index = self._tasks.pop(task)
            try:
                item = task.result()
            except StopAsyncIteration:
                self._going.discard(index)
                continue
            if not isinstance(item, Prefill):
                return ChoiceResponse(index, item)
            if index == 0:
                return item
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End all jobs."""
        for task in self._tasks:
            task.cancel()
        for job in self._jobs:
            job.cancel()


class ChoicesWriter:
    """Writer of an answer with several choices, each of which has a writer of its own."""

    def __init__(self, writers: Sequence[ChatWriter | CompletionWriter]) -> None:
        self._writers = writers
        for index, writer in enumerate(writers):
            writer.index, writer.id, writer.created = index, writers[0].id, writers[0].created

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""
        for writer in self._writers:
            yield from writer.begin()

    def add(self, item: ChoiceResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        writer = self._writers[item.choice]
        yield from writer.add(item.response)
        if item.response.finish_reason is not None:
            yield from writer.finish()

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""
        yield from self._writers[0].close(self._usage())

    def fail(self, error: JsonObject) -> Iterator[str]:
        """Yield the events of an error, in place of the end."""
        return self._writers[0].fail(error)

    def alive(self, comment: str) -> str:
        """Return a sign of life for a stream without new tokens."""
        return self._writers[0].alive(comment)

    def whole(self) -> JsonObject:
        """Return the whole answer as one JSON object."""
        bodies = [writer.whole() for writer in self._writers]
        stats = {"stats": [body["stats"] for body in bodies]} if "stats" in bodies[0] else {}
        choices = [choice for body in bodies for choice in body["choices"]]
        return bodies[0] | {"choices": choices, "usage": self._usage()} | stats

    def _usage(self) -> JsonObject:
        """Return the token counts: those of the prompt once, and those of all choices."""
        counts = [usage(writer.answer) for writer in self._writers]
        total = counts[0]
        details = total["completion_tokens_details"]
        for other in counts[1:]:
            total["completion_tokens"] += other["completion_tokens"]
            for name, count in other["completion_tokens_details"].items():
                details[name] += count
        total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
        return total
