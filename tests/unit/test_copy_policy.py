"""The choice between copies, drafts and plain decoding, with given costs."""

import pytest
from support.curves import COPIED, COSTS, PLAIN

from mlx_mtp.decoding.calibration import choosing_policy
from mlx_mtp.decoding.copy_policy import CopyGain, CopyPolicy
from mlx_mtp.decoding.draft_length import Choice, Costs, DraftLength, DraftPolicy
from mlx_mtp.decoding.report import RoundReport

TEXT = list(range(100, 160))
WITH_COPIES = COSTS._replace(copied=COPIED)


def emitted(tokens: list[int], choice: Choice) -> RoundReport:
    accepted = len(tokens) - 1
    return RoundReport(tokens, choice.k, accepted, None, 1, copied=choice.copied is not None)


def write(policy: DraftPolicy, tokens: list[int]) -> list[Choice]:
    """Let a text go on with these tokens, and return the choices. Drafts of the drafter are rejected."""
    choices = []
    while tokens:
        choices.append(choice := policy.choose())
        copied = choice.copied or []
        right = next((i for i, pair in enumerate(zip(copied, tokens, strict=False)) if pair[0] != pair[1]), len(copied))
        count = min(right + 1, len(tokens))
        policy.update(emitted(tokens[:count], choice), None)
        tokens = tokens[count:]
    return choices


@pytest.mark.parametrize("costs", [WITH_COPIES, PLAIN._replace(copied=COPIED)])
def test_a_text_that_is_written_again_is_copied(costs: Costs) -> None:
    policy = choosing_policy(costs, copies=True)
    policy.start([*TEXT, 1, 2, *TEXT[:2]])
    choices = write(policy, TEXT[2:])
    copied = [choice for choice in choices if choice.copied]
    assert len(choices) <= 8
    assert max(choice.k for choice in copied) == 31
    first = copied[0].copied
    assert first is not None
    assert first == TEXT[TEXT.index(first[0]) :][: len(first)]
    assert not any(choice.ahead for choice in copied)


@pytest.mark.parametrize("costs", [WITH_COPIES, PLAIN._replace(copied=COPIED)])
def test_a_text_without_repetition_gets_the_choices_of_the_drafter(costs: Costs) -> None:
    policy, alone = choosing_policy(costs, copies=True), DraftLength(costs)
    for each in (policy, alone):
        each.start(TEXT)
    assert write(policy, list(range(500, 600))) == write(alone, list(range(500, 600)))


def test_copies_that_are_wrong_end() -> None:
    """Pairs of tokens occur again, but other tokens follow them. No trial is needed to know when copies pay again."""
    policy = choosing_policy(WITH_COPIES, copies=True)
    policy.start(TEXT)
    wrong = [token for i in range(200) for token in (1, 2, 1000 + i)]
    choices = write(policy, wrong)
    assert not any(choice.copied for choice in choices[60:])
    again = write(policy, [*TEXT])
    assert any(choice.copied for choice in again)


def test_a_round_that_may_copy_waits_for_the_report_before_it() -> None:
    costs = WITH_COPIES
    policy = choosing_policy(costs, copies=True)
    policy.start([*TEXT, 1, 2])
    assert policy.choose(1).ahead
    policy.update(emitted(TEXT[:12], Choice(11, ahead=False)), None)
    assert policy.choose().copied
    assert policy.choose(1) == policy.choose(1)._replace(ahead=False, copied=None)


def test_nothing_is_copied_where_copies_cost_more_than_they_promise() -> None:
    dear = COSTS._replace(copied=tuple(1.0 + 2 * k for k in range(32)))
    policy = choosing_policy(dear, copies=True)
    policy.start([*TEXT, *TEXT[:40]])
    assert not any(choice.copied for choice in write(policy, TEXT[40:]))


def test_a_copy_must_win_over_the_best_round_and_not_over_a_trial() -> None:
    """The drafter is useless, and copies cost a little more than they promise. A trial of the drafter is slower yet."""
    dear = COSTS._replace(copied=tuple(1.0 if not k else 4.6 + 2.0 * k for k in range(32)))
    policy = choosing_policy(dear, copies=True)
    policy.start([*TEXT, *TEXT[:40]])
    assert not any(choice.copied for choice in write(policy, [*TEXT[40:], *TEXT, *TEXT, *TEXT, *TEXT]))


def test_after_a_loss_a_copy_must_promise_more() -> None:
    has_copied = {}
    for after_loss in (1.0, 100.0):
        policy = CopyPolicy(DraftLength(WITH_COPIES), WITH_COPIES, CopyGain(usual=1.0, after_loss=after_loss))
        policy.start([*TEXT, *TEXT[:40]])
        first = policy.choose()
        assert first.copied
        # All copied tokens are wrong. Then the text goes on as before, and its matches are long again.
        policy.update(RoundReport([7], first.k, 0, None, 1, copied=True), None)
        has_copied[after_loss] = any(choice.copied for choice in write(policy, TEXT))
    assert has_copied == {1.0: True, 100.0: False}


def test_a_copy_whose_cost_is_being_measured_counts_as_no_loss() -> None:
    policy = choosing_policy(COSTS, copies=True)
    policy.start([*TEXT, *TEXT[:40]])
    policy.update(RoundReport([7], 2, 0, None, 1, copied=True), None)
    policy.use(WITH_COPIES)
    assert any(choice.copied for choice in write(policy, TEXT))


def test_costs_of_an_exact_model_copy_at_most_seven_tokens() -> None:
    policy = choosing_policy(COSTS._replace(copied=COPIED[:8]), copies=True)
    policy.start([*TEXT, *TEXT[:40]])
    assert {choice.k for choice in write(policy, TEXT[40:]) if choice.copied} == {7}


def test_without_costs_of_copies_nothing_is_copied() -> None:
    policy = choosing_policy(COSTS, copies=True)
    policy.start([*TEXT, *TEXT[:40]])
    assert not any(choice.copied for choice in write(policy, TEXT[40:]))
    policy.use(WITH_COPIES)
    assert policy.choose().copied
