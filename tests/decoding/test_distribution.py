"""Sampled tokens have the distribution of plain sampling from the target: chi-square tests on small Markov tables.

Each test compares the joint distribution of the first k + 1 tokens of 100,000 rounds with the exact distribution, at a
significance of 1e-4. The tests detect a move of 2 % of the mass of one row of the target's table. This move changes
1 to 2 % of all sequences. The tests also detect the wrong acceptance rules below.
"""

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from support.distributions import Array, Tables, chi_square, make_tables, random_logits

from mlx_mtp.decoding import acceptance
from mlx_mtp.decoding.acceptance import Acceptance, accept_block, accept_matching
from mlx_mtp.decoding.sampling import Sampling, gumbel, position_key, uniform
from mlx_mtp.gemma4.drafter import Draft

DRAWS = 100_000

Rule = Callable[[Draft, mx.array, mx.array], Acceptance]


def rounds(
    tables: Tables, k: int, rule: Rule = accept_block, *, greedy_draft: bool = False, reported: Array | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first k + 1 tokens, [draws, k + 1], and the numbers of accepted draft tokens, [draws].

    If a round emits fewer tokens, plain sampling adds the rest. `reported` replaces the drafter logits for the rule.
    The draft tokens are still drawn from the drafter's own logits.
    """
    vocab_size, start = tables.vocab_size, mx.array(tables.vocab_size)
    p, q = tables.log_probabilities(tables.target), tables.log_probabilities(tables.drafter)
    claimed = q if reported is None else tables.log_probabilities(reported)
    ids = None if tables.ids is None else mx.array(tables.ids)

    def one(key: mx.array) -> tuple[mx.array, mx.array]:
        keys = mx.random.split(key, 2 * k + 3)
        # XTC's coins belong to positions. The drafter, the target and later rounds share them.
        coins = (mx.random.uniform(shape=(k + 1,), key=keys[0]) < tables.sampling.xtc_probability).astype(mx.int32)
        last, drafted, q_rows, id_rows, p_rows = start, [], [], [], [p[coins[0], start]]
        for i in range(k):
            row = q[coins[i], last]
            choice = mx.argmax(row) if greedy_draft else mx.random.categorical(row, key=keys[i + 1])
            q_rows.append(claimed[coins[i], last])
            if ids is not None:
                id_rows.append(ids[last])
                choice = ids[last][choice]
            last = choice.astype(mx.int32)
            drafted.append(last)
            p_rows.append(p[coins[i + 1], last])
        draft = Draft(mx.stack(drafted)[None], mx.stack(id_rows) if id_rows else None, mx.stack(q_rows))
        accepted, tokens = rule(draft, mx.stack(p_rows), keys[k + 1])
        sequence = [tokens[0]]
        for i in range(1, k + 1):
            later = mx.random.categorical(p[coins[i], sequence[-1]], key=keys[k + 1 + i]).astype(mx.int32)
            sequence.append(mx.where(accepted >= i, tokens[i], later))
        return mx.stack(sequence), accepted

    tokens, accepted = mx.vmap(one)(mx.random.split(mx.random.key(vocab_size * 100 + k), DRAWS))
    return np.array(tokens, np.int64), np.array(accepted, np.int64)


def misfit(tables: Tables, k: int, rule: Rule = accept_block, **options: object) -> float:
    tokens, _ = rounds(tables, k, rule, **options)  # type: ignore[arg-type]
    return chi_square(tokens, tables.expected(k + 1), tables.vocab_size)


DRAFTERS = ("good", "bad", "opposite", "adversarial", "identical")


def token_by_token(draft: Draft, log_probabilities: mx.array, key: mx.array) -> Acceptance:
    """Accept each token independently if u < p / q: rejection sampling (Leviathan et al. 2022)."""
    assert draft.log_probabilities is not None
    k = draft.tokens.shape[1]
    p, q = mx.exp(log_probabilities), mx.exp(draft.log_probabilities)
    uniform_key, next_key = mx.random.split(key)
    p_of, q_of = (mx.take_along_axis(x[:k], draft.tokens.T, axis=-1)[:, 0] for x in (p, q))
    passes = mx.random.uniform(shape=(k,), key=uniform_key) < p_of / q_of
    accepted = mx.cumprod(passes.astype(mx.int32)).sum()
    left = mx.where(accepted < k, mx.maximum(p[accepted] - q[mx.minimum(accepted, k - 1)], 0), p[k])
    left = mx.where(left.sum() > 0, left, p[accepted])
    following = mx.random.categorical(mx.log(left), key=next_key).astype(mx.int32)
    tokens = mx.concatenate([draft.tokens[0], mx.zeros(1, mx.int32)])
    return Acceptance(accepted, mx.where(mx.arange(k + 1) == accepted, following, tokens))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(("k", "vocab_size"), [(1, 6), (2, 6), (3, 4), (4, 4), (5, 3), (6, 3)])
def test_block_verification_is_plain_sampling(drafter: str, k: int, vocab_size: int) -> None:
    assert misfit(make_tables(drafter, vocab_size), k) < 1


WARPS = {
    "cold": Sampling(temperature=0.5),
    "hot": Sampling(temperature=2),
    "top_k": Sampling(temperature=1, top_k=3),
    "top_k all": Sampling(temperature=1.3, top_k=9),
    "top_p": Sampling(temperature=1, top_p=0.8),
    "min_p": Sampling(temperature=1, min_p=0.2),
    "XTC": Sampling(temperature=1, xtc_probability=0.5, xtc_threshold=0.15),
    "all": Sampling(temperature=1.5, top_k=3, top_p=0.95, min_p=0.05, xtc_probability=0.3, xtc_threshold=0.2),
}


@pytest.mark.parametrize("drafter", ["good", "bad"])
@pytest.mark.parametrize("name", WARPS)
def test_with_sampling_options_on_both_sides(name: str, drafter: str) -> None:
    """The filters exclude different tokens in p and in q, so each has zeros where the other has none."""
    tables = make_tables(drafter, 5, WARPS[name])
    excluded = [np.isinf(np.array(tables.log_probabilities(x))) for x in (tables.target, tables.drafter)]
    if "top" in name and name != "top_k all":
        assert (excluded[0] & ~excluded[1]).any()
        assert (excluded[1] & ~excluded[0]).any()
    assert misfit(tables, 3) < 1


@pytest.mark.parametrize("sampling", [Sampling(temperature=1), WARPS["all"]], ids=["plain", "all options"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_with_candidates_of_the_drafter(count: int, sampling: Sampling) -> None:
    """The candidates have any order and differ after every token. All other tokens have q = 0."""
    rng = np.random.default_rng(count)
    ids = np.stack([rng.permutation(5)[:count] for _ in range(6)]).astype(np.int32)
    logits = np.take_along_axis(make_tables("good", 5).drafter, ids, axis=1)
    assert misfit(Tables(random_logits(5, seed=5), logits, sampling, ids), 3) < 1


def test_candidates_in_order_are_the_whole_vocabulary() -> None:
    whole = make_tables("good", 5)
    listed = Tables(whole.target, whole.drafter, ids=np.tile(np.arange(5, dtype=np.int32), (6, 1)))
    assert all((ours == theirs).all() for ours, theirs in zip(rounds(listed, 3), rounds(whole, 3), strict=True))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("k", [2, 4])
def test_no_fewer_tokens_than_rejection_token_by_token(drafter: str, k: int) -> None:
    tables = make_tables(drafter, 4)
    ours, theirs = (rounds(tables, k, rule)[1].astype(float) for rule in (accept_block, token_by_token))
    error = np.hypot(ours.std(), theirs.std()) / DRAWS**0.5
    print(f"{drafter}, k = {k}: {ours.mean():.4f} accepted by block, {theirs.mean():.4f} token by token, +-{error:.4f}")
    assert ours.mean() >= theirs.mean() - 4 * error
    if drafter == "good":
        assert ours.mean() > theirs.mean() + 4 * error
    if drafter == "identical":
        assert ours.mean() > k - 1e-3


def test_the_test_accepts_another_right_rule() -> None:
    assert misfit(make_tables("good", 4), 3, token_by_token) < 1


@pytest.mark.parametrize("drafter", ["good", "bad", "opposite", "identical"])
def test_the_test_rejects_drafting_the_argmax_against_its_probability(drafter: str) -> None:
    """Hugging Face's assisted decoding: a greedy draft, accepted with probability p / q, and residual max(p - q, 0)."""
    assert misfit(make_tables(drafter, 4), 3, token_by_token, greedy_draft=True) > 20


@pytest.mark.parametrize("k", [3, 4])
def test_the_test_rejects_a_residual_without_weight(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = acceptance.next_token

    def wrong(draft: Draft, p: mx.array, q: mx.array, weights: mx.array, accepted: mx.array, key: mx.array) -> mx.array:
        return right(draft, p, q, mx.ones_like(weights), accepted, key)

    monkeypatch.setattr(acceptance, "next_token", wrong)
    assert misfit(make_tables("bad", 4), k) > 2


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_the_test_rejects_a_q_that_was_not_drawn_from(scale: float) -> None:
    tables = make_tables("good", 4)
    assert misfit(tables, 3, reported=tables.drafter * scale) > 5


@pytest.mark.parametrize("row", range(4))
def test_the_test_notices_small_changes(row: int) -> None:
    """A move of 2 % of one row's mass from its likeliest token to the second is detected."""
    tables = make_tables("good", 4)
    changed = np.exp(tables.target)
    first, second = changed[row].argsort()[::-1][:2]
    changed[row, first] -= 0.02
    changed[row, second] += 0.02
    tokens, _ = rounds(Tables(np.log(changed), tables.drafter), 3)
    assert chi_square(tokens, tables.expected(4), 4) > 1


def coupled_rounds(tables: Tables, k: int, first: int) -> tuple[NDArray[np.int64], ...]:
    """Return tokens of coupled rounds, accepted counts, and k + 1 tokens of plain sampling with the same noise."""
    p, q = (tables.log_probabilities(x)[0] for x in (tables.target, tables.drafter))
    start = mx.array(tables.vocab_size)

    def one(key: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        noise = gumbel(key, mx.array(first), k + 1, tables.vocab_size)
        last, drafted, p_rows, plain = start, [], [p[start]], []
        for i in range(k):
            last = mx.argmax(q[last] + noise[i]).astype(mx.int32)
            drafted.append(last)
            p_rows.append(p[last])
        accepted, tokens = accept_matching(mx.stack(drafted)[None], mx.stack(p_rows) + noise)
        last = start
        for i in range(k + 1):
            last = mx.argmax(p[last] + noise[i]).astype(mx.int32)
            plain.append(last)
        return tokens, accepted, mx.stack(plain)

    results = mx.vmap(one)(mx.random.split(mx.random.key(first), DRAWS))
    return tuple(np.array(result, np.int64) for result in results)


@pytest.mark.parametrize("first", [0, 2**16 - 2, 2**31 - 8])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_coupled_rounds_are_plain_sampling_with_the_same_noise(drafter: str, first: int) -> None:
    k, tables = 3, make_tables(drafter, 4)
    tokens, accepted, plain = coupled_rounds(tables, k, first)
    emitted = np.arange(k + 1) <= accepted[:, None]
    assert (tokens == plain)[emitted].all()
    assert (accepted == k).all() == (drafter == "identical")
    assert chi_square(plain, tables.expected(k + 1), 4) < 1


def test_noise_differs_between_positions_and_seeds() -> None:
    """Neighbours share no random numbers: all keys, coins and rows of noise are different."""
    keys = [stream for seed in range(20) for stream in mx.random.split(mx.random.key(seed))]
    positions = [*range(200), *range(2**16 - 100, 2**16 + 100), *range(2**18 - 100, 2**18)]
    by_position = [position_key(key, mx.array(position)) for key in keys for position in positions]
    assert len(np.unique(np.array(mx.stack(by_position)), axis=0)) == len(keys) * len(positions)
    rows = [np.array(gumbel(key, mx.array(first), 4, 3)) for key in keys for first in (0, 4, 2**16 - 4, 2**16)]
    noise = np.concatenate(rows)
    assert len(np.unique(noise)) > 0.999 * noise.size
    correlation = np.corrcoef(np.array(gumbel(keys[0], mx.array(2**16 - 3), 6, 20_000)))
    assert abs(correlation - np.eye(6)).max() < 0.03


def test_noise_of_a_position_does_not_depend_on_where_its_round_begins() -> None:
    key, vocab_size = mx.random.key(3), 7
    for position in (5, 2**16, 2**16 + 1, 2**20):
        whole = gumbel(key, mx.array(position - 2), 4, vocab_size)
        assert (whole[2] == gumbel(key, mx.array(position), 1, vocab_size)[0]).all()
        coins = uniform(key, mx.array(position - 2), 4)
        assert coins[2] == uniform(key, mx.array(position), 1)[0]


def reference(logits: Array, sampling: Sampling, coin: float) -> Array:
    """Compute probabilities in mlx-lm's order: top-p, min-p, XTC, top-k, temperature."""
    p: Array = np.exp(logits - logits.max())
    p /= p.sum()
    above = np.array([p[p > x].sum() for x in p])
    p = np.where(above < sampling.top_p, p, 0)
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    share = p / p.sum()
    exceeding = share > sampling.xtc_threshold
    if coin < sampling.xtc_probability and exceeding.any():
        p = np.where(share > share[exceeding].min(), 0, p)
    if sampling.top_k:
        p[np.argsort(-p)[sampling.top_k :]] = 0
    p = np.where(p > 0, p, 0) ** (1 / sampling.temperature)
    p /= p.sum()
    return p


OPTIONS = [
    Sampling(temperature=t, top_k=top_k, top_p=top_p, min_p=min_p, xtc_probability=xtc, xtc_threshold=threshold)
    for t, top_k, top_p, min_p, (xtc, threshold) in itertools.product(
        (0.5, 1.0, 2.0), (0, 1, 4, 12, 50), (1.0, 0.9, 0.3), (0.0, 0.1, 1.0), ((0.0, 0.1), (1.0, 0.1), (0.5, 0.02))
    )
]


def test_log_probabilities_are_those_of_a_plain_implementation() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 12)) * 2
    coins = np.array([0.0, 0.49, 0.51])
    for sampling in OPTIONS:
        ours = np.exp(np.array(sampling.log_probabilities(mx.array(logits, dtype=mx.float32), mx.array(coins))))
        theirs = np.stack([reference(row, sampling, coin) for row, coin in zip(logits, coins, strict=True)])
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=str(sampling))
        assert ((ours == 0) == (theirs == 0)).all(), sampling


def test_log_probabilities_are_those_of_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits before mlx-lm's last step, the draw, equal the project's own except for a constant."""
    from mlx_lm import sample_utils

    monkeypatch.setattr(sample_utils, "categorical_sampling", lambda logits, temp: logits / temp)
    logits = mx.array(np.random.default_rng(1).standard_normal((1, 12)) * 2, dtype=mx.float32)
    for sampling in OPTIONS:
        if sampling.xtc_probability == 0.5 or sampling.top_k >= 12:
            continue  # mlx-lm draws a coin of its own, and refuses a top_k of the whole vocabulary.
        sampler = sample_utils.make_sampler(
            temp=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            xtc_probability=sampling.xtc_probability,
            xtc_threshold=sampling.xtc_threshold,
        )
        theirs = mx.softmax(sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True)), axis=-1)
        ours = mx.exp(sampling.log_probabilities(logits, mx.zeros(1)))
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-6, err_msg=str(sampling))


def test_the_draws_of_mlx_lm_have_our_distribution() -> None:
    """mlx-lm's sampler draws from the same distribution, including XTC's coin."""
    from mlx_lm.sample_utils import make_sampler

    sampling = Sampling(temperature=0.8, top_p=0.9, min_p=0.05, xtc_probability=0.4, xtc_threshold=0.2)
    logits = mx.array(random_logits(6, seed=3)[:1], dtype=mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    sampler = make_sampler(temp=0.8, top_p=0.9, min_p=0.05, xtc_probability=0.4, xtc_threshold=0.2)
    mx.random.seed(0)
    # mlx-lm draws one coin per call, so each draw is one call.
    tokens = np.array(mx.concatenate([sampler(logits) for _ in range(4000)]), np.int64)
    without, applied = (np.exp(np.array(sampling.log_probabilities(logits, mx.array([c]))))[0] for c in (1.0, 0.0))
    assert abs(without - applied).max() > 0.1
    expected = (0.6 * without + 0.4 * applied).astype(np.float64)
    assert chi_square(tokens[:, None], expected, 6) < 1
