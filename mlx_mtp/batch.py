"""Generations that decode together: turns of prompts and rounds, and the rounds of all texts in one pass."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from mlx_mtp.decoding.draft_length import Choice, Option
from mlx_mtp.decoding.packed import dispatch_packed, finish
from mlx_mtp.decoding.shared_lengths import SharedCosts, SharedLengths

from .generation import Generation
from .responses import GenerationResponse

# While texts decode, this share of the time belongs to their rounds. The rest belongs to the prompts of other texts.
ROUND_SHARE = 0.5
# Every such chunk belongs to the prompt that has waited longest, and the others to the shortest prompts.
_OLDEST_EVERY = 4
# The largest number of texts that decode at the same time, unless the caller sets another one.
DEFAULT_CONCURRENCY = 8


class Step(NamedTuple):
    """The result of a turn for one generation: its new responses, and the error that ended it, if there is one."""

    generation: Generation
    responses: list[GenerationResponse]
    error: Exception | None = None


class Batch:
    """Generations of one model that decode together. They join and leave between turns.

    A turn is one chunk of one prompt, or one round of all texts that decode. The clock decides the order of turns and
    nothing else: each text is what it would be alone. A generation that fails ends alone.
    """

    def __init__(self, generations: Iterable[Generation] = ()) -> None:
        self.generations: list[Generation] = []
        # It is called after each round with the number of rows of each text.
        self.on_round: Callable[[list[int]], object] | None = None
        self._lengths = SharedLengths()
        self._chunks = 0
        # The seconds of rounds that are due before the next chunk.
        self._due = 0.0
        for each in generations:
            self.add(each)

    def add(self, generation: Generation) -> None:
        """Let a generation take part from the next turn on. It waits for others that read the same beginning."""
        for other in self.generations:
            generation.share(other)
        self.generations.append(generation)

    def remove(self, generation: Generation) -> None:
        """Close a generation, unless it has ended."""
        if generation in self.generations:
            self.generations.remove(generation)
            generation.close()
            for index, waiting in enumerate(self.generations):
                for other in self.generations[:index]:
                    waiting.share(other)

    def close(self) -> None:
        """Close all generations, also if one of them fails to close."""
        with ExitStack() as stack:
            for each in self.generations:
                stack.callback(each.close)
            self.generations.clear()

    def turn(self) -> list[Step]:
        """Read a chunk of a prompt, or run a round of all texts that decode. Close the generations that end."""
        reading = [each for each in self.generations if each.is_reading and not each.is_held]
        decoding = [each for each in self.generations if not each.is_reading]
        began = time.perf_counter()
        if reading and (not decoding or self._due <= 0):
            for each in decoding:
                each.pause()
            following = self._next_prompt(reading)
            steps = [self._step(following, following.read_chunk)]
            if decoding:
                self._due = (time.perf_counter() - began) * ROUND_SHARE / (1 - ROUND_SHARE)
        else:
            steps = self._round(decoding)
            self._due -= time.perf_counter() - began
            if self.on_round is not None:
                self.on_round([step.generation.decoding.drafted + 1 for step in steps])
        return steps

    def _next_prompt(self, reading: list[Generation]) -> Generation:
        """Return the generation whose prompt has its next chunk now."""
        self._chunks += 1
        if not self._chunks % _OLDEST_EVERY:
            return reading[0]
        return min(reading, key=lambda each: each.unread)

    def _round(self, decoding: list[Generation]) -> list[Step]:
        """Run a round of all texts that decode."""
        if len(decoding) == 1:
            return [self._step(decoding[0], decoding[0].round)]
        in_flight = [each for each in decoding if each.stream.in_flight]
        if in_flight and len(in_flight) < len(decoding):
            # A text has joined since their last round.
            return [self._step(each, each.settle) for each in in_flight]
        errors = [None] * len(decoding) if in_flight else self._dispatch(decoding)
        self._dispatch_ahead([each for each, error in zip(decoding, errors, strict=True) if error is None])
        results = [
            error or finish(each.stream, each.decoding.stop_ids) for each, error in zip(decoding, errors, strict=True)
        ]
        return [
            self._ended(each, [], result)
            if isinstance(result, Exception)
            else self._step(each, partial(each.take, result))
            for each, result in zip(decoding, results, strict=True)
        ]

    def _dispatch(self, decoding: list[Generation]) -> list[Exception | None]:
        """Dispatch the next round of each text. Return the exceptions of those whose round failed."""
        options = [each.option() for each in decoding]
        choices = self._choices(decoding, options, self._shared_costs(decoding, options))
        return dispatch_packed([each.stream for each in decoding], choices, decoding[0].compiled)

    def _dispatch_ahead(self, decoding: list[Generation]) -> None:
        """Dispatch the rounds after those in flight, if none must wait for a report, and if this costs less."""
        found = [each.following() for each in decoding]
        options = [each for each in found if each is not None]
        if not options or len(options) < len(decoding):
            return
        costs = self._shared_costs(decoding, options)
        if costs.ahead if costs is not None else all(option.choice.ahead for option in options):
            choices = self._choices(decoding, options, costs)
            # The host has no part in these rounds, so that none of them fails alone.
            dispatch_packed([each.stream for each in decoding], choices, decoding[0].compiled)

    def _shared_costs(self, decoding: list[Generation], options: list[Option]) -> SharedCosts | None:
        """Return the costs of passes for all, or None if every text has a fixed number of draft tokens."""
        costs = next((option.costs for option in options if option.costs is not None), None)
        return None if costs is None else decoding[0].model.parts.costs.shared(costs)

    def _choices(self, decoding: list[Generation], options: list[Option], costs: SharedCosts | None) -> list[Choice]:
        """Choose the next round of each text."""
        if costs is None:
            return [option.choice for option in options]
        keys = [id(each) for each in decoding]
        return list(self._lengths.choose(costs, dict(zip(keys, options, strict=True))).values())

    def _step(self, generation: Generation, step: Callable[[], Iterator[GenerationResponse]]) -> Step:
        """Run a step of one generation."""
        responses: list[GenerationResponse] = []
        try:
            responses.extend(step())
        except Exception as error:
            return self._ended(generation, responses, error)
        return self._ended(generation, responses) if generation.is_ended else Step(generation, responses)

    def _ended(
        self, generation: Generation, responses: list[GenerationResponse], error: Exception | None = None
    ) -> Step:
        """Close a generation after its last step."""
        try:
            self.remove(generation)
        except Exception as failure:
            error = error or failure
        return Step(generation, responses, error)


def together(waiting: Sequence[Generation], concurrency: int) -> Generator[tuple[int, GenerationResponse], None, None]:
    """Run generations, at most `concurrency` at the same time. Yield pairs of a generation's index and a response.

    If one fails, all end, and its error is raised.
    """
    indices = {id(each): index for index, each in enumerate(waiting)}
    # A generation that has ended must not stay alive.
    following = deque(waiting)
    del waiting
    batch = Batch()
    try:
        while following or batch.generations:
            while following and len(batch.generations) < concurrency:
                batch.add(following.popleft())
            for generation, responses, error in batch.turn():
                index = indices[id(generation)]
                del generation
                for response in responses:
                    yield index, response
                if error is not None:
                    raise error
    finally:
        batch.close()
