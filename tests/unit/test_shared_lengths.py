"""The draft lengths of texts that share their passes, against a search of all combinations."""

from itertools import product
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.decoding.draft_length import Choice, CostCurve, Costs, DraftLength, DraftPolicy, Option
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.shared_lengths import SharedCosts, SharedLengths, estimated

# Relative costs of passes, of 1 to 32 rows: those of MLX's quantized products on an M4 Pro, and of a kernel whose price
# hardly grows.
STOCK = SharedCosts((1, 1.1, 1.3, 1.5, 1.75, 2.06, 2.3, 2.6, *(2.6 + 0.29 * n for n in range(1, 25))), 0.05, 0.0, 0.02)
FLAT = SharedCosts(
    (1, *(1 + 0.4 * n / 7 for n in range(1, 8)), *(1.4 + 0.05 * n for n in range(1, 25))), 0.05, 0.0, 0.02
)


def expected(share: float, most: int = 8) -> tuple[float, ...]:
    """Return the expected tokens of a text whose draft tokens are accepted with this rate."""
    return tuple(sum(share**i for i in range(k + 1)) for k in range(most + 1))


def option(share: float, most: int = 8) -> Option:
    return Option(Choice(1, ahead=False), expected(share, most))


def fixed(k: int) -> Option:
    return Option(Choice(k, ahead=False))


def rate(costs: SharedCosts, options: list[Option], lengths: Any) -> float:
    steps = max((k for k, each in zip(lengths, options, strict=True) if not each.choice.copied), default=0)
    tokens = sum(each.tokens(k) for each, k in zip(options, lengths, strict=True))
    return tokens / costs.round(len(options) + sum(lengths), steps, len(options))


def choose(costs: SharedCosts, options: list[Option]) -> list[int]:
    chosen = SharedLengths().choose(costs, dict(enumerate(options)))
    return [choice.k for choice in chosen.values()]


def share_of_best(costs: SharedCosts, shares: list[float]) -> float:
    """Return the speed of the choice over that of the best of all combinations of up to 4 draft tokens."""
    options = [option(share, 4) for share in shares]
    best = max(rate(costs, options, lengths) for lengths in product(range(5), repeat=len(options)))
    return rate(costs, options, choose(costs, options)) / best


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([STOCK, FLAT]), st.lists(st.floats(0.05, 0.97), min_size=2, max_size=4))
def test_no_case_is_far_from_the_best_combination(costs: SharedCosts, shares: list[float]) -> None:
    assert share_of_best(costs, shares) >= 0.95


def free_choice(costs: SharedCosts, options: list[Option]) -> float:
    """Return the speed of a choice for each text alone: the best next draft token of all texts, as long as it pays."""
    lengths = [0] * len(options)
    best = rate(costs, options, lengths)
    while True:
        able = [i for i, k in enumerate(lengths) if k + 1 < len(options[i].expected)]
        longer = [[k + (i == chosen) for i, k in enumerate(lengths)] for chosen in able]
        lengths = max(longer, key=lambda each: rate(costs, options, each), default=lengths)
        if not longer or rate(costs, options, lengths) <= best:
            return best
        best = rate(costs, options, lengths)


@pytest.mark.parametrize("costs", [STOCK, FLAT])
def test_little_is_lost_against_a_free_choice(costs: SharedCosts) -> None:
    """On average, two numbers of draft tokens lose less than 1 % against a number for each text."""
    rng = np.random.default_rng(0)
    ratios = []
    for count in (2, 4, 8):
        for _ in range(20):
            options = [option(share) for share in rng.uniform(0.2, 0.95, count)]
            lengths = choose(costs, options)
            assert len(set(lengths) - {0}) <= 2
            ratios.append(rate(costs, options, lengths) / free_choice(costs, options))
    assert mean(ratios) >= 0.99


@pytest.mark.parametrize(("costs", "texts", "drafting"), [(STOCK, 2, 2), (STOCK, 8, 0), (FLAT, 8, 8)])
def test_drafts_fade_out_where_rows_cost_much(costs: SharedCosts, texts: int, drafting: int) -> None:
    lengths = choose(costs, [option(0.8)] * texts)
    assert sum(k > 0 for k in lengths) == drafting
    assert len(set(lengths) - {0}) <= 1


def test_the_best_texts_draft() -> None:
    lengths = choose(STOCK, [option(share) for share in (0.1, 0.95, 0.2, 0.9)])
    assert lengths[0] == lengths[2] == 0
    assert lengths[1] >= lengths[3] > 0


def test_fixed_lengths_stay_and_take_part_in_the_rows() -> None:
    assert choose(STOCK, [fixed(3), fixed(0), option(0.6), option(0.6)])[:2] == [3, 0]
    # The rows of these texts are so many that no other one drafts.
    assert choose(STOCK, [*[fixed(0)] * 8, option(0.6), option(0.6)]) == [0] * 10


def test_limits_near_the_end_of_a_text() -> None:
    assert choose(FLAT, [option(0.95), option(0.95, 1)]) == [8, 1]
    assert choose(FLAT, [option(0.95, 0), option(0.95, 0)]) == [0, 0]


def test_copies_are_rows_like_any_other() -> None:
    copy = Option(Choice(15, ahead=False, copied=[7] * 15), expected(0.5), copied=12.0)
    assert choose(FLAT, [copy, option(0.2)])[0] == 15
    poor = copy._replace(copied=2.0)
    assert choose(STOCK, [poor, option(0.2)])[0] == 0
    # A text that keeps its own choices keeps its copies.
    kept = Option(Choice(31, ahead=False, copied=[7] * 31))
    assert SharedLengths().choose(STOCK, {1: kept, 2: option(0.2)})[1] == kept.choice
    chosen = SharedLengths().choose(FLAT, {1: copy, 2: option(0.2)})
    assert chosen[1].copied == [7] * 15
    assert chosen[2].copied is None


def test_another_set_must_promise_three_percent_more() -> None:
    lengths = SharedLengths()

    def ks(*shares: float) -> list[int]:
        return [each.k for each in lengths.choose(FLAT, {i: option(share) for i, share in enumerate(shares)}).values()]

    first = ks(0.8, 0.8)
    assert first[0] == first[1] > 0
    assert ks(0.81, 0.79) == first
    assert ks(0.2, 0.8) != first
    # When a text leaves, the rest choose anew.
    assert len(ks(0.9)) == 1


def trials(costs: SharedCosts, texts: int, rounds: int) -> list[int]:
    """Return the rounds in which a text without any accepted token is tried."""
    lengths, found = SharedLengths(), []
    for number in range(rounds):
        chosen = lengths.choose(costs, {i: option(0.05) for i in range(texts)})
        assert sum(choice.k for choice in chosen.values()) <= 1
        if any(choice.k for choice in chosen.values()):
            found.append(number)
    return found


def test_a_parked_text_is_tried_less_and_less() -> None:
    found = trials(FLAT, 2, 400)
    assert len(found) >= 6
    gaps = [second - first for first, second in zip(found[::2], found[2::2], strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * gaps[0]


def test_no_trial_where_even_a_sure_token_would_not_pay() -> None:
    steep = SharedCosts(tuple(float(n) for n in range(1, 33)), 0.05)
    assert trials(steep, 8, 300) == []


def test_costs_from_those_of_one_text() -> None:
    verify = [1, 1.1, 1.3, 1.5, 1.75, 2.06, 2.3, 2.6, 2.8]
    copied = tuple(1 + 0.1 * k for k in range(32))
    found = estimated(Costs(CostCurve(verify, 0.05, 0.02), copied=copied))
    assert found.rows == (*verify, *copied[9:])
    assert (found.draft, found.overhead) == (0.05, 0.02)
    # The first rounds of texts measure rounds with their draft steps.
    found = estimated(Costs(CostCurve([1 + 0.2 * k for k in range(9)], 0.0), copied=copied))
    assert found.rows == copied
    assert found.draft == pytest.approx(0.1)
    # Beyond the last row, each row costs as much as the last one.
    assert found.round(34, 0, 2) == pytest.approx(copied[31] + 2 * 0.1)
    assert estimated(Costs(CostCurve([1.0], 0.0))).round(3, 0, 1) == 1.0


def test_the_policies_tell_their_options() -> None:
    costs = Costs(CostCurve([1, 1.1, 1.3, 1.5, 1.75, 2.06, 2.3, 2.6, 2.8], 0.05))
    assert DraftPolicy(3).option(2) == Option(Choice(2, ahead=False))
    policy = DraftLength(costs)
    for _ in range(30):
        policy.update(RoundReport([1, 2, 3], 2, 2, None, 1), None)
    found = policy.option(4)
    assert len(found.expected) == 5
    assert found.expected[0] == 1.0
    assert found.expected[2] > 2.8
    assert found.costs is costs
