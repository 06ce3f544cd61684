"""Draft length: the number of draft tokens per round that gives the most tokens per second.

The choice depends on the cost of rounds and on the acceptance so far.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

from .copy_index import CopyIndex
from .report import RoundReport

# This is the largest number of draft tokens of the drafter in a round of automatic draft length, of any draft tokens in
# a round of an exact model, and of the requests to a server.
MAX_DRAFT_TOKENS = 8
# These are the numbers of tokens that a round may copy from the text. A Mac computes up to 32 rows for one price.
COPY_LENGTHS = (2, 4, 7, 15, 31)
# Streams have room for this number of draft tokens in a round, so that they can exchange their K/V. Those of an exact
# model have less, and a generation may ask for more (see `options.LARGEST_DRAFT`).
LARGEST_COPY = COPY_LENGTHS[-1]
# Prior weights in rounds: one for the first position, one for each later position. A later position is expected to
# accept about the same share as the position before it.
_PRIOR_WEIGHT = 1.0
_LIKENESS = 8.0
# This is the expected acceptance rate at the first position, and the additional weight of this prior at the start. The
# rate is high, because a good drafter that is not tried costs more than a bad drafter that is tried.
_EXPECTED = 0.75
_FIRST_WEIGHT = 2.0
# This share of the counts is left after each further round, because the segments of a text differ.
_MEMORY = 0.93
# Another number of draft tokens, except 0, must promise this factor in tokens per second.
_GAIN = 1.03
# Trials of the drafter may lose this share of the time while plain decoding is faster. The first value applies at the
# start, the last value after repeated failures.
_FIRST_TRIALS = 0.02
_LAST_TRIALS = 0.005
# This share of the earlier counts is left at the start of a trial.
_MEMORY_OF_TRIALS = 0.7


class CostCurve(NamedTuple):
    """Costs of rounds on one machine, in seconds.

    `verify[k]` is the cost of a round that only verifies k + 1 rows. `draft` is the cost of one draft step. `overhead`
    is the additional cost of a round that drafts, for any number of draft tokens.
    """

    verify: list[float]
    draft: float
    overhead: float = 0.0

    def round(self, k: int) -> float:
        """Return the cost of a round of k draft tokens."""
        return self.verify[k] + (k * self.draft + self.overhead if k else 0)


class Costs(NamedTuple):
    """The costs of rounds in both ways: `waiting` for the report of the round before, and dispatched `ahead` of it.

    `ahead` is None if rounds cannot be dispatched ahead. The cheaper way of each number of draft tokens counts.
    `copied[k]` is the cost of a round that waits and verifies k copied tokens. It is empty if nothing can be copied.
    """

    waiting: CostCurve
    ahead: CostCurve | None = None
    copied: tuple[float, ...] = ()

    def round(self, k: int) -> float:
        """Return the cost of a round of k draft tokens, in seconds."""
        waiting = self.waiting.round(k)
        return waiting if self.ahead is None else min(waiting, self.ahead.round(k))

    def as_json(self) -> dict[str, Any]:
        """Return the costs as values of JSON, by name."""
        ahead = None if self.ahead is None else self.ahead._asdict()
        return {"waiting": self.waiting._asdict(), "ahead": ahead, "copied": list(self.copied)}

    def is_ahead(self, k: int) -> bool:
        """Return whether rounds of k draft tokens cost less if they are dispatched ahead."""
        return self.ahead is not None and self.ahead.round(k) < self.waiting.round(k)


class Choice(NamedTuple):
    """The choice for a round: `k` draft tokens, and whether it is dispatched ahead.

    A round ahead is dispatched before the report of the round before it is read, so that the device does not wait for
    the host. `copied` are the k draft tokens if they are copied from the text; else the drafter drafts.
    """

    k: int
    ahead: bool
    copied: list[int] | None = None


class Option(NamedTuple):
    """The rounds that a text can have.

    `choice` is the choice of its own policy. `expected[k]` is the expected number of tokens of a round of k draft
    tokens, for the numbers that its policy leaves open; it is empty if the choice is fixed. `copied` is the expected
    number of tokens if the choice copies draft tokens, or 0 if it is fixed. `costs` are those by which the policy
    chooses.
    """

    choice: Choice
    expected: tuple[float, ...] = ()
    copied: float = 0.0
    costs: Costs | None = None

    def tokens(self, k: int) -> float:
        """Return the expected number of tokens of a round of k draft tokens."""
        if self.choice.copied and self.copied and k == self.choice.k:
            return self.copied
        # Nothing is known about the drafts of a fixed number of tokens. All texts must have them anyway.
        return self.expected[k] if k < len(self.expected) else 1.0


class DraftPolicy:
    """A policy that chooses the rounds of one text. Here, the number of draft tokens is always the same."""

    def __init__(self, k: int, *, ahead: bool = False) -> None:
        self.k = k
        self.ahead = ahead

    def choose(self, in_flight: int = 0) -> Choice:
        """Choose the next round, while `in_flight` rounds are not reported yet."""
        return Choice(self.k, self.ahead)

    def option(self, most: int) -> Option:
        """Return the next round of this text among others, with at most `most` draft tokens."""
        choice = self.choose()
        return Option(choice._replace(k=min(choice.k, most)))

    @property
    def untimed(self) -> "DraftPolicy":
        """The policy for rounds that cannot be timed, because they run together with those of other texts."""
        return self

    @property
    def copy_index(self) -> CopyIndex | None:
        """The index of the text, or None if the policy does not copy from it."""
        return None

    def resume(self, copy_index: CopyIndex) -> None:
        """Use the index of an earlier text, so that their common beginning is not read again. Call it before `start`.

        The index is not changed.
        """

    def start(self, tokens: Sequence[int]) -> None:
        """Prepare the first round. The text begins with these tokens, which include the prompt."""

    def use(self, costs: Costs) -> None:
        """Choose by these costs from now on."""
        self.ahead = costs.is_ahead(self.k)

    def tokens_per_second(self) -> float | None:
        """Return the expected tokens per second of the best round without copies, or None if no cost is known."""
        return None

    def update(self, report: RoundReport, seconds: float | None) -> None:
        """Record the result of a round, and choose the next round.

        `seconds` is the time since the last report. It is None if it says nothing about the round.
        """

    def end(self) -> None:
        """Release all that the policy holds. The text has ended."""


class DraftLength(DraftPolicy):
    """A policy that chooses the k with the most tokens per second.

    The policy estimates the acceptance at each draft position from the last rounds. k maximizes the expected tokens per
    second, E(k) / cost(k). If no k > 0 promises more than plain decoding, k is 0. The drafter is then tried again with
    one draft token, at intervals that grow, and that are short if such a trial loses little. There are no trials if
    drafting cannot pay even when all draft tokens are accepted. Nothing is timed here: the same costs and the same text
    give the same choices.
    """

    def __init__(self, costs: Costs) -> None:
        super().__init__(0)
        self._trials = [0.0] * (len(costs.waiting.verify) - 1)
        self._hits = [0.0] * len(self._trials)
        # Start with a prior, so that a few early rejections do not end drafting. The prior fades like all other counts.
        if self._trials:
            self._trials[0], self._hits[0] = _FIRST_WEIGHT, _FIRST_WEIGHT * _EXPECTED
        self.use(costs)
        # Start with one draft token, because a useless drafter costs least then.
        self.k = min(1, self.k)

    def choose(self, in_flight: int = 0) -> Choice:
        """Choose the next round. The reports of rounds in flight do not count yet."""
        return Choice(self.k, self.costs.is_ahead(self.k))

    def option(self, most: int) -> Option:
        """Return the draft lengths among which several texts choose together."""
        expected = tuple(self._expected_tokens()[: most + 1])
        return super().option(most)._replace(expected=expected, costs=self.costs)

    def use(self, costs: Costs) -> None:
        """Choose by these costs from now on. The counts of accepted draft tokens stay."""
        self.costs = costs
        self._lost_share, self._left = _FIRST_TRIALS, 0.0
        self._plan_trial()
        # This is true if some number of draft tokens pays when all of them are accepted.
        self._can_pay = any((k + 1) * costs.round(0) > costs.round(k) for k in range(1, len(self._trials) + 1))
        self.k = self._best()

    def update(self, report: RoundReport, seconds: float | None) -> None:
        """Record the result of a round, and choose k for the next round. Its own time does not matter.

        Copied draft tokens say nothing about the drafter.
        """
        if report.copied:
            return
        if not report.drafted:
            # If k is not 0 here, the round had no room for draft tokens.
            if not self.k and self._can_pay:
                self._left -= 1
                if self._left <= 0:
                    self._forget(_MEMORY_OF_TRIALS)
                    self.k = 1
            return
        self._forget(_MEMORY)
        for position in range(len(self._trials)):
            if position < min(report.drafted, report.accepted + 1):
                self._trials[position] += 1
                self._hits[position] += position < report.accepted
        best = self._best()
        if best:
            self.k, self._lost_share = best, _FIRST_TRIALS
        elif self.k > 1 or not report.accepted:
            self.k = 0
            self._plan_trial()
            self._lost_share = max(self._lost_share / 2, _LAST_TRIALS)

    def acceptance(self) -> list[float]:
        """Return the estimated acceptance rate at each draft position.

        A draft token counts at its position only if all draft tokens before it were accepted.
        """
        shares: list[float] = []
        for trials, hits in zip(self._trials, self._hits, strict=True):
            expected, weight = (shares[-1], _LIKENESS) if shares else (_EXPECTED, _PRIOR_WEIGHT)
            shares.append((hits + weight * expected) / (trials + weight))
        return shares

    def _plan_trial(self) -> None:
        """Set the number of plain rounds before the next trial.

        A trial costs more than a plain round, and gains a token if it is accepted. It may lose a share of the time
        until the next trial, so a drafter that nearly pays is tried often. A useless one is not: the gain has no prior.
        """
        if self._trials:
            gain = self._hits[0] / (self._trials[0] + 1)
            loss = self.costs.round(1) / self.costs.round(0) - 1 - gain
            self._left = max(1.0, loss / self._lost_share)

    def _forget(self, kept_share: float) -> None:
        self._trials = [trials * kept_share for trials in self._trials]
        self._hits = [hits * kept_share for hits in self._hits]

    def tokens_per_second(self) -> float:
        """Return the expected tokens per second of the best number of draft tokens. The next round may be a trial."""
        return max(self._rates())

    def _rates(self) -> list[float]:
        """Return the expected tokens per second for each number of draft tokens."""
        return [tokens / self.costs.round(k) for k, tokens in enumerate(self._expected_tokens())]

    def _expected_tokens(self) -> list[float]:
        """Return the expected tokens of a round for each number of draft tokens."""
        return list(accumulate(accumulate(self.acceptance(), mul), initial=1.0))

    def _best(self) -> int:
        """Return the best k by the current estimates.

        The current k stays if the gain of another k is too small. If plain decoding is best, k is always 0.
        """
        rates = self._rates()
        best = max(range(len(rates)), key=rates.__getitem__)
        return self.k if self.k and best and rates[best] < _GAIN * rates[self.k] else best
