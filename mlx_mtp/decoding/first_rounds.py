"""Cost measurement in the first rounds of real texts, so that no text waits for it."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median
from typing import NamedTuple

import numpy as np

from .copy_index import CopyIndex
from .draft_length import MAX_DRAFT_TOKENS, Choice, CostCurve, Costs, DraftPolicy
from .kept_costs import MeasuringLock
from .report import RoundReport

# These draft lengths are measured, in this order. The costs of the other lengths are interpolated.
MEASURED = (1, 0, 2, 4, 8)
# Rounds ahead are measured for these draft lengths. For the other lengths, the ratio of both ways is interpolated.
MEASURED_AHEAD = (0, 4)
# These are the passes over all lengths: whether rounds are dispatched ahead, and the number of rounds of each length
# that are not timed. In the first pass, one of them runs uncompiled, one is compiled, and one more runs compiled. In
# the other passes, they bring the weights of this length into the caches. A round ahead needs another one before it.
_PASSES = ((False, 3), (True, 2), (False, 1), (True, 2))
# This is the number of timed rounds of a length in each pass.
_TIMED = 3
# Rounds of copies are measured for these lengths, if the stream has room for them.
MEASURED_COPIES = (7, 15, 31)
# A token to copy where only the cost counts.
_ANY_TOKEN = 0
# These costs are used where none are measured. Drafting gains little by them, so it needs good acceptance.
CAUTIOUS = Costs(CostCurve([1 + 0.2 * k for k in range(MAX_DRAFT_TOKENS + 1)], 0.15, 0.1))
# The same without a drafter.
CAUTIOUS_PLAIN = Costs(CostCurve([1.0], 0.0))


class _Kind(NamedTuple):
    k: int
    ahead: bool
    copied: bool = False


class _Planned(NamedTuple):
    """A planned round. `turn` is the pass in which it is timed, or None if it is not timed."""

    kind: _Kind
    turn: int | None


class FirstRounds:
    """The plan of the measured rounds, and their times so far. The rounds may belong to several texts.

    `lengths` are the numbers of draft tokens to measure: `MEASURED`, or a single one. `ahead` tells whether rounds can
    be dispatched ahead. `copied` are the numbers of copied tokens to measure.
    """

    def __init__(self, lengths: tuple[int, ...] = MEASURED, *, ahead: bool, copied: tuple[int, ...] = ()) -> None:
        lengths_ahead = (lengths if len(lengths) == 1 else MEASURED_AHEAD) if ahead else ()
        self._plan: list[_Planned] = []
        for turn, (is_ahead, warm_up) in enumerate(_PASSES):
            for k in lengths_ahead if is_ahead else lengths:
                self._add(_Kind(k, is_ahead), turn, warm_up)
            if is_ahead and ahead:
                # No round is dispatched ahead of the report of the last round, so its time is another one.
                self._plan.append(self._plan[-1]._replace(turn=None))
        self._before_copies = len(self._plan)
        _, warm_up = _PASSES[0]
        for k in copied:
            self._add(_Kind(k, ahead=False, copied=True), 0, warm_up)
        self._done = 0
        # The seconds of the timed rounds so far, by turn.
        self._turns: dict[_Planned, list[float]] = {}

    def _add(self, kind: _Kind, turn: int, warm_up: int) -> None:
        """Plan rounds of a kind: those that are not timed, and then those that are."""
        self._plan += [_Planned(kind, None)] * warm_up + [_Planned(kind, turn)] * _TIMED

    def choose(self, in_flight: int = 0) -> Choice | None:
        """Return the next round, while `in_flight` rounds are not reported. Return None if all rounds were chosen."""
        following = self._done + in_flight
        if following >= len(self._plan):
            return None
        kind = self._plan[following].kind
        return Choice(kind.k, kind.ahead, [_ANY_TOKEN] * kind.k if kind.copied else None)

    @property
    def has_begun(self) -> bool:
        """True if any round of the plan was recorded."""
        return self._done > 0

    @property
    def has_costs(self) -> bool:
        """True if all rounds without copies were recorded."""
        return self._done >= self._before_copies

    @property
    def is_complete(self) -> bool:
        """True if all rounds of the plan were recorded."""
        return self._done == len(self._plan)

    def note(self, report: RoundReport, seconds: float | None) -> bool:
        """Record a round, and return whether it counts. A round of another kind than the plan expects does not."""
        planned = self._plan[self._done]
        kind = planned.kind
        if (report.drafted, report.copied) != (kind.k, kind.copied) or (kind.ahead and not report.ahead):
            return False
        self._done += 1
        if planned.turn is not None and seconds is not None:
            self._turns.setdefault(planned, []).append(seconds)
        return True

    def costs(self) -> Costs:
        """Return the costs of rounds, in seconds. A round includes its draft steps, so `draft` is 0.

        Until the plan is complete, they have no costs of copies.

        Raises ValueError if the time of a draft length is not known, or if no clock can have measured it.
        """
        kinds = {planned.kind for planned in self._plan if self.is_complete or not planned.kind.copied}
        turns = [(planned.kind, median(seconds)) for planned, seconds in self._turns.items() if planned.kind in kinds]
        if {kind for kind, _ in turns} != kinds:
            raise ValueError("the texts were read more slowly than their rounds ran")
        # Other work on the machine makes rounds slower, and never faster.
        found = {kind: min(seconds for each, seconds in turns if each == kind) for kind in kinds}
        waiting = {kind.k: seconds for kind, seconds in found.items() if not (kind.ahead or kind.copied)}
        ahead = {kind.k: seconds for kind, seconds in found.items() if kind.ahead}
        copied = {kind.k: seconds for kind, seconds in found.items() if kind.copied}
        return measured_costs(CostCurve(interpolated(waiting), 0.0), ahead, copied)


def measured_costs(waiting: CostCurve, ahead: dict[int, float], copied: dict[int, float]) -> Costs:
    """Return the costs of all rounds, from the costs of rounds that wait and the seconds of some other rounds.

    `ahead` has the seconds of rounds ahead by their number of draft tokens, or nothing if rounds cannot be dispatched
    ahead. The ratio of both ways is interpolated. `copied` has the seconds of rounds by their number of copied tokens.

    Raises ValueError if no clock can have measured the costs.
    """
    numbers = [*waiting.verify, *ahead.values(), *copied.values()]
    if min(numbers) <= 0:
        raise ValueError(f"the costs of rounds must be positive numbers, found {numbers}")
    copies = tuple(interpolated(copied | {0: waiting.round(0)})) if copied else ()
    if not ahead:
        return Costs(waiting, copied=copies)
    lengths = sorted(ahead)
    shares = np.interp(range(len(waiting.verify)), lengths, [ahead[k] / waiting.round(k) for k in lengths])
    verify = [float(share) * waiting.round(k) for k, share in enumerate(shares)]
    return Costs(waiting, CostCurve(verify, 0.0), copies)


def interpolated(seconds: dict[int, float]) -> list[float]:
    """Return the costs of rounds for all draft lengths, from the seconds of some lengths."""
    lengths = sorted(seconds)
    found: list[float] = np.interp(range(lengths[-1] + 1), lengths, [seconds[k] for k in lengths]).tolist()
    return found


class MeasuringPolicy(DraftPolicy):
    """A policy that measures the costs of rounds in the first rounds of its text. Then `chooser` uses them.

    `acquire` is called when the text begins. It returns the lock of the measurement, or None if another text or program
    measures: `chooser` then keeps the costs that it has. `finish` returns the costs to use after the measurement.
    """

    def __init__(
        self,
        chooser: DraftPolicy,
        rounds: FirstRounds,
        acquire: Callable[[], MeasuringLock | None],
        finish: Callable[[], Costs],
    ) -> None:
        super().__init__(chooser.k)
        self.chooser = chooser
        self._rounds = rounds
        self._acquire = acquire
        self._finish = finish
        self._lock: MeasuringLock | None = None

    @property
    def untimed(self) -> DraftPolicy:
        """The policy for rounds that cannot be timed: they do not belong to the measurement."""
        return self.chooser

    @property
    def copy_index(self) -> CopyIndex | None:
        """The index of the text, or None if `chooser` does not copy from it."""
        return self.chooser.copy_index

    def resume(self, copy_index: CopyIndex) -> None:
        """Hand the index of an earlier text to `chooser`. Call it before `start`."""
        self.chooser.resume(copy_index)

    def start(self, tokens: Sequence[int]) -> None:
        """Start the measurement, or continue that of earlier texts."""
        self.chooser.start(tokens)
        if self._rounds.is_complete:
            # Another text has completed the measurement since this policy was made.
            self.chooser.use(self._finish())
        else:
            self._use_costs_without_copies()
            self._lock = self._acquire()

    def choose(self, in_flight: int = 0) -> Choice:
        """Choose the next round of the measurement, or the next round of `chooser`."""
        planned = self._rounds.choose(in_flight) if self._lock is not None else None
        return planned or self.chooser.choose(in_flight)

    def update(self, report: RoundReport, seconds: float | None) -> None:
        """Record the result and the time of a round."""
        self.chooser.update(report, seconds)
        if self._lock is None:
            return
        # Another text may have completed the measurement, where there is no lock that keeps it from this.
        if not self._rounds.is_complete:
            had_costs = self._rounds.has_costs
            counts = self._rounds.note(report, seconds)
            if not had_costs:
                self._use_costs_without_copies()
            elif not counts:
                # The rest of the text is too short for this copy. Another text may measure it.
                self.end()
                return
        if self._rounds.is_complete:
            self.chooser.use(self._finish())
            self.end()

    def _use_costs_without_copies(self) -> None:
        """Use the costs of the other rounds while copies are measured. `finish` reports costs that cannot be true."""
        if self._rounds.has_costs and not self._rounds.is_complete:
            with suppress(ValueError):
                self.chooser.use(self._rounds.costs())

    def end(self) -> None:
        """End the measurement in this text. The next text may continue it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
