"""How many tokens to draft next: what makes most tokens per second, by what rounds cost and what was accepted."""

from typing import NamedTuple

# Most draft tokens of a round.
MAX_DRAFT_TOKENS = 8
# Weight of what is expected of a draft position, in rounds, against what was seen there: of the first, and of one that
# is expected to be like the one before it. About as many are accepted at each.
_PRIOR_WEIGHT = 1.0
_LIKENESS = 8.0
# What the first position is expected to be accepted with, and the weight of that at the beginning, in addition. High,
# because a good drafter that is not tried costs more than a bad one that is.
_EXPECTED = 0.75
_FIRST_WEIGHT = 2.0
# Share of what was seen that is left after each further round: segments of a text differ.
_MEMORY = 0.93
# Another number of draft tokens must promise this much more.
_GAIN = 1.03
# Share of the time that trials of the drafter may take where plain decoding is faster: at first, and where trials go on
# to fail.
_FIRST_TRIALS = 0.02
_LAST_TRIALS = 0.005
# What is left then of what was seen before the wait.
_MEMORY_OF_TRIALS = 0.7


class CostCurve(NamedTuple):
    """What rounds cost on one machine, in seconds.

    `verify` holds a round that only verifies 1, 2, ... rows, `draft` is one draft step, `overhead` what drafting takes
    besides, whatever is drafted.
    """

    verify: list[float]
    draft: float
    overhead: float = 0.0

    def round(self, k: int) -> float:
        """Of a round of k draft tokens."""
        return self.verify[k] + (k * self.draft + self.overhead if k else 0)


class DraftLength:
    """Chooses `k`, the number of tokens to draft, for one text, round by round.

    Acceptance is estimated by draft position from the last rounds, and k maximizes expected tokens per second, E(k) /
    cost(k). Where nothing drafted promises more than plain decoding, k is 0, and the drafter is tried again with one
    token at growing intervals, unless nothing could pay even if all of it were accepted. Nothing is timed here: the
    same costs and the same text make the same choices.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self.k = 0
        self._trials = [0.0] * (len(curve.verify) - 1)
        self._hits = [0.0] * len(self._trials)
        # An unlucky beginning must not end drafting; it is forgotten as what was seen is.
        if self._trials:
            self._trials[0], self._hits[0] = _FIRST_WEIGHT, _FIRST_WEIGHT * _EXPECTED
        # Rounds to wait until the next trial, which costs this much more than a plain round.
        trial = curve.round(1) / curve.round(0) - 1 if self._trials else 0.0
        self._waits = max(1.0, trial / _FIRST_TRIALS), max(1.0, trial / _LAST_TRIALS)
        self._wait = self._left = self._waits[0]
        # Whether any number of draft tokens would be worth its cost if all were accepted.
        self._can_pay = any((k + 1) * curve.round(0) > curve.round(k) for k in range(1, len(curve.verify)))
        # One at first: a drafter that is of no use costs least then.
        self.k = min(1, self._best())

    def update(self, drafted: int, accepted: int) -> None:
        """Take note of a round, and choose for the next one."""
        if not drafted:
            # Where k is not 0, there was no room for it.
            if not self.k and self._can_pay:
                self._left -= 1
                if self._left <= 0:
                    self._forget(_MEMORY_OF_TRIALS)
                    self.k = 1
            return
        self._forget(_MEMORY)
        for position in range(len(self._trials)):
            if position < min(drafted, accepted + 1):
                self._trials[position] += 1
                self._hits[position] += position < accepted
        best = self._best()
        if best:
            self.k, self._wait = best, self._waits[0]
        elif self.k > 1 or not accepted:
            self.k, self._left = 0, self._wait
            self._wait = min(2 * self._wait, self._waits[1])

    def acceptance(self) -> list[float]:
        """By draft position, the estimated share of drafts accepted of those that got there."""
        shares: list[float] = []
        for trials, hits in zip(self._trials, self._hits, strict=True):
            expected, weight = (shares[-1], _LIKENESS) if shares else (_EXPECTED, _PRIOR_WEIGHT)
            shares.append((hits + weight * expected) / (trials + weight))
        return shares

    def _forget(self, left: float) -> None:
        self._trials = [trials * left for trials in self._trials]
        self._hits = [hits * left for hits in self._hits]

    def _best(self) -> int:
        """The best k by what is known; that of before unless the gain is worth a change, but 0 where that is better."""
        rates, tokens, reach = [1 / self.curve.round(0)], 1.0, 1.0
        for k, share in enumerate(self.acceptance(), start=1):
            reach *= share
            tokens += reach
            rates.append(tokens / self.curve.round(k))
        best = max(range(len(rates)), key=rates.__getitem__)
        return self.k if self.k and best and rates[best] < _GAIN * rates[self.k] else best
