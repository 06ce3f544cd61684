"""The costs of rounds, measured in the first rounds of texts, with simulated times."""

from collections.abc import Callable

import pytest

from mlx_mtp.decoding.draft_length import CostCurve
from mlx_mtp.decoding.first_rounds import CAUTIOUS, FirstRounds, MeasuringDraftLength
from mlx_mtp.decoding.kept_costs import MeasuringLock

# Seconds of a round of 0 to 8 draft tokens.
SECONDS = [0.010, 0.014, 0.016, 0.018, 0.020, 0.023, 0.026, 0.029, 0.032]


class Lock(MeasuringLock):
    """A lock of no folder that counts its releases."""

    def __init__(self) -> None:
        super().__init__(None)
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


def measuring(rounds: FirstRounds, seen: list[CostCurve], lock: Lock | None) -> MeasuringDraftLength:
    def finish(curve: CostCurve) -> CostCurve:
        seen.append(curve)
        return curve

    policy = MeasuringDraftLength(rounds, lambda: lock, finish)
    policy.start()
    return policy


def run(policy: MeasuringDraftLength, rounds: int, seconds: Callable[[int], float]) -> list[int]:
    """Run rounds in which all draft tokens are accepted. Return their numbers of draft tokens."""
    lengths = []
    for _ in range(rounds):
        lengths.append(policy.k)
        policy.update(policy.k, policy.k, seconds(policy.k))
    return lengths


def test_costs_are_measured_and_then_used() -> None:
    seen: list[CostCurve] = []
    lock = Lock()
    policy = measuring(FirstRounds(), seen, lock)
    lengths = run(policy, 100, SECONDS.__getitem__)
    assert set(lengths[:60]) == {0, 1, 2, 4, 8}
    (curve,) = seen
    assert lock.releases == 1
    for k in (0, 1, 2, 4, 8):
        assert curve.round(k) == pytest.approx(SECONDS[k])
    assert curve.round(3) == pytest.approx((SECONDS[2] + SECONDS[4]) / 2)
    # All draft tokens are accepted, and eight of them give the most tokens per second.
    assert set(lengths[60:]) == {8}


def test_slow_rounds_while_a_shape_is_compiled_do_not_count() -> None:
    seen: list[CostCurve] = []
    met: dict[int, int] = {}

    def seconds(k: int) -> float:
        met[k] = met.get(k, 0) + 1
        return 5.0 if met[k] <= 3 else SECONDS[k]

    run(measuring(FirstRounds(), seen, Lock()), 60, seconds)
    assert seen[0].round(8) == pytest.approx(SECONDS[8])


def test_several_short_texts_complete_one_measurement() -> None:
    rounds = FirstRounds()
    seen: list[CostCurve] = []
    for _ in range(6):
        lock = Lock()
        policy = measuring(rounds, seen, lock)
        run(policy, 10, SECONDS.__getitem__)
        policy.end()
        assert lock.releases == 1
    assert len(seen) == 1


def test_rounds_without_room_for_the_draft_do_not_count() -> None:
    rounds = FirstRounds()
    policy = measuring(rounds, [], Lock())
    assert policy.k == 1
    for _ in range(80):
        policy.update(0, 0, 9.0)
    assert rounds.k == policy.k == 1


def test_cautious_costs_draft_few_tokens() -> None:
    rates = [(k + 1) / CAUTIOUS.round(k) for k in range(9)]
    assert rates[0] < rates[1] < 1.5 * rates[0]


def test_a_text_beside_a_measurement_uses_cautious_costs_and_then_the_measured_ones() -> None:
    rounds = FirstRounds()
    seen: list[CostCurve] = []
    beside = measuring(rounds, seen, None)
    assert beside.k == 1
    run(beside, 70, SECONDS.__getitem__)
    assert beside.curve == CAUTIOUS
    assert rounds.k == 1
    assert not seen
    run(measuring(rounds, seen, Lock()), 60, SECONDS.__getitem__)
    late = measuring(rounds, seen, None)
    assert late.curve == seen[0]
