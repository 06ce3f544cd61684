"""The costs of rounds, measured in the first rounds of texts, with simulated times."""

from collections.abc import Callable

import pytest

from mlx_mtp.decoding.draft_length import Choice, Costs, DraftLength, DraftPolicy
from mlx_mtp.decoding.first_rounds import CAUTIOUS, FirstRounds, MeasuringPolicy
from mlx_mtp.decoding.kept_costs import MeasuringLock
from mlx_mtp.decoding.report import RoundReport

# Seconds of a round of 0 to 8 draft tokens.
SECONDS = [0.010, 0.014, 0.016, 0.018, 0.020, 0.023, 0.026, 0.029, 0.032]
# The number of rounds of a measurement of five lengths, in one way and in both ways.
ONE_WAY, BOTH_WAYS = 50, 72

Seconds = Callable[[Choice], float | None]


class Lock(MeasuringLock):
    """A lock of no folder that counts its releases."""

    def __init__(self) -> None:
        super().__init__(None)
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


def report_of(choice: Choice) -> RoundReport:
    """Return the report of a round in which all draft tokens are accepted."""
    return RoundReport([0] * (choice.k + 1), choice.k, choice.k, None, 1, choice.ahead, choice.copied is not None)


def measuring(
    rounds: FirstRounds, seen: list[Costs], lock: Lock | None, chooser: DraftPolicy | None = None
) -> MeasuringPolicy:
    def finish() -> Costs:
        seen.append(rounds.costs())
        return seen[-1]

    policy = MeasuringPolicy(chooser or DraftLength(CAUTIOUS), rounds, lambda: lock, finish)
    policy.start([])
    return policy


def same_in_both_ways(choice: Choice) -> float:
    return SECONDS[choice.k]


def run(policy: MeasuringPolicy, rounds: int, seconds: Seconds = same_in_both_ways) -> list[Choice]:
    """Run rounds in which all draft tokens are accepted, as the decode loop does. Return the choices."""
    choices = []
    in_flight: list[Choice] = []
    for _ in range(rounds):
        if not in_flight:
            in_flight.append(policy.choose()._replace(ahead=False))
        if (following := policy.choose(1)).ahead:
            in_flight.append(following)
        choice = in_flight.pop(0)
        choices.append(choice)
        policy.update(report_of(choice), seconds(choice))
    return choices


@pytest.mark.parametrize(("ahead", "rounds"), [(False, ONE_WAY), (True, BOTH_WAYS)])
def test_costs_are_measured_and_then_used(ahead: bool, rounds: int) -> None:
    seen: list[Costs] = []
    lock = Lock()
    policy = measuring(FirstRounds(ahead=ahead), seen, lock)
    choices = run(policy, rounds + 40, lambda choice: SECONDS[choice.k] * (0.8 if choice.ahead else 1))
    assert {choice.k for choice in choices[:rounds]} == {0, 1, 2, 4, 8}
    (costs,) = seen
    assert lock.releases == 1
    for k in (0, 1, 2, 4, 8):
        assert costs.waiting.round(k) == pytest.approx(SECONDS[k])
    assert costs.waiting.round(3) == pytest.approx((SECONDS[2] + SECONDS[4]) / 2)
    assert (costs.ahead is not None) == ahead
    if costs.ahead is not None:
        assert costs.ahead.round(8) == pytest.approx(0.8 * SECONDS[8])
        assert costs.round(8) == costs.ahead.round(8)
    # All draft tokens are accepted, and eight of them give the most tokens per second.
    assert set(choices[rounds + 2 :]) == {Choice(8, ahead)}


def test_the_cheaper_way_is_taken_for_each_number_of_draft_tokens() -> None:
    seen: list[Costs] = []
    policy = measuring(FirstRounds(ahead=True), seen, Lock())
    run(
        policy,
        BOTH_WAYS,
        lambda choice: SECONDS[choice.k] * ((1.2 if choice.k else 0.9) if choice.ahead else 1),
    )
    (costs,) = seen
    assert [costs.is_ahead(k) for k in (0, 1, 2, 4, 8)] == [True, True, False, False, False]
    assert costs.round(8) == costs.waiting.round(8)


def test_slow_rounds_while_a_shape_is_compiled_do_not_count() -> None:
    seen: list[Costs] = []
    met: dict[int, int] = {}

    def seconds(choice: Choice) -> float:
        met[choice.k] = met.get(choice.k, 0) + 1
        return 5.0 if met[choice.k] <= 3 else SECONDS[choice.k]

    run(measuring(FirstRounds(ahead=True), seen, Lock()), BOTH_WAYS, seconds)
    assert seen[0].waiting.round(8) == pytest.approx(SECONDS[8])


def test_a_fixed_number_of_draft_tokens_only_measures_the_two_ways() -> None:
    for share, ahead in ((0.7, True), (1.3, False)):
        rounds = FirstRounds((12,), ahead=True)
        policy = measuring(rounds, [], Lock(), DraftPolicy(12))
        choices = run(policy, 30, lambda choice, share=share: 0.02 * (share if choice.ahead else 1))  # type: ignore[misc]
        assert {choice.k for choice in choices} == {12}
        assert rounds.is_complete
        assert policy.choose() == Choice(12, ahead)


def test_several_short_texts_complete_one_measurement() -> None:
    rounds = FirstRounds(ahead=False)
    seen: list[Costs] = []
    for _ in range(5):
        lock = Lock()
        policy = measuring(rounds, seen, lock)
        run(policy, 10)
        policy.end()
        assert lock.releases == 1
    assert len(seen) == 1


def test_short_texts_use_the_costs_without_copies_and_a_long_one_measures_these() -> None:
    rounds = FirstRounds(ahead=False, copied=(7, 31))
    seen: list[Costs] = []
    run(measuring(rounds, seen, Lock()), ONE_WAY)
    for _ in range(3):
        lock, chooser = Lock(), DraftLength(CAUTIOUS)
        policy = measuring(rounds, seen, lock, chooser)
        assert chooser.costs.waiting.round(8) == pytest.approx(SECONDS[8])
        for left in range(20, 0, -1):
            choice = policy.choose()
            cut = choice._replace(k=min(choice.k, left))
            policy.update(report_of(cut), SECONDS[min(cut.k, 8)])
        # The first round that a copy does not fit into ends the measurement in this text.
        assert lock.releases == 1
        assert policy.choose().copied is None
    assert not seen
    run(measuring(rounds, seen, Lock()), 12, lambda choice: 0.03 + 0.001 * choice.k)
    (costs,) = seen
    assert len(costs.copied) == 32
    assert costs.copied[31] == pytest.approx(0.061)
    assert costs.waiting.round(8) == pytest.approx(SECONDS[8])


def test_rounds_without_room_for_the_draft_do_not_count() -> None:
    rounds = FirstRounds(ahead=True)
    policy = measuring(rounds, [], Lock())
    assert policy.choose() == Choice(1, ahead=False)
    for _ in range(80):
        policy.update(report_of(Choice(0, ahead=False)), 9.0)
    assert rounds.choose() == policy.choose() == Choice(1, ahead=False)


def test_rounds_that_cannot_go_ahead_do_not_count_as_such() -> None:
    rounds = FirstRounds((2,), ahead=True)
    policy = measuring(rounds, [], Lock(), DraftPolicy(2))
    for _ in range(6):
        policy.update(report_of(Choice(2, ahead=False)), 0.01)
    for _ in range(50):
        assert rounds.choose() == Choice(2, ahead=True)
        policy.update(report_of(Choice(2, ahead=False)), 0.01)
    assert not rounds.is_complete


def test_times_of_a_slow_reader_are_not_used() -> None:
    rounds = FirstRounds(ahead=False)
    seen: list[Costs] = []
    with pytest.raises(ValueError, match="read more slowly than their rounds ran"):
        run(measuring(rounds, seen, Lock()), ONE_WAY, lambda choice: None)
    assert rounds.is_complete


def test_cautious_costs_draft_few_tokens() -> None:
    rates = [(k + 1) / CAUTIOUS.round(k) for k in range(9)]
    assert rates[0] < rates[1] < 1.5 * rates[0]
    assert CAUTIOUS.ahead is None


def test_a_text_beside_a_measurement_uses_cautious_costs_and_then_the_measured_ones() -> None:
    rounds = FirstRounds(ahead=True)
    seen: list[Costs] = []
    chooser = DraftLength(CAUTIOUS)
    beside = measuring(rounds, seen, None, chooser)
    assert beside.choose() == Choice(1, ahead=False)
    run(beside, 120)
    assert chooser.costs == CAUTIOUS
    assert rounds.choose() == Choice(1, ahead=False)
    assert not seen
    run(measuring(rounds, seen, Lock()), BOTH_WAYS)
    late = DraftLength(CAUTIOUS)
    measuring(rounds, seen, None, late)
    assert late.costs == seen[0]


def test_two_texts_may_measure_at_once() -> None:
    """A fixed number of draft tokens has no lock. The text that ends its measurement last uses the same costs."""
    rounds = FirstRounds((3,), ahead=True)
    seen: list[Costs] = []
    policies = [measuring(rounds, seen, Lock(), DraftPolicy(3)) for _ in range(2)]
    for policy in policies * 4:
        run(policy, 10, lambda choice: 0.01 if choice.ahead else 0.02)
    assert rounds.is_complete
    assert [policy.choose() for policy in policies] == [Choice(3, ahead=True)] * 2
