"""Draft length by measured cost, against the best fixed length and no drafts, with simulated acceptance."""

from itertools import pairwise

import numpy as np
import pytest

from mlx_mtp.decoding.draft_length import CostCurve, Costs, DraftLength
from mlx_mtp.decoding.report import RoundReport

# Seconds of a pass over 1 to 9 rows, relative to one row. The curves are this project's CPU backend and a Mac's 4-bit
# kernels, stock and flat (Apple M4 Pro: mlx#3839; the flat curve is from mlx-dspark's README).
CURVES = {
    "cpu": CostCurve([1, 1.4, 1.75, 2.0, 2.3, 2.6, 2.9, 3.2, 3.5], 0.35, 0.05),
    "stock": CostCurve([1, 1.1, 1.3, 1.5, 1.75, 2.06, 2.3, 2.6, 2.8], 0.05, 0.02),
    "flat": CostCurve([1, 1.2, 1.3, 1.4, 1.4, 1.4, 1.4, 1.4, 1.6], 0.03, 0.02),
    "steep": CostCurve([1, 2, 3, 4, 5, 6, 7, 8, 9], 0.1, 0.0),
}
TOKENS = 1000


def accepted(rng: np.random.Generator, k: int, share: float) -> int:
    return int(np.cumprod(rng.random(k) < share).sum())


def round_of(drafted: int, accepted: int) -> RoundReport:
    return RoundReport([0] * (accepted + 1), drafted, accepted, None, 1)


def tokens_per_second(curve: CostCurve, share: float, seed: int) -> float:
    """Return the policy's speed for a text whose draft tokens are each accepted with chance `share`."""
    rng = np.random.default_rng(seed)
    policy = DraftLength(Costs(curve))
    seconds, made = 0.0, 0
    while made < TOKENS:
        count = accepted(rng, policy.k, share)
        seconds += curve.round(policy.k)
        made += count + 1
        policy.update(round_of(policy.k, count), None)
    return made / seconds


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("name", CURVES)
def test_close_to_the_best_fixed_length_and_never_slower_than_none(name: str, share: float) -> None:
    curve = CURVES[name]
    chosen = np.mean([tokens_per_second(curve, share, seed) for seed in range(12)])
    fixed = [sum(share**i for i in range(k + 1)) / curve.round(k) for k in range(9)]
    print(f"{name} {share}: {chosen / max(fixed):.3f} of k = {np.argmax(fixed)}, {chosen / fixed[0]:.3f} of k = 0")
    assert chosen > 0.96 * max(fixed)
    assert chosen > 0.98 * fixed[0]


def test_nothing_is_tried_where_nothing_can_pay() -> None:
    """A row costs as much as a pass. Even drafts that are all accepted are not worth their cost."""
    policy = DraftLength(Costs(CURVES["steep"]))
    for _ in range(2000):
        assert policy.k == 0
        policy.update(round_of(0, 0), None)


def test_it_follows_a_text_whose_segments_differ() -> None:
    """Copied text alternates with text that the drafter does not know. The policy beats any fixed length."""
    curve = CURVES["flat"]

    def run(k: int | None) -> float:
        rng = np.random.default_rng(0)
        policy = DraftLength(Costs(curve))
        seconds, made = 0.0, 0
        while made < 6000:
            drafted = policy.k if k is None else k
            count = accepted(rng, drafted, 0.97 if made // 500 % 2 else 0.05)
            seconds += curve.round(drafted)
            made += count + 1
            policy.update(round_of(drafted, count), None)
        return made / seconds

    assert run(None) > 1.02 * max(run(k) for k in range(9))


# Recorded from the demo pair with greedy decoding: how many of 8 draft tokens are accepted at each token of a text. Few
# are accepted at the start.
RECORDED = (
    "0032000002002105532105432108076543311547250338008768432103320087688765033100878887650381888788876543"
    "8188878887654381088788876543810888888765438108888887654381"
)


def test_a_bad_start_does_not_end_drafting() -> None:
    curve = CostCurve([1, 1.3, 1.55, 1.8, 2.0, 2.25, 2.5, 2.75, 3.0], 0.1, 0.08)

    def run(k: int | None) -> float:
        policy = DraftLength(Costs(curve))
        seconds, made = 0.0, 0
        while made < len(RECORDED):
            drafted = policy.k if k is None else k
            count = min(drafted, int(RECORDED[made]))
            seconds += curve.round(drafted)
            made += count + 1
            policy.update(round_of(drafted, count), None)
        return made / seconds

    best = max(run(k) for k in range(9))
    print(f"{run(None) / best:.3f} of the best k")
    assert run(None) > 0.9 * best


def test_a_useless_drafter_is_tried_less_and_less() -> None:
    policy = DraftLength(Costs(CURVES["cpu"]))
    drafted = []
    for _ in range(3000):
        drafted.append(policy.k)
        policy.update(round_of(policy.k, 0), None)
    tries = [index for index, k in enumerate(drafted) if k]
    waits = np.diff(tries)
    assert (np.diff(waits[3:]) >= 0).all()
    assert waits[-1] > 2.5 * next(wait for wait in waits if wait > 5)
    assert all(drafted[index] == 1 for index in tries[5:])
    # In the end, trials lose 1/200 of the time.
    assert waits[-1] == pytest.approx(200 * (CURVES["cpu"].round(1) / CURVES["cpu"].round(0) - 1), abs=2)


def test_it_settles() -> None:
    """Without changes in the text, k does not oscillate: it changes rarely in a thousand rounds."""
    rng = np.random.default_rng(1)
    policy = DraftLength(Costs(CURVES["stock"]))
    lengths = []
    for _ in range(1000):
        lengths.append(policy.k)
        policy.update(round_of(policy.k, accepted(rng, policy.k, 0.7)), None)
    changes = sum(a != b for a, b in pairwise(lengths))
    print(f"{changes} changes, from {min(lengths)} to {max(lengths)}")
    assert changes < 150


def test_drafting_ends_where_none_is_best_though_some_drafts_are_accepted() -> None:
    """One draft token of eight is accepted, so two tokens cost three passes.

    One draft token does not pay either, so the policy stops drafting.
    """
    policy = DraftLength(Costs(CostCurve([1, *[3.0] * 8], 0.0, 0.0)))
    while policy.k < 8:
        policy.update(round_of(policy.k, policy.k), None)
    drafted = []
    for _ in range(60):
        drafted.append(policy.k)
        policy.update(round_of(policy.k, min(1, policy.k)), None)
    ended = drafted.index(0)
    assert set(drafted[:ended]) == {8}
    assert ended < 30
    # Trials draft one token.
    assert set(drafted[ended:]) <= {0, 1}


def test_a_round_without_room_changes_nothing() -> None:
    policy = DraftLength(Costs(CURVES["stock"]))
    k = policy.k
    assert k > 0
    for _ in range(100):
        policy.update(round_of(0, 0), None)
    assert policy.k == k
