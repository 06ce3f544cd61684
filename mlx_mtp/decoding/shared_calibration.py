"""Cost measurement of passes that several texts share."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from statistics import mean

import mlx.core as mx
import numpy as np

from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target

from .compiled import CompiledRounds
from .draft_length import MAX_DRAFT_TOKENS, Choice
from .packed import dispatch_packed
from .prefill import Progress
from .shared_lengths import SharedCosts
from .stream import Stream
from .timing import MeasuringPlan, time_in_turn

# Passes of several texts are measured for these numbers of texts, with each of these numbers of rows for a text.
TEXTS = (2, 4, 8)
ROWS = (1, 2, 4)
# Draft steps of several texts are measured for this number of texts, and for these numbers of draft tokens. Passes of
# as many rows are measured too.
_DRAFTING = 4
_DRAFTED_TOGETHER = (1, 3)
# A pass of the measurement has at most this number of texts. Rounds ahead have streams of their own, because one of
# their rounds is always in flight.
MOST_TEXTS = TEXTS[-1]
STREAMS = MOST_TEXTS + _DRAFTING
_PLAN = MeasuringPlan()


def measure_shared(
    target: Target, drafter: Drafter | None, on_progress: Progress | None = None, *, plan: MeasuringPlan = _PLAN
) -> SharedCosts:
    """Return the costs of passes that several texts share, each after `plan.context` tokens.

    Rounds of copied tokens are timed, and rounds that draft. Each row has another token, because the tokens decide
    which experts a pass reads.

    Raises ValueError if no clock can have measured the costs.
    """
    compiled = CompiledRounds()
    streams, streams_ahead = (
        [Stream(target, drafter, max_draft_tokens=MAX_DRAFT_TOKENS) for _ in range(count)]
        for count in (MOST_TEXTS, _DRAFTING)
    )
    for stream in (*streams, *streams_ahead):
        stream.prefill([7, 5], 2)
    tokens = itertools.count(11, 97)

    def dispatch(group: list[Stream], k: int, *, copies: bool) -> None:
        """Dispatch a round of each stream, always at the same position, with another token in each row."""
        choices = []
        for stream in group:
            stream.cache.set_length(plan.context)
            bonus, *copied = (next(tokens) % target.config.vocab_size for _ in range(k + 1))
            stream.state = stream.state._replace(bonus=mx.array([[bonus]], mx.int32))
            choices.append(Choice(k, ahead=False, copied=copied if copies else None))
        dispatch_packed(group, choices, compiled)

    def run(count: int, k: int, *, copies: bool = True) -> None:
        dispatch(streams[:count], k, copies=copies)
        for stream in streams[:count]:
            stream.finish()

    def run_ahead() -> None:
        """Dispatch a plain round ahead of the reports of the round before it, and then read these reports."""
        if not streams_ahead[0].in_flight:
            dispatch(streams_ahead, 0, copies=False)
        dispatch(streams_ahead, 0, copies=False)
        for stream in streams_ahead:
            stream.finish()

    runs: dict[tuple[str, int, int], Callable[[], object]] = {
        ("pass", count, rows): partial(run, count, rows - 1) for count in TEXTS for rows in ROWS
    }
    drafted = _DRAFTED_TOGETHER if drafter is not None else ()
    for k in drafted:
        runs["draft", _DRAFTING, k + 1] = partial(run, _DRAFTING, k, copies=False)
    if target.mapped is None:
        runs["ahead", _DRAFTING, 1] = run_ahead
    seconds = time_in_turn(runs, plan, on_progress)
    passes = {(count, rows): seconds["pass", count, rows] for count in TEXTS for rows in ROWS}
    drafting = {k: seconds["draft", _DRAFTING, k + 1] - seconds["pass", _DRAFTING, k + 1] for k in drafted}
    is_ahead = seconds.get(("ahead", _DRAFTING, 1), math.inf) < seconds["pass", _DRAFTING, 1]
    return fitted(passes, drafting)._replace(ahead=is_ahead)


def fitted(passes: dict[tuple[int, int], float], drafting: dict[int, float]) -> SharedCosts:
    """Return the costs that fit the seconds of passes, by the number of texts and the rows of each.

    A pass has the price of its rows, and of each text. Passes of as many rows but more texts show the price of a text.
    `drafting` has the seconds of drafting in a round by the number of draft tokens, for two of them, or nothing.
    """
    groups: dict[int, list[tuple[int, float]]] = {}
    for (count, rows), seconds in passes.items():
        groups.setdefault(count * rows, []).append((count, seconds))
    change = spread = 0.0
    for group in groups.values():
        middle, usual = mean(count for count, _ in group), mean(seconds for _, seconds in group)
        change += sum((count - middle) * (seconds - usual) for count, seconds in group)
        spread += sum((count - middle) ** 2 for count, _ in group)
    # The rows of a pass of as many texts as rows must keep a price.
    text = min(max(0.0, change / spread), min(seconds / count for (count, _), seconds in passes.items()) / 2)
    by_rows = {rows: mean(seconds - count * text for count, seconds in group) for rows, group in groups.items()}
    # More rows do not cost less.
    known = sorted(by_rows)
    at_least = accumulate((by_rows[rows] for rows in known), max)
    curve = tuple(np.interp(range(1, known[-1] + 1), known, list(at_least)).tolist())
    if not drafting:
        return SharedCosts(curve, 0.0, 0.0, text)
    (few, first), (many, last) = sorted(drafting.items())
    draft = max(0.0, (last - first) / (many - few))
    return SharedCosts(curve, draft, max(0.0, first - few * draft), text)
