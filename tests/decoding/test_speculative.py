"""The round: greedy output is the target's own for any draft, and the state after it equals that of plain decoding."""

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import LONG, SHORT, Models, Scripted, assert_same_state
from support.tiny import VARIANTS, WINDOW, load_drafter, load_target, random_tokens

import mlx_mtp
from mlx_mtp.bench.operations import operations, round_outputs
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.constraints import Guide
from mlx_mtp.decoding.host import Host
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode, token_budget
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.gemma4.device_checks import check_products
from mlx_mtp.gemma4.drafter import Drafter, DraftInputs
from mlx_mtp.gemma4.kv_cache import CAPACITY_STEP, Cache
from mlx_mtp.gemma4.target import Target

TOKENS = 50
# With TOKENS after this prompt, the K/V buffers of full attention grow once.
GROWING = random_tokens(CAPACITY_STEP - 25, seed=2)


def run(
    target: Target,
    drafter: Drafter | None,
    prompt: list[int],
    k: int,
    *,
    max_tokens: int = TOKENS,
    stop_ids: frozenset[int] = frozenset(),
    max_context: int = 4096,
    step: int = 64,
) -> tuple[list[int], Stats, Stream]:
    """Decode in compiled rounds. Return the tokens, the statistics and the stream afterwards."""
    stream = Stream(target, drafter, max_draft_tokens=k, rounds=CompiledRounds())
    tokens: list[int] = []
    stats = Stats()
    budget = token_budget(prompt, max_tokens, max_context)
    for result in decode(
        stream, prompt, max_tokens=budget, num_draft_tokens=k, stop_ids=stop_ids, prefill_step_size=step
    ):
        if tokens:
            stats.add(result.drafted, result.accepted)
        tokens += result.tokens
    return tokens, stats, stream


@pytest.fixture(scope="module")
def plain(tiny_models: Models) -> Callable[[str, tuple[int, ...]], list[int]]:
    """TOKENS tokens of plain decoding, by variant and prompt."""
    known: dict[tuple[str, tuple[int, ...]], list[int]] = {}

    def tokens(variant: str, prompt: tuple[int, ...]) -> list[int]:
        if (variant, prompt) not in known:
            known[variant, prompt] = run(tiny_models(variant)[0], None, list(prompt), 0)[0]
        return known[variant, prompt]

    return tokens


Plain = Callable[[str, tuple[int, ...]], list[int]]


@pytest.mark.parametrize(
    ("variant", "k"),
    [("e2b", 1), ("e2b", 4), ("12b", 2), ("12b", 8), ("26b", 3), ("26b", 5), ("31b", 4), ("31b", 8)],
)
def test_speculative_greedy_is_plain_greedy(tiny_models: Models, plain: Plain, variant: str, k: int) -> None:
    """The drafter is random, perfect, or right for the first half of each block."""
    target, drafter = tiny_models(variant)
    for prompt, draft_randomly in ((SHORT, k % 2 == 1), (GROWING, k % 2 == 0)):
        reference = plain(variant, tuple(prompt))
        assert len(reference) == TOKENS
        assert len(set(reference)) > 20, "the plain text is too repetitive to prove anything"
        tokens, stats, stream = run(target, Scripted(drafter, prompt, reference), prompt, k)
        assert tokens == reference
        assert stream.cache.capacity == CAPACITY_STEP * (2 if prompt is GROWING else 1)
        assert stats.accepted == stats.drafted
        assert stats.rounds == -(-(TOKENS - 1) // (k + 1))
        if draft_randomly:
            tokens, stats, _ = run(target, drafter, prompt, k)
            assert tokens == reference
            assert stats.drafted > 0
        else:
            wrong = tuple(range(k // 2, k))
            tokens, stats, _ = run(target, Scripted(drafter, prompt, reference, wrong), prompt, k)
            assert tokens == reference
            assert all(share == (at not in wrong) for at, share in enumerate(stats.acceptance_by_position))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_four_bit_pair_with_float32_activations(tiny_pair: Callable[[str], Path], variant: str) -> None:
    target, _ = load_target(tiny_pair(variant) / "target")
    drafter, _ = load_drafter(tiny_pair(variant) / "target-assistant")
    modules: list[nn.Module] = [target, drafter]
    for module in modules:
        nn.quantize(module, group_size=64, bits=4)
        mx.eval(module.parameters())
        check_products(module, target.dtype)
    reference, _, _ = run(target, None, LONG, 0, max_tokens=80)
    assert len(set(reference)) > 20
    for k in (1, 8):
        assert run(target, drafter, LONG, k, max_tokens=30)[0] == reference[:30]
        tokens, stats, _ = run(target, Scripted(drafter, LONG, reference), LONG, k, max_tokens=80)
        assert tokens == reference
        assert stats.accepted == stats.drafted


@pytest.mark.parametrize("step", [1, 7, WINDOW + 4, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunk_size_of_prefill_does_not_matter(tiny_models: Models, plain: Plain, variant: str, step: int) -> None:
    target, drafter = tiny_models(variant)
    assert run(target, drafter, LONG, 3, step=step, max_tokens=20)[0] == plain(variant, tuple(LONG))[:20]


# Each tuple holds the number of draft tokens of a round and the number of right draft tokens.
rounds = st.integers(0, 4).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    chunk=st.integers(1, 2 * WINDOW),
    length=st.integers(1, len(LONG)),
    history=st.lists(rounds, min_size=1, max_size=10),
)
def test_any_rounds_and_rejections_leave_the_state_of_a_fresh_fill(
    tiny_models: Models, plain: Plain, variant: str, chunk: int, length: int, history: list[tuple[int, int]]
) -> None:
    target, drafter = tiny_models(variant)
    prompt = LONG[:length]
    reference = plain(variant, tuple(prompt)) if length == len(LONG) else run(target, None, prompt, 0, max_tokens=60)[0]
    stream = Stream(target, None, max_draft_tokens=4)
    tokens = stream.prefill(prompt, chunk).tokens
    for k, right in history:
        wrong_at = tuple(range(right, k))
        stream.parts = stream.parts._replace(drafter=Scripted(drafter, prompt, reference, wrong_at))
        result = stream.round(k)
        assert result.accepted == right
        tokens += result.tokens
    assert tokens == reference[: len(tokens)]
    assert_same_state(stream, target, prompt + tokens[:-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stop_inside_a_block_ends_there_and_leaves_exactly_the_emitted_tokens(
    tiny_models: Models, plain: Plain, variant: str
) -> None:
    target, drafter = tiny_models(variant)
    reference = plain(variant, tuple(LONG))
    # The stop token first appears in the middle of a block of four.
    end = next(i for i in range(18, TOKENS) if i % 5 == 2 and reference[i] not in reference[:i])
    stop_ids = frozenset({reference[end]})
    perfect = Scripted(drafter, LONG, reference)
    tokens, _, stream = run(target, perfect, LONG, 4, stop_ids=stop_ids)
    assert tokens == reference[: end + 1]
    assert_same_state(stream, target, LONG + tokens[:-1])


def test_the_first_token_may_be_the_stop(tiny_models: Models, plain: Plain) -> None:
    target, drafter = tiny_models("e2b")
    first = plain("e2b", tuple(SHORT))[0]
    assert run(target, drafter, SHORT, 3, stop_ids=frozenset({first}))[0] == [first]


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 17])
def test_never_more_than_max_tokens(tiny_models: Models, plain: Plain, k: int, max_tokens: int) -> None:
    target, drafter = tiny_models("31b")
    reference = plain("31b", tuple(SHORT))
    tokens, _, stream = run(target, Scripted(drafter, SHORT, reference), SHORT, k, max_tokens=max_tokens)
    assert tokens == reference[:max_tokens]
    assert stream.cache.length == len(SHORT) + max_tokens - 1


@pytest.mark.parametrize("k", [0, 3])
def test_stops_at_the_context_limit(tiny_models: Models, plain: Plain, k: int) -> None:
    target, drafter = tiny_models("12b")
    tokens, _, _ = run(target, drafter, LONG, k, max_context=len(LONG) + 10)
    assert tokens == plain("12b", tuple(LONG))[:10]
    with pytest.raises(PromptError, match=f"the prompt has {len(LONG)} tokens, but the context holds {len(LONG)}"):
        run(target, drafter, LONG, k, max_context=len(LONG))


def test_bad_arguments(tiny_models: Models) -> None:
    target, drafter = tiny_models("e2b")
    with pytest.raises(PromptError, match="the prompt is empty"):
        run(target, drafter, [], 3)
    with pytest.raises(OptionError, match="3 draft tokens asked for without a drafter"):
        run(target, None, SHORT, 3)


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_drafter_never_sees_a_rejected_row(
    tiny_models: Models, plain: Plain, variant: str, prompt: list[int]
) -> None:
    """After rounds with rejections, the drafts equal those from a cache that never held a rejected token."""
    target, drafter = tiny_models(variant)
    reference = plain(variant, tuple(prompt))
    stream = Stream(target, Scripted(drafter, prompt, reference, wrong_at=(1, 2, 3)), max_draft_tokens=4)
    tokens = stream.prefill(prompt, 64).tokens
    untouched = Stream(target, None, max_draft_tokens=4)
    untouched.prefill(prompt, 64)
    for _ in range(12):
        emitted = stream.round(4).tokens
        tokens += emitted
        for _ in emitted:
            untouched.round(0)
        ours, theirs = (
            drafter.draft(
                target, DraftInputs(mx.array([[tokens[-1]]]), s.state.hidden, drafter.draft_context(s.cache), 4)
            )
            for s in (stream, untouched)
        )
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        step, clean = (
            drafter(target.embed(mx.array([[tokens[-1]]])), s.state.hidden, drafter.draft_context(s.cache))
            for s in (stream, untouched)
        )
        np.testing.assert_allclose(np.array(step.hidden), np.array(clean.hidden), atol=1e-4)


def test_the_first_round_after_a_long_prompt_sees_the_right_rows_and_the_window_stays(tiny_models: Models) -> None:
    """From the first round on, the drafter sees the same number of rows: the last window + 1, with the newest row."""
    target, drafter = tiny_models("e2b")
    stream = Stream(target, drafter, max_draft_tokens=3)
    stream.prefill(LONG, 1000)
    everything = Cache(target.config, target.dtype, max_block=len(LONG) + 60)
    target(mx.array([LONG]), everything)
    for round_index in range(10):
        view = stream.cache.draft_view("sliding_attention")
        seen = np.array(view.keys)[0, 0][np.array(view.mask)[0]]
        assert len(seen) == WINDOW + 1
        if round_index == 0:
            # This cache never wrapped, so its rows are in order of position.
            layer = target.config.last_kv_layer("sliding_attention")
            last = np.array(everything.keys[layer])[0, 0][len(LONG) - WINDOW - 1 : len(LONG)]
            np.testing.assert_allclose(np.sort(seen, axis=0), np.sort(last, axis=0), atol=1e-5)
        assert np.array(stream.cache.draft_view("full_attention").mask).sum() == stream.cache.length
        stream.round(3)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, acceptance="coupled")])
def test_plain_rounds_compute_nothing_of_no_drafts(tiny_models: Models, sampling: Sampling) -> None:
    """A product over zero draft tokens ends the process on MLX's CUDA backend. An empty context needs no slice."""
    target, drafter = tiny_models("e2b")
    found = [set(operations(round_outputs(target, drafter, k, sampling))) for k in (0, 1)]
    assert "CumProd" in found[1] - found[0]
    assert "DynamicSlice" not in found[0] | found[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_one_host_read_per_round(tiny_models: Models, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Values are evaluated and read once per round only. An `.item()` in a draft step would be another read."""
    target, drafter = tiny_models("e2b")
    stream = Stream(target, drafter, max_draft_tokens=4, rounds=CompiledRounds() if compiled else None)
    stream.prefill(SHORT, 64)
    calls = {"eval": 0, "read": 0}
    real_eval = mx.eval

    def counting_eval(*arrays: object) -> None:
        calls["eval"] += 1
        real_eval(*arrays)

    monkeypatch.setattr(mx, "eval", counting_eval)
    read = Host.wait_for

    def counting_read(host: Host, report: mx.array) -> list[int]:
        calls["read"] += 1
        return read(host, report)

    monkeypatch.setattr(Host, "wait_for", counting_read)
    rounds = [stream.round(4) for _ in range(5)]
    assert calls == {"eval": 5, "read": 5}
    assert [result.host_reads for result in rounds] == [1] * 5


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_drafting_reads_nothing(tiny_models: Models, variant: str) -> None:
    """Draft steps can be traced, and in a trace `.item()` is an error. So both heads stay on the device."""
    target, drafter = tiny_models(variant)
    stream = Stream(target, drafter, max_draft_tokens=4)
    stream.prefill(LONG, 64)
    context = drafter.draft_context(stream.cache)

    def draft(token: mx.array, hidden: mx.array) -> mx.array:
        return drafter.draft(target, DraftInputs(token, hidden, context, 4)).tokens

    bonus, hidden = stream.state.bonus, stream.state.hidden
    traced = mx.vmap(draft)(bonus[None], hidden[None])[0]
    assert traced.tolist() == draft(bonus, hidden).tolist()


class AnyToken:
    """A matcher that allows every text."""

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        ctypes.memset(address, 0xFF, size)

    def is_error(self) -> bool:
        return False

    def is_accepting(self) -> bool:
        return True

    def consume_token(self, token: int) -> bool:
        return True

    def rollback(self, count: int) -> bool:
        return True


@pytest.mark.in_place
@pytest.mark.parametrize(("guided", "compiled"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("k", [0, 3])
def test_a_round_copies_no_buffer(tiny_models: Models, k: int, guided: bool, compiled: bool) -> None:
    """Drafting, verifying and accepting hold no old K/V view. A round's peak does not grow with the buffers.

    This is also true if a guide reads draft tokens one by one.
    """
    target, drafter = tiny_models("31b")
    peaks, sizes, rounds = [], [], CompiledRounds() if compiled else None
    for capacity in (1024, 64 * 1024):
        guide = Guide(512, [], matcher=AnyToken()) if guided else None  # type: ignore[arg-type]
        stream = Stream(target, drafter, max_draft_tokens=3, guide=guide, rounds=rounds)
        stream.cache = Cache(target.config, target.dtype, max_block=4, capacity=capacity)
        stream.prefill(LONG, 64)
        for _ in range(3):
            stream.round(k)
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(5):
            stream.round(k)
        peaks.append(mx.get_peak_memory() - active)
        sizes.append(sum(buffer.nbytes for buffer in stream.cache.arrays()))
    assert sizes[1] > sizes[0] + 50e6
    assert peaks[1] < peaks[0] + 1e6


OPTIONS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=1),
    Sampling(temperature=1.2, acceptance="coupled", min_p=0.01, seed=2, repetition_penalty=1.3, xtc_probability=0.5),
]


@pytest.mark.parametrize("sampling", OPTIONS, ids=["greedy", "block", "coupled"])
def test_a_compiled_round_is_the_round(tiny_models: Models, sampling: Sampling) -> None:
    """Tokens, log probabilities and state are equal while the buffers grow. Each shape is traced once."""
    target, drafter = tiny_models("e2b")
    prompt, rounds = random_tokens(240, seed=3), CompiledRounds()
    for seed in (sampling.seed, sampling.seed + 1):
        streams = [
            Stream(
                target,
                drafter,
                max_draft_tokens=3,
                sampling=replace(sampling, seed=seed),
                logprobs=2,
                rounds=compiled,
            )
            for compiled in (None, rounds)
        ]
        eager, compiled = ([stream.prefill(prompt, 64)] for stream in streams)
        for _ in range(20):
            for stream, seen in zip(streams, (eager, compiled), strict=True):
                seen.append(stream.round(3))
        for left, right in zip(eager, compiled, strict=True):
            assert left[:3] == right[:3]
            assert left.logprobs is not None
            assert right.logprobs is not None
            np.testing.assert_allclose([p.token for p in left.logprobs], [p.token for p in right.logprobs], atol=1e-3)
        assert streams[1].cache.length == streams[0].cache.length
        np.testing.assert_allclose(streams[1].state.hidden, streams[0].state.hidden, atol=1e-3)
        assert streams[0].cache.length + 4 < 1024
    # Texts of up to 512 tokens see 256 rows, then 512 rows. Another seed reuses the same round.
    assert len(rounds.traces) == len(set(rounds.traces))
    assert [shape[:2] for shape in rounds.traces] in ([(3, 256)], [(3, 256), (3, 512)])


def test_compiled_rounds_do_not_keep_a_stream_alive(tiny_models: Models) -> None:
    """The rounds hold no buffers of the stream, and they are free themselves when the pair is no longer used."""
    target, drafter = tiny_models("31b")
    rounds = CompiledRounds()
    stream = Stream(target, drafter, max_draft_tokens=3, rounds=rounds)
    stream.cache = Cache(target.config, target.dtype, max_block=4, capacity=64 * 1024)
    stream.prefill(SHORT, 64)
    for _ in range(4):
        stream.round(3)
    assert len(rounds.traces) == 1
    size = sum(buffer.nbytes for buffer in stream.cache.arrays())
    before = mx.get_active_memory()
    del stream
    assert mx.get_active_memory() < before - 0.99 * size
    reference = weakref.ref(rounds)
    del rounds
    assert reference() is None


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_second_run_of_a_text_has_the_bits_of_the_first(dtype: mx.Dtype) -> None:
    """The first run compiles its rounds when their shape occurs for the second time, and the second run has them."""
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    for module in (model.target, model.drafter):
        assert module is not None
        module.set_dtype(dtype)
    options = mlx_mtp.GenerationOptions(
        max_tokens=40, ignore_eos=True, num_draft_tokens=3, logprobs=1, reuse_prompt=False
    )
    runs = [[response.logprobs for response in model.stream_generate("def f(x):", options)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_an_accelerator_compiles_rounds_from_their_first_appearance(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, always in ((mx.cpu, False), (mx.gpu, True)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        assert mlx_mtp.load(mlx_mtp.DEMO_PAIR).parts.rounds.always == always
