"""Rounds that are dispatched ahead of the report of the round before them: the same rounds, and the same state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import LONG, SHORT, Models, Scripted, assert_same_state
from support.tiny import VARIANTS, random_tokens

import mlx_mtp
from mlx_mtp.decoding.calibration import RoundCosts
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import Costs, DraftLength, DraftPolicy
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream, can_go_ahead
from mlx_mtp.decoding.text_loop import decode
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import Cache, KVQuantization
from mlx_mtp.gemma4.target import Target

TinyPair = Callable[[str], Path]
OPTIONS = {
    "greedy": Sampling(),
    "block": Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=1),
    "coupled": Sampling(temperature=1.2, acceptance="coupled", seed=2, repetition_penalty=1.3, xtc_probability=0.5),
}


def reports(
    target: Target,
    drafter: Drafter | None,
    prompt: list[int],
    k: int,
    *,
    ahead: bool,
    max_tokens: int = 40,
    stop_ids: frozenset[int] = frozenset(),
    **options: Any,
) -> tuple[list[RoundReport], Stream]:
    """Return the reports of a text without the way of its rounds, and the stream after it."""
    stream = Stream(target, drafter, max_draft_tokens=8, logprobs=2, **options)
    policy = DraftPolicy(k, ahead=ahead)
    rounds = decode(
        stream, prompt, max_tokens=max_tokens, num_draft_tokens=policy, stop_ids=stop_ids, prefill_step_size=64
    )
    return list(rounds), stream


def without_way(found: list[RoundReport]) -> list[RoundReport]:
    return [report._replace(ahead=False) for report in found]


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    kind=st.sampled_from(sorted(OPTIONS)),
    k=st.integers(0, 8),
    length=st.integers(1, len(LONG)),
    max_tokens=st.integers(1, 40),
    right=st.integers(0, 9),
    compiled=st.booleans(),
)
def test_the_rounds_are_the_same_in_both_ways(
    tiny_models: Models, variant: str, kind: str, k: int, length: int, max_tokens: int, right: int, compiled: bool
) -> None:
    """Tokens, accepted draft tokens and log probabilities are equal, bit by bit, for any acceptance."""
    target, drafter = tiny_models(variant)
    prompt, sampling = LONG[:length], OPTIONS[kind]
    if right < 9 and kind != "block":
        plain, _ = reports(target, None, prompt, 0, ahead=False, max_tokens=max_tokens + 20, sampling=sampling)
        text = [token for report in plain for token in report.tokens]
        drafter = Scripted(drafter, prompt, text, wrong_at=tuple(range(right, 8)))
    found = []
    for ahead in (False, True):
        rounds = CompiledRounds() if compiled else None
        options: dict[str, Any] = {"sampling": sampling, "rounds": rounds, "max_tokens": max_tokens}
        found.append(reports(target, drafter, prompt, k, ahead=ahead, **options))
    (waiting, one), (ahead_rounds, other) = found
    assert without_way(ahead_rounds) == waiting
    assert not any(report.ahead for report in waiting)
    # Only the first round, and rounds near the end of the text, wait for a report.
    late = [i for i, report in enumerate(ahead_rounds) if not report.ahead and i > 1]
    emitted = [sum(len(report.tokens) for report in ahead_rounds[:i]) for i in late]
    assert all(max_tokens - count <= 2 * (k + 1) for count in emitted)
    assert one.tokens == other.tokens
    assert_same_state(other, target, prompt + other.tokens[len(prompt) : -1])


@pytest.mark.parametrize("k", [0, 3])
def test_buffers_that_grow_are_seen_by_the_same_rounds(tiny_models: Models, k: int) -> None:
    """A round whose number of K/V rows depends on the report of the round before it waits for the report."""
    target, drafter = tiny_models("e2b")
    prompt = random_tokens(230, seed=3)
    waiting, _ = reports(target, drafter, prompt, k, ahead=False, max_tokens=60)
    ahead, _ = reports(target, drafter, prompt, k, ahead=True, max_tokens=60)
    assert without_way(ahead) == waiting
    # With k = 0, the number of rows is always known. The last rounds wait because the text may end.
    assert {report.ahead for report in ahead[2 : -2 * (k + 1)]} == ({True, False} if k else {True})


@pytest.mark.parametrize("start", [0, 70])
def test_quantized_kv_begins_at_the_same_position(tiny_models: Models, start: int) -> None:
    target, drafter = tiny_models("31b")
    kv = KVQuantization(8, 64, start)
    waiting, _ = reports(target, drafter, LONG, 3, ahead=False, kv_quantization=kv)
    ahead, _ = reports(target, drafter, LONG, 3, ahead=True, kv_quantization=kv)
    assert without_way(ahead) == waiting
    assert sum(report.ahead for report in ahead) > 5


@pytest.mark.parametrize(("k", "wrong_at"), [(4, (2,)), (8, ())])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stop_discards_the_round_in_flight(
    tiny_models: Models, variant: str, k: int, wrong_at: tuple[int, ...]
) -> None:
    """The state is that of the emitted tokens, for a stop at any place of a block.

    With eight accepted draft tokens, two whole blocks are written behind the stop.
    """
    target, drafter = tiny_models(variant)
    text = [token for report in reports(target, None, LONG, 0, ahead=False)[0] for token in report.tokens]
    scripted = Scripted(drafter, LONG, text + [0] * 16, wrong_at)
    for stop in dict.fromkeys(text[1:12]):
        found, stream = reports(target, scripted, LONG, k, ahead=True, stop_ids=frozenset([stop]))
        tokens = [token for report in found for token in report.tokens]
        assert tokens == text[: text.index(stop) + 1]
        assert_same_state(stream, target, LONG + tokens[:-1])
        assert stream.in_flight == []


def test_a_text_that_is_closed_leaves_the_state_of_its_tokens(tiny_models: Models) -> None:
    target, drafter = tiny_models("31b")
    for read in range(1, 6):
        stream = Stream(target, drafter, max_draft_tokens=8)
        policy = DraftPolicy(3, ahead=True)
        rounds = decode(
            stream, LONG, max_tokens=40, num_draft_tokens=policy, stop_ids=frozenset(), prefill_step_size=64
        )
        tokens = [token for _ in range(read) for token in next(rounds).tokens]
        assert stream.in_flight == ([3] if read > 1 else [])
        rounds.close()
        assert_same_state(stream, target, LONG + tokens[:-1])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_prompts_that_go_on_after_rounds_ahead(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, variant: str, exact: bool
) -> None:
    """A chat of several turns gives the same tokens in both ways, with stops inside of blocks."""
    texts = []
    for ahead in (False, True):
        monkeypatch.setattr(
            RoundCosts, "policy", lambda _, k, *rest, ahead=ahead, **options: DraftPolicy(k, ahead=ahead)
        )
        model = mlx_mtp.load(tiny_pair(variant) / "target", exact=exact)
        prompt, stats = list(SHORT), []
        for turn in range(4):
            result = model.generate(prompt, max_tokens=9 + turn, num_draft_tokens=4, ignore_eos=True, logprobs=1)
            prompt += result.tokens + random_tokens(3 + turn, seed=turn)[1:]
            stats.append(result.last.stats)
        assert any(turn.rounds_ahead for turn in stats) == ahead
        texts.append((prompt, stats))
    assert texts[0] == texts[1]


def test_the_draft_length_of_a_round_ahead_does_not_depend_on_the_report_before_it(tiny_models: Models) -> None:
    """With `auto`, the choice is made one round earlier. The text is the same, and so is the next run."""
    target, drafter = tiny_models("12b")
    plain = [token for report in reports(target, None, LONG, 0, ahead=False)[0] for token in report.tokens]
    scripted = Scripted(drafter, LONG, plain + [0] * 16)
    curve = mlx_mtp.load(mlx_mtp.DEMO_PAIR).calibrate().waiting
    runs = []
    for _ in range(2):
        stream = Stream(target, scripted, max_draft_tokens=8)
        policy = DraftLength(Costs(curve, curve._replace(verify=[0.5 * cost for cost in curve.verify])))
        runs.append(
            list(
                decode(stream, LONG, max_tokens=40, num_draft_tokens=policy, stop_ids=frozenset(), prefill_step_size=64)
            )
        )
    assert runs[0] == runs[1]
    assert [token for report in runs[0] for token in report.tokens] == plain
    # One draft token in the first two rounds: the second was chosen before the report of the first.
    assert [report.drafted for report in runs[0][1:3]] == [1, 1]
    assert runs[0][3].drafted > 1


def test_rounds_wait_where_the_host_has_a_part(tiny_pair: TinyPair) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    mapped = mlx_mtp.load(tiny_pair("e2b") / "target", per_layer_embeddings="mapped")
    options: dict[str, Any] = {"max_tokens": 20, "num_draft_tokens": 2}
    assert model.generate("hello", **options).last.stats.rounds_ahead > 0
    assert model.generate("hello", regex="[a-z]{30}", **options).last.stats.rounds_ahead == 0
    assert model.generate("hello", logits_processors=[lambda _, logits: logits], **options).last.stats.rounds_ahead == 0
    assert mapped.generate("hello", **options).last.stats.rounds_ahead == 0


@pytest.mark.parametrize("k", [0, 3])
def test_a_round_ahead_copies_a_buffer_at_most_once(tiny_models: Models, k: int) -> None:
    """A K/V buffer that a round in flight reads is copied when the next round writes it."""
    target, drafter = tiny_models("31b")
    stream = Stream(target, drafter, max_draft_tokens=3, rounds=CompiledRounds())
    stream.cache = Cache(target.config, target.dtype, max_block=4, capacity=64 * 1024)
    stream.prefill(LONG, 64)
    for _ in range(3):
        stream.round(k)
    size = sum(buffer.nbytes for buffer in stream.cache.arrays())
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    stream.dispatch(k)
    for _ in range(6):
        assert can_go_ahead(stream, k, k)
        stream.dispatch(k)
        stream.finish()
    stream.finish()
    assert mx.get_peak_memory() - active < 1.1 * size
