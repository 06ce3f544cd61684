"""Cost measurement in the first rounds of real texts, so that no text waits for it."""

from collections.abc import Callable
from statistics import median

import numpy as np

from .draft_length import MAX_DRAFT_TOKENS, CostCurve, DraftLength
from .kept_costs import MeasuringLock

# These draft lengths are measured, in this order. The costs of the other lengths are interpolated.
_MEASURED = (1, 0, 2, 4, 8)
# In the first pass, each length has rounds that are not timed: one runs uncompiled, one is compiled, and one more runs
# compiled. In the second pass, one round brings the weights of this length into the caches.
_WARM_UP = (3, 1)
# This is the number of timed rounds of a length in each pass.
_TIMED = 4
# These costs are used where none are measured. Drafting gains little by them, so it needs good acceptance.
CAUTIOUS = CostCurve([1 + 0.2 * k for k in range(MAX_DRAFT_TOKENS + 1)], 0.15, 0.1)


class FirstRounds:
    """The plan of the measured rounds, and their times so far. The rounds may belong to several texts."""

    def __init__(self) -> None:
        self._plan = [
            (k, is_timed) for warm_up in _WARM_UP for k in _MEASURED for is_timed in [False] * warm_up + [True] * _TIMED
        ]
        self._done = 0
        self._seconds: dict[int, list[float]] = {k: [] for k in _MEASURED}

    @property
    def k(self) -> int | None:
        """The number of draft tokens of the next round, or None if the measurement is complete."""
        return self._plan[self._done][0] if self._done < len(self._plan) else None

    def note(self, drafted: int, seconds: float) -> None:
        """Record a round. A round with another number of draft tokens than `k` does not count."""
        k, is_timed = self._plan[self._done]
        if drafted == k:
            self._done += 1
            if is_timed:
                self._seconds[k].append(seconds)

    def curve(self) -> CostCurve:
        """Return the costs of rounds, in seconds. A round includes its draft steps, so `draft` is 0."""
        lengths = sorted(_MEASURED)
        costs = np.interp(range(MAX_DRAFT_TOKENS + 1), lengths, [median(self._seconds[k]) for k in lengths])
        return CostCurve(costs.tolist(), 0.0)


class MeasuringDraftLength(DraftLength):
    """A policy that measures the costs of rounds in the first rounds of its text, and then uses them.

    `acquire` is called when the text begins. It returns the lock of the measurement, or None if another text or program
    measures. This text then uses cautious costs. `finish` gets the measured costs, and returns the costs to use.
    """

    def __init__(
        self,
        rounds: FirstRounds,
        acquire: Callable[[], MeasuringLock | None],
        finish: Callable[[CostCurve], CostCurve],
    ) -> None:
        super().__init__(CAUTIOUS)
        self._rounds = rounds
        self._acquire = acquire
        self._finish = finish
        self._lock: MeasuringLock | None = None

    def start(self) -> None:
        """Start the measurement, or continue that of earlier texts."""
        if self._rounds.k is None:
            # Another text has completed the measurement since this policy was made.
            self.use(self._finish(self._rounds.curve()))
            return
        self._lock = self._acquire()
        if self._lock is not None:
            self.k = self._rounds.k

    def update(self, drafted: int, accepted: int, seconds: float) -> None:
        """Record the result and the time of a round, and choose k for the next round."""
        super().update(drafted, accepted, seconds)
        if self._lock is None:
            return
        self._rounds.note(drafted, seconds)
        if (k := self._rounds.k) is not None:
            self.k = k
        else:
            self.use(self._finish(self._rounds.curve()))
            self.end()

    def end(self) -> None:
        """End the measurement in this text. The next text may continue it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
