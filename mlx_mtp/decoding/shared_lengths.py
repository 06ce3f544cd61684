"""Draft lengths of texts that share their passes: one or two numbers of draft tokens, and none for the other texts.

A pass of all texts costs more with each row. So a text drafts only if its tokens are worth their rows. The more texts
there are, the fewer of them draft.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .draft_length import MAX_DRAFT_TOKENS, Choice, Costs, Option

# Another set of draft lengths must promise this factor in tokens per second.
_GAIN = 1.03
# A text without draft tokens is tried with one of them after this number of rounds. The number doubles with each trial
# that fails, up to the last value.
_FIRST_TRIAL = 8
_LAST_TRIAL = 256
# The numbers of draft tokens to choose from.
_LENGTHS = range(1, MAX_DRAFT_TOKENS + 1)


class SharedCosts(NamedTuple):
    """Costs of passes that several texts share, in seconds.

    `rows[n - 1]` is the cost of a pass of n rows. Beyond the last one, it grows as between the last two that were
    measured. `draft` is the cost of a draft step, which is one for all texts, `overhead` that of a round that drafts,
    and `text` that of each text. `ahead` tells whether a pass costs less if it is dispatched before the reports of the
    pass before it are read.
    """

    rows: tuple[float, ...]
    draft: float
    overhead: float = 0.0
    text: float = 0.0
    ahead: bool = False

    def round(self, rows: int, steps: int, texts: int) -> float:
        """Return the cost of a round of `rows` rows and `steps` draft steps."""
        known = len(self.rows)
        cost = self.rows[min(rows, known) - 1]
        if rows > known > 1:
            cost += (rows - known) * max(0.0, self.rows[-1] - self.rows[-2])
        return cost + texts * self.text + (steps * self.draft + self.overhead if steps else 0.0)

    def as_json(self) -> dict[str, Any]:
        """Return the costs as values of JSON, by name."""
        return self._asdict()


def estimated(costs: Costs) -> SharedCosts:
    """Estimate the costs of shared passes from those of one text.

    Rounds of copied tokens are passes without draft steps, of up to 32 rows.
    """
    waiting, ahead = costs.waiting, costs.is_ahead(0)
    if not costs.copied:
        return SharedCosts(tuple(waiting.verify), waiting.draft, waiting.overhead, ahead=ahead)
    rows = list(costs.copied)
    drafted = min(len(waiting.verify), len(rows))
    if waiting.draft or waiting.overhead:
        rows[:drafted] = waiting.verify[:drafted]
        return SharedCosts(tuple(rows), waiting.draft, waiting.overhead, ahead=ahead)
    # The costs of rounds with a drafter include their draft steps.
    most = drafted - 1
    draft = max(0.0, waiting.round(most) - rows[most]) / most if most else 0.0
    return SharedCosts(tuple(rows), draft, ahead=ahead)


class _Parked:
    """A text that has no draft tokens for now."""

    def __init__(self) -> None:
        self.rounds = 0
        self.interval = _FIRST_TRIAL


class SharedLengths:
    """The choice of the draft lengths of texts that share their passes, round after round.

    A text is named by a number. The same costs and the same texts give the same choices: nothing is timed here.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._parked: dict[int, _Parked] = {}

    def choose(self, costs: SharedCosts, options: Mapping[int, Option]) -> dict[int, Choice]:
        """Choose the next round of each text."""
        search = _Search(costs, options)
        best = search.best()
        last = {key: self._last.get(key, -1) for key in best}
        if search.allows(last) and search.rate(best) < _GAIN * search.rate(last):
            best = last
        self._last = best
        chosen = dict(best)
        trial = self._trial(search, best)
        if trial is not None:
            chosen[trial] = 1
        return {key: _as_chosen(option.choice, chosen[key]) for key, option in options.items()}

    def _trial(self, search: "_Search", lengths: dict[int, int]) -> int | None:
        """Return the text to try with one draft token, if one has waited long enough and the trial can pay."""
        waiting = {key for key, k in lengths.items() if not k and search.is_open(key)}
        self._parked = {key: self._parked.get(key, _Parked()) for key in waiting}
        for parked in self._parked.values():
            parked.rounds += 1
        due = [key for key, parked in self._parked.items() if parked.rounds > parked.interval]
        if not due:
            return None
        key = max(due, key=lambda each: self._parked[each].rounds)
        parked = self._parked[key]
        parked.rounds, parked.interval = 0, min(2 * parked.interval, _LAST_TRIAL)
        return key if search.can_pay(key, lengths) else None


def _as_chosen(choice: Choice, k: int) -> Choice:
    return choice if k == choice.k else Choice(k, ahead=False)


class _Search:
    """The search for the best draft lengths of one round."""

    def __init__(self, costs: SharedCosts, options: Mapping[int, Option]) -> None:
        self._costs = costs
        self._options = options

    def best(self) -> dict[int, int]:
        """Return the draft lengths with the most tokens per second, beside fixed choices.

        They are 0 or k, or a second number for some texts: more for the best of those that draft, or fewer for the
        worst of them or for the best of the others.
        """
        options = self._options
        base = {key: 0 if self.is_open(key) else option.choice.k for key, option in options.items()}
        self._drop_copies(base)
        texts = [key for key in base if self.is_open(key) and not base[key]]
        lengths = self._best_change(base, [(k, self._by_gain(texts, 0, k)) for k in _LENGTHS])
        drafting = [key for key in texts if lengths[key]]
        if not drafting:
            return lengths
        first, others = lengths[drafting[0]], [key for key in texts if not lengths[key]]
        changes = [(k, self._by_gain(drafting, first, k)) for k in _LENGTHS if k != first]
        changes += [(k, self._by_gain(others, 0, k)) for k in _LENGTHS if k < first]
        return self._best_change(lengths, changes)

    def _by_gain(self, texts: list[int], now: int, k: int) -> list[int]:
        """Return the texts that can have k draft tokens instead of `now`, those first that gain most or lose least."""
        expected = {key: self._options[key].expected for key in texts if k < len(self._options[key].expected)}
        return sorted(expected, key=lambda key: expected[key][now] - expected[key][k])

    def _best_change(self, lengths: dict[int, int], changes: list[tuple[int, list[int]]]) -> dict[int, int]:
        """Return the best lengths in which the first texts of one change, some or all, have its number."""
        tokens, rows, steps = self._tokens(lengths), len(lengths) + sum(lengths.values()), self._steps(lengths)
        best, best_rate = lengths, self.rate(lengths)
        for k, texts in changes:
            gain, more = 0.0, 0
            for count, key in enumerate(texts, start=1):
                gain += self._options[key].expected[k] - self._options[key].expected[lengths[key]]
                more += k - lengths[key]
                rate = (tokens + gain) / self._costs.round(rows + more, max(k, steps), len(lengths))
                if rate > best_rate:
                    best, best_rate = lengths | dict.fromkeys(texts[:count], k), rate
        return best

    def rate(self, lengths: Mapping[int, int]) -> float:
        """Return the expected tokens per second."""
        rows = len(lengths) + sum(lengths.values())
        return self._tokens(lengths) / self._costs.round(rows, self._steps(lengths), len(lengths))

    def is_open(self, key: int) -> bool:
        """Return whether the draft length of a text is not fixed, and it copies nothing now."""
        option = self._options[key]
        return bool(option.expected) and not option.choice.copied

    def allows(self, lengths: Mapping[int, int]) -> bool:
        """Return whether each text can have its draft length now."""
        return all(
            0 <= k < len(self._options[key].expected) if self.is_open(key) else k == self._options[key].choice.k
            for key, k in lengths.items()
        )

    def can_pay(self, key: int, lengths: dict[int, int]) -> bool:
        """Return whether one more draft token of a text would raise the speed, if it were accepted for sure."""
        more = lengths | {key: 1}
        sure = self._tokens(lengths) + 1
        rows = len(more) + sum(more.values())
        return len(self._options[key].expected) > 1 and sure / self._costs.round(
            rows, self._steps(more), len(more)
        ) > self.rate(lengths)

    def _drop_copies(self, lengths: dict[int, int]) -> None:
        """Leave out the copies that are not worth their rows, the worst first. Fixed choices stay."""
        copies = [key for key, option in self._options.items() if option.choice.copied and option.copied]
        for key in sorted(copies, key=lambda key: self._options[key].copied / self._options[key].choice.k):
            without = lengths | {key: 0}
            if self.rate(without) > self.rate(lengths):
                lengths[key] = 0

    def _tokens(self, lengths: Mapping[int, int]) -> float:
        return sum(self._options[key].tokens(k) for key, k in lengths.items())

    def _steps(self, lengths: Mapping[int, int]) -> int:
        """Return the number of draft steps, which the copies do not need."""
        return max((k for key, k in lengths.items() if not self._options[key].choice.copied), default=0)
