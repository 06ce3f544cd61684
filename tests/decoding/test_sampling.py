"""Sampling in rounds: a seed fixes the tokens, by acceptance rule, and a real round has the right distribution."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.distributions import chi_square
from support.streams import LONG, SHORT, Models, Scripted, assert_same_state

from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode
from mlx_mtp.errors import OptionError
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import Cache, KVState
from mlx_mtp.gemma4.target import Target

OPTIONS = {
    "temperature": Sampling(temperature=1, seed=1, acceptance="coupled"),
    "top_k": Sampling(temperature=1.5, top_k=40, seed=2, acceptance="coupled"),
    "top_p": Sampling(temperature=2, top_p=0.9, seed=3, acceptance="coupled"),
    "min_p": Sampling(temperature=2, min_p=0.02, seed=4, acceptance="coupled"),
    "XTC": Sampling(temperature=1, xtc_probability=0.5, xtc_threshold=0.02, seed=5, acceptance="coupled"),
}
# At this temperature the random dense drafter and its target usually agree.
HOT = Sampling(temperature=4)
# After the short prompt, the texts grow over the window.
TOKENS = 60


def sample(
    target: Target,
    drafter: Drafter | None,
    prompt: list[int],
    k: int,
    sampling: Sampling,
    *,
    max_tokens: int = TOKENS,
    stop_ids: frozenset[int] = frozenset(),
) -> tuple[list[int], Stats, Stream]:
    stream = Stream(target, drafter, max_draft_tokens=k, sampling=sampling, rounds=CompiledRounds())
    tokens: list[int] = []
    stats = Stats()
    for result in decode(
        stream, prompt, max_tokens=max_tokens, num_draft_tokens=k, stop_ids=stop_ids, prefill_step_size=64
    ):
        if tokens:
            stats.add(result.drafted, result.accepted)
        tokens += result.tokens
    return tokens, stats, stream


Plain = Callable[[str, str, bool], list[int]]


@pytest.fixture(scope="module")
def plain(tiny_models: Models) -> Plain:
    """TOKENS tokens of plain sampling by variant, options, and whether the prompt is longer than the window."""
    known: dict[tuple[str, str, bool], list[int]] = {}

    def tokens(variant: str, name: str, is_long: bool) -> list[int]:
        key = variant, name, is_long
        if key not in known:
            target = tiny_models(variant)[0]
            known[key] = sample(target, None, LONG if is_long else SHORT, 0, OPTIONS[name])[0]
        return known[key]

    return tokens


# The cases have every option with both heads and every k. The prompts are short and long in turn.
COUPLED = [("e2b", "XTC", 1, True), ("31b", "min_p", 2, False), ("e2b", "top_p", 3, False), ("31b", "top_k", 4, True)]
COUPLED += [("e2b", "temperature", 5, True), ("31b", "XTC", 6, False), ("e2b", "min_p", 4, True)]
COUPLED += [("31b", "temperature", 3, True), ("31b", "top_p", 5, False), ("e2b", "top_k", 2, False)]


@pytest.mark.parametrize(("variant", "name", "k", "is_long"), COUPLED)
def test_coupled_tokens_do_not_depend_on_the_draft(
    tiny_models: Models, plain: Plain, variant: str, name: str, k: int, is_long: bool
) -> None:
    """The drafter is random, perfect, or right for the first half of each block."""
    target, drafter = tiny_models(variant)
    prompt, sampling = LONG if is_long else SHORT, OPTIONS[name]
    reference = plain(variant, name, is_long)
    assert len(set(reference)) > 40
    assert sample(target, drafter, prompt, k, sampling)[0] == reference
    tokens, stats, _ = sample(target, Scripted(drafter, prompt, reference), prompt, k, sampling)
    assert tokens == reference
    assert stats.accepted == stats.drafted
    wrong = tuple(range(k // 2, k))
    tokens, stats, stream = sample(target, Scripted(drafter, prompt, reference, wrong), prompt, k, sampling)
    assert tokens == reference
    assert_same_state(stream, target, prompt + tokens[:-1])


def test_coupled_drafts_share_the_noise(tiny_models: Models) -> None:
    """Coupling draws similar tokens from similar distributions. The random drafter is often right."""
    target, drafter = tiny_models("31b")
    coupled = sample(target, drafter, LONG, 3, replace(HOT, acceptance="coupled"))[1]
    assert coupled.acceptance_by_position[0] > 0.3


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_block_tokens_are_fixed_by_seed_and_draft_length(tiny_models: Models, variant: str) -> None:
    target, drafter = tiny_models(variant)

    def tokens(seed: int, k: int) -> list[int]:
        return sample(target, drafter, SHORT, k, replace(HOT, seed=seed), max_tokens=20)[0]

    for k in (0, 3):
        reference = tokens(7, k)
        assert tokens(7, k) == reference
        assert all(tokens(seed, k) != reference for seed in (6, 8, 2**64 - 1))


def global_state() -> list[Any]:
    states: Any = mx.random.state
    return [state.tolist() for state in states]


@pytest.mark.parametrize("acceptance", ["block", "coupled"])
def test_global_random_state_does_not_matter_and_is_left_alone(tiny_models: Models, acceptance: Any) -> None:
    target, drafter = tiny_models("31b")
    results = []
    for seed in (1, 2):
        mx.random.seed(seed)
        before = global_state()
        sampling = replace(HOT, top_k=300, top_p=0.95, min_p=0.01, xtc_probability=0.5, acceptance=acceptance)
        results.append(sample(target, drafter, SHORT, 3, sampling, max_tokens=20)[0])
        assert global_state() == before
    assert results[0] == results[1]


def test_temperature_zero_is_greedy_whatever_else_is_set(tiny_models: Models) -> None:
    target, drafter = tiny_models("e2b")
    greedy = sample(target, None, SHORT, 0, Sampling(), max_tokens=30)[0]
    for acceptance in ("block", "coupled"):
        sampling = Sampling(top_k=5, top_p=0.5, xtc_probability=1, seed=9, acceptance=acceptance)
        assert sample(target, drafter, SHORT, 3, sampling, max_tokens=30)[0] == greedy


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_of_one_is_greedy(tiny_models: Models, top_k: int) -> None:
    target, drafter = tiny_models("e2b")
    greedy = sample(target, None, LONG, 0, Sampling(), max_tokens=30)[0]
    for acceptance in ("block", "coupled"):
        sampling = Sampling(temperature=1, top_k=top_k, acceptance=acceptance)
        assert (sample(target, drafter, LONG, 3, sampling, max_tokens=30)[0] == greedy) == (top_k == 1)


def test_a_stop_inside_a_block(tiny_models: Models) -> None:
    """An accepted draft token is a stop token. No token after it is emitted or kept."""
    target, drafter = tiny_models("31b")
    stream = Stream(target, drafter, max_draft_tokens=4, sampling=HOT)
    blocks = list(decode(stream, LONG, max_tokens=100, num_draft_tokens=4, stop_ids=frozenset(), prefill_step_size=64))
    before: list[int] = []
    for block in blocks:
        if block.accepted >= 2 and block.tokens[1] not in [*before, block.tokens[0]]:
            break
        before += block.tokens
    else:
        pytest.fail("no block to stop in")
    stop_ids = frozenset({block.tokens[1]})
    tokens, _, stopped = sample(target, drafter, LONG, 4, HOT, stop_ids=stop_ids)
    assert tokens == before + block.tokens[:2]
    assert_same_state(stopped, target, LONG + tokens[:-1])


def test_a_coupled_stop_inside_a_block(tiny_models: Models, plain: Plain) -> None:
    target, drafter = tiny_models("e2b")
    reference, sampling = plain("e2b", "temperature", True), OPTIONS["temperature"]
    end = next(i for i in range(18, TOKENS) if i % 5 == 2 and reference[i] not in reference[:i])
    perfect = Scripted(drafter, LONG, reference)
    tokens, _, stream = sample(target, perfect, LONG, 4, sampling, stop_ids=frozenset({reference[end]}))
    assert tokens == reference[: end + 1]
    assert_same_state(stream, target, LONG + tokens[:-1])


@pytest.mark.parametrize(
    ("variant", "temperature", "acceptance", "seeds"),
    [
        ("12b", 4.0, "block", 600),
        ("31b", 4.0, "block", 400),
        ("31b", 4.0, "coupled", 400),
    ],
)
def test_the_token_a_round_decides_on_has_the_target_s_distribution(
    tiny_models: Models, variant: str, temperature: float, acceptance: Any, seeds: int
) -> None:
    """The test counts the first token of the round after prefill for many seeds, in classes of similar probability."""
    target, drafter = tiny_models(variant)
    sampling = Sampling(temperature=temperature, top_p=0.95, acceptance=acceptance)
    stream = Stream(target, drafter, max_draft_tokens=3, sampling=sampling, rounds=CompiledRounds())
    first = stream.prefill(LONG, 64).tokens[0]
    start = stream.state._replace(kv=KVState.none())
    cache = Cache(target.config, target.dtype, max_block=1)
    logits = target.soft_cap(target(mx.array([[*LONG, first]]), cache, logit_rows=1).logits[0])
    expected = np.exp(np.array(sampling.log_probabilities(logits, mx.ones(1)), np.float64))[0]
    drawn, accepted = [], 0
    for seed in range(seeds):
        stream.cache.set_length(len(LONG))
        draw_key, coin_key = mx.random.split(mx.random.key(seed))
        stream.state = start._replace(draw_key=draw_key, coin_key=coin_key, kv=stream.cache.kv)
        result = stream.round(3)
        drawn.append(result.tokens[0])
        accepted += result.accepted > 0
    print(f"{accepted / seeds:.1%} of the rounds accepted a draft token")
    assert accepted > seeds / 50
    order = np.argsort(-expected)
    classes = np.empty(len(expected), np.int64)
    classes[order] = np.minimum(np.cumsum(expected[order]) * 11, 10.999).astype(np.int64)
    classes[expected == 0] = 11
    chances = np.bincount(classes, weights=expected, minlength=12)
    assert chi_square(classes[drawn][:, None], chances / chances.sum(), 12) < 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be at least 0, found -0.1"),
        ("temperature", float("inf"), "temperature must be at least 0, found inf"),
        ("temperature", float("nan"), "temperature must be at least 0, found nan"),
        ("temperature", "1", "temperature must be a number, found '1'"),
        ("temperature", True, "temperature must be a number, found True"),
        ("top_k", -1, "top_k must be at least 0, found -1"),
        ("top_k", 1.0, "top_k must be an integer, found 1.0"),
        ("top_p", 0, "top_p must be at least 1e-06, found 0"),
        ("top_p", 1.1, "top_p must be between 0 and 1, found 1.1"),
        ("top_p", None, "top_p must be a number, found None"),
        ("min_p", -0.5, "min_p must be between 0 and 1, found -0.5"),
        ("xtc_probability", 2, "xtc_probability must be between 0 and 1, found 2"),
        ("xtc_threshold", 0.6, "xtc_threshold must be between 0 and 0.5, found 0.6"),
        ("seed", -1, "seed must be between 0 and"),
        ("seed", 2**64, "seed must be between 0 and"),
        ("seed", 0.0, "seed must be an integer, found 0.0"),
        ("seed", False, "seed must be an integer, found False"),
        ("acceptance", "leviathan", "acceptance must be one of block, coupled, found 'leviathan'"),
    ],
)
def test_options_out_of_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError) as error:
        Sampling(**{field: value})
    assert str(error.value).startswith(message)


def test_options_at_the_ends_of_their_ranges() -> None:
    Sampling(temperature=0, top_k=0, top_p=1, min_p=0, xtc_probability=0, xtc_threshold=0, seed=0)
    Sampling(temperature=100, top_k=10**9, top_p=1e-6, min_p=1, xtc_probability=1, xtc_threshold=0.5, seed=2**64 - 1)
