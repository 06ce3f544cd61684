"""Times of different runs that take turns, so that other work on the machine meets all of them alike."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from .prefill import Progress

T = TypeVar("T", bound=Hashable)

# The turns of a run agree if the slowest of their middle half takes at most this many times as long as the fastest.
_AGREEMENT = 1.03


@dataclass(frozen=True)
class MeasuringPlan:
    """The plan of `time_in_turn`: how often each kind of round is run.

    `context` is the number of tokens before the measured rounds. `warm_up` is the number of rounds of each kind that
    are not timed: one runs uncompiled, one is compiled, and one more runs compiled.

    Rounds of one kind follow each other for `turn_seconds` seconds. Their number stays within the limits of
    `turn_rounds`. The turns repeat for `seconds` seconds, and then until the turns of each kind agree, for `longest`
    seconds at most. Their number stays within the limits of `repetitions`.
    """

    context: int = 64
    warm_up: int = 3
    turn_seconds: float = 0.06
    turn_rounds: tuple[int, int] = (3, 100)
    seconds: float = 4.0
    longest: float = 12.0
    repetitions: tuple[int, int] = (2, 20)


def time_in_turn(
    runs: dict[T, Callable[[], object]], plan: MeasuringPlan, on_progress: Progress | None
) -> dict[T, float]:
    """Return the seconds of each run, by key: the median of its turns, which are medians. The runs take turns.

    So what other work does to a machine's speed meets all runs alike.
    """
    least, most = plan.repetitions
    fewest, limit = plan.turn_rounds
    total = len(runs) * (plan.warm_up + least)
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(min(done, total), total)

    def turn(run: Callable[[], object]) -> float:
        seconds: list[float] = []
        while len(seconds) < fewest or (sum(seconds) < plan.turn_seconds and len(seconds) < limit):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    for run in runs.values():
        for _ in range(plan.warm_up):
            run()
        report(plan.warm_up)
    taken: dict[T, list[float]] = {key: [] for key in runs}
    began = time.perf_counter()
    for repetition in range(most):
        seconds = time.perf_counter() - began
        if repetition >= least and seconds > (plan.seconds if all(map(_agree, taken.values())) else plan.longest):
            break
        for key, run in runs.items():
            taken[key].append(turn(run))
            report(int(repetition < least))
    return {key: median(turns) for key, turns in taken.items()}


def _agree(turns: list[float]) -> bool:
    """Return whether the middle half of the turns differ little."""
    ordered, outer = sorted(turns), len(turns) // 4
    return ordered[-1 - outer] <= _AGREEMENT * ordered[outer]
