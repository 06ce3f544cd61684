"""Choice between copied draft tokens, draft tokens of the drafter, and plain decoding."""

from collections.abc import Sequence
from typing import NamedTuple

from .copy_index import CopyIndex, CopyStatistics
from .draft_length import COPY_LENGTHS, Choice, Costs, DraftPolicy, Option
from .report import RoundReport


class CopyGain(NamedTuple):
    """The tokens per second that a copy must promise, over those of the drafter's best round and of plain decoding.

    `after_loss` counts while the copies of a text have taken more time than the tokens would have taken without them.
    `scripts/measure.py copies` shows what other values gain and lose.
    """

    usual: float
    after_loss: float


COPY_GAIN = CopyGain(usual=1.4, after_loss=1.7)


class CopyPolicy(DraftPolicy):
    """A policy that copies from the text where this promises more tokens per second than the rounds of `chooser`.

    The chances of a copy come from the length of its match, and from the earlier tokens of this text: each of them
    tells whether a copy would have been right, whatever drafted it. So a copy needs no trials. The same costs and the
    same text give the same choices. Costs without those of copies copy nothing.
    """

    def __init__(self, chooser: DraftPolicy, costs: Costs, gain: CopyGain = COPY_GAIN) -> None:
        super().__init__(chooser.k)
        self._gain = gain
        self.chooser = chooser
        self._set_costs(costs)
        self._index = CopyIndex()
        self._earlier: CopyIndex | None = None
        self._statistics = CopyStatistics()
        # The time that the copies of this text have saved. It is negative if they have lost time.
        self._saved = 0.0

    @property
    def copy_index(self) -> CopyIndex:
        """The index of the text."""
        return self._index

    def resume(self, copy_index: CopyIndex) -> None:
        """Use the index of an earlier text. It is not changed. Call it before `start`."""
        self._earlier = copy_index

    def start(self, tokens: Sequence[int]) -> None:
        """Prepare the first round. The text begins with these tokens, which include the prompt."""
        if self._earlier is not None:
            self._index, self._earlier = self._earlier.beginning_of(tokens), None
        self._index.extend(tokens[len(self._index) :])
        self.chooser.start(tokens)

    def choose(self, in_flight: int = 0) -> Choice:
        """Choose the next round.

        Where a copy would be chosen now, the next round waits for the report of the round in flight: the tokens to
        copy depend on it.
        """
        choice = self.chooser.choose(in_flight)
        count = self._copied_count()
        if not count:
            return choice
        if in_flight:
            return choice._replace(ahead=False)
        return Choice(count, False, self._index.copy(count))

    def option(self, most: int) -> Option:
        """Return the option of the chooser, or the copy that would be chosen alone.

        The tokens of a copy count as far as it must promise more than the other rounds.
        """
        option, count = self.chooser.option(most), min(self._copied_count(), most)
        if not count:
            return option
        (expected,) = self._statistics.expected_tokens(self._index.match, [count])
        return option._replace(choice=Choice(count, False, self._index.copy(count)), copied=expected / self._least_gain)

    def use(self, costs: Costs) -> None:
        """Choose by these costs from now on."""
        self._set_costs(costs)
        self.chooser.use(costs)

    def update(self, report: RoundReport, seconds: float | None) -> None:
        """Record the result of a round. Its tokens are trials of a copy, whatever drafted them."""
        # The first copies are only there to measure their costs.
        if report.copied and report.drafted < len(self._costs.copied):
            speed = self.chooser.tokens_per_second()
            if speed is not None:
                self._saved += len(report.tokens) / speed - self._costs.copied[report.drafted]
        for token in report.tokens:
            if self._index.match:
                self._statistics.add(self._index.match, is_right=self._index.copy(1) == [token])
            self._index.append(token)
        self.chooser.update(report, seconds)

    def tokens_per_second(self) -> float | None:
        """Return the expected speed of the chooser's best round."""
        return self.chooser.tokens_per_second()

    def end(self) -> None:
        """Release all that the policy holds. The text has ended."""
        self.chooser.end()

    def _set_costs(self, costs: Costs) -> None:
        self._costs = costs
        self._lengths = [k for k in COPY_LENGTHS if k < len(costs.copied)]

    def _copied_count(self) -> int:
        """Return the number of tokens to copy in the next round, or 0."""
        match, least = self._index.match, self.chooser.tokens_per_second()
        if not match or least is None or not self._lengths:
            return 0
        expected = self._statistics.expected_tokens(match, self._lengths)
        rates = {k: tokens / self._costs.copied[k] for k, tokens in zip(self._lengths, expected, strict=True)}
        best = max(self._lengths, key=rates.__getitem__)
        return best if rates[best] > self._least_gain * least else 0

    @property
    def _least_gain(self) -> float:
        return self._gain.after_loss if self._saved < 0 else self._gain.usual
