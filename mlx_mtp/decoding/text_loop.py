"""The decode loop of one text, from its prompt to its end."""

import time
from collections.abc import Generator

from mlx_mtp.errors import ContextLengthError, PromptError

from .draft_length import Choice, DraftPolicy, Option
from .prefill import Progress
from .report import RoundReport
from .stream import Stream, can_go_ahead


class Decoding:
    """The decoding of one text, which its caller moves on step by step.

    Call `read_chunk` while `is_reading` is true. Then run rounds until `is_ended` is true: `round` runs one, and so do
    `option`, `following` and `take` around a round that the caller runs for several texts. Call `end` at the end of it
    all, also after a failure.

    `policy` chooses the rounds. With `keeps_lengths`, it does so beside other texts as well, because the text depends
    on its draft lengths. Otherwise all texts choose together, see `SharedLengths`. The text ends after a stop token,
    which is emitted, or after `max_tokens` tokens (see `token_budget`).
    """

    def __init__(
        self,
        stream: Stream,
        prompt: list[int],
        *,
        max_tokens: int,
        policy: DraftPolicy,
        stop_ids: frozenset[int],
        prefill_step_size: int,
        on_prefill: Progress | None = None,
        keeps_lengths: bool = False,
    ) -> None:
        self.stream = stream
        self.prompt = prompt
        self.policy = policy
        self.stop_ids = stop_ids
        self.is_reading = True
        # The number of draft tokens of the last round.
        self.drafted = 0
        self.is_ended = False
        self._step_size = prefill_step_size
        self._on_prefill = on_prefill
        self._remaining = max_tokens
        self._keeps_lengths = keeps_lengths
        # The next round, if it was chosen before the report of the last one.
        self._planned: Choice | None = None
        # The time of the last report. It is None if other work ran since then.
        self._reported: float | None = None

    @property
    def unread(self) -> int:
        """The number of tokens of the prompt that are not read yet."""
        return len(self.prompt) - self.stream.cache.length if self.is_reading else 0

    def read_chunk(self) -> RoundReport | None:
        """Read the next chunk of the prompt. After the last one, return the report of the first token."""
        logits = self.stream.read_chunk(self.prompt, self._step_size, self._on_prefill)
        if logits is None:
            return None
        report = self.stream.choose_first(logits)
        self.is_reading = False
        self.policy.start(self.stream.tokens)
        self._count(report)
        self._reported = time.perf_counter()
        return report

    def round(self) -> RoundReport:
        """Run the next round alone. The round after it may be dispatched as well, and is then in flight."""
        resumed = time.perf_counter()
        self._dispatch()
        report = self.stream.finish(self.stop_ids)
        before, self._reported = self._reported, time.perf_counter()
        seconds = None
        # The caller may take longer than the round. The time then says nothing about the round.
        if before is not None and resumed - before <= self._reported - resumed:
            seconds = self._reported - before
        self.policy.update(report, seconds)
        self._count(report)
        return report

    def pause(self) -> None:
        """Let other work run before the next round, whose time then says nothing about it."""
        self._reported = None

    def settle(self) -> RoundReport | None:
        """Finish the round in flight, if there is one, and dispatch no other. Return its report."""
        if not self.stream.in_flight:
            return None
        if self._keeps_lengths:
            # Alone, the round after it would be chosen now, before its report.
            (k,) = self.stream.in_flight
            self._planned = self._following(self.policy.untimed, k)
        report = self.stream.finish(self.stop_ids)
        self.take(report)
        return report

    def option(self) -> Option:
        """Return the next round that this text can have together with those of other texts. None may be in flight."""
        if not self._keeps_lengths:
            return self.policy.untimed.option(self.most_drafts)
        choice, self._planned = self._planned or self.policy.untimed.choose(), None
        return Option(choice._replace(k=min(choice.k, self.most_drafts)))

    def following(self) -> Option | None:
        """Return the round after the one in flight, or None if it must wait for the report.

        Call this method once for each round with other texts, while it is in flight.
        """
        (k,) = self.stream.in_flight
        if self._keeps_lengths:
            # Alone, it would be chosen now.
            self._planned = self._following(self.policy.untimed, k)
            return None if self._planned is None else Option(self._planned)
        most = min(self._remaining - (k + 1) - 1, self.stream.longest_draft())
        if most < 0:
            return None
        option = self.policy.untimed.option(most)
        # Copied tokens depend on the report.
        longest = max(option.choice.k, len(option.expected) - 1)
        return None if option.choice.copied or not can_go_ahead(self.stream, k, longest) else option

    def take(self, report: RoundReport) -> None:
        """Record a round that ran together with those of other texts."""
        self._reported = None
        self.policy.untimed.update(report, None)
        self._count(report)

    @property
    def most_drafts(self) -> int:
        """The largest number of draft tokens for the next round.

        A round yields up to k + 1 tokens. It never drafts more tokens than may still be emitted.
        """
        return min(self._remaining - 1, self.stream.longest_draft())

    def end(self) -> None:
        """Forget the round in flight, and release what the policy holds."""
        self.is_ended = True
        self.stream.discard()
        self.policy.end()

    def _count(self, report: RoundReport) -> None:
        self.drafted = report.drafted
        self._remaining -= len(report.tokens)
        self.is_ended = not self._remaining or report.tokens[-1] in self.stop_ids

    def _dispatch(self) -> None:
        """Dispatch the next round, and maybe the round after it."""
        stream = self.stream
        planned, self._planned = self._planned, None
        if not stream.in_flight:
            choice = planned or self.policy.choose()
            stream.dispatch(min(choice.k, self.most_drafts), choice.copied)
        (k,) = stream.in_flight
        following = self._following(self.policy, k)
        if following is not None:
            stream.dispatch(following.k)

    def _following(self, policy: DraftPolicy, k: int) -> Choice | None:
        """Return the round that may be dispatched ahead of the report of a round of k draft tokens, or None.

        Whatever is accepted of the round in flight, the round after it is the same.
        """
        following = policy.choose(in_flight=1)
        has_room = following.k < self._remaining - (k + 1)
        return following if following.ahead and has_room and can_go_ahead(self.stream, k, following.k) else None


def decode(
    stream: Stream,
    prompt: list[int],
    *,
    max_tokens: int,
    num_draft_tokens: int | DraftPolicy,
    stop_ids: frozenset[int],
    prefill_step_size: int,
    on_prefill: Progress | None = None,
) -> Generator[RoundReport, None, None]:
    """Decode from a prompt of token ids, and yield the result of each round.

    `num_draft_tokens` is the number of draft tokens in a round, or a policy that chooses it. The first item is the
    result of prefill (drafted = accepted = 0). See `Decoding` for the other parameters.
    """
    decoding = Decoding(
        stream,
        prompt,
        max_tokens=max_tokens,
        policy=DraftPolicy(num_draft_tokens) if isinstance(num_draft_tokens, int) else num_draft_tokens,
        stop_ids=stop_ids,
        prefill_step_size=prefill_step_size,
        on_prefill=on_prefill,
    )
    try:
        while decoding.is_reading:
            if (first := decoding.read_chunk()) is not None:
                yield first
        while not decoding.is_ended:
            yield decoding.round()
    finally:
        decoding.end()


def token_budget(prompt: list[int], max_tokens: int, max_context: int) -> int:
    """Return the largest number of tokens that may follow a prompt.

    This is `max_tokens`, or the rest of the context if that is smaller.

    Raises PromptError if the prompt is empty. Raises ContextLengthError if the prompt leaves no room.
    """
    if not prompt:
        raise PromptError("the prompt is empty: expected at least one token")
    if len(prompt) >= max_context:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens, but the context holds {max_context} with the answer"
        )
    return min(max_tokens, max_context - len(prompt))
