"""Training matches decoding: it has the same draft steps and counts acceptance alike."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.tiny import VARIANTS, WINDOW, random_tokens

from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target
from mlx_mtp.training.centroids import balanced_clusters, start_from_target
from mlx_mtp.training.losses import (
    StepLoss,
    acceptance_lengths,
    compute_target_states,
    objective,
    unroll,
    unrolled_states,
)

Models = Callable[[str], tuple[Target, Drafter]]
TOKENS = random_tokens(4 * WINDOW, seed=3)
STEPS = 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_unrolled_pass_is_the_decode_loops_draft_steps(tiny_models: Models, variant: str) -> None:
    """Positions are before and far past the sliding window. Both heads' states are compared in float32."""
    target, drafter = tiny_models(variant)
    target_states = compute_target_states(target, TOKENS)
    rows = len(TOKENS) - STEPS
    states = unrolled_states(drafter, target_states, 1, rows, STEPS)
    for bonus in (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 3 * WINDOW, rows):
        cache = Cache(target.config, target.dtype, max_block=STEPS + 1)
        output = target(mx.array([TOKENS[:bonus]]), cache)
        cache.set_length(bonus)
        context, hidden = drafter.draft_context(cache), output.hidden[:, -1:]
        for step in range(STEPS):
            embedding = target.embed(mx.array([[TOKENS[bonus + step]]]))
            state, hidden = drafter(embedding, hidden, context)
            expected = np.array(drafter.model.embed_tokens.as_linear(state))[0, 0]
            found = np.array(drafter.model.embed_tokens.as_linear(states[step][:, bonus - 1 : bonus]))[0, 0]
            assert np.abs(expected - found).max() < 1e-4


def test_passes_over_parts_of_a_text_are_the_pass_over_all(tiny_models: Models) -> None:
    """Parts bound the memory. Recomputation instead of storage also changes nothing."""
    target, drafter = tiny_models("e2b")
    target_states = compute_target_states(target, TOKENS)
    rows = len(TOKENS) - STEPS
    whole = unroll(target, drafter, target_states, 1, rows, STEPS)
    parts = [
        unroll(target, drafter, target_states, first, min(13, rows + 1 - first), STEPS)
        for first in range(1, rows + 1, 13)
    ]
    for step in range(STEPS):
        for name in StepLoss._fields:
            joined = mx.concatenate([getattr(part[step], name) for part in parts])
            assert mx.allclose(joined, getattr(whole[step], name), atol=1e-5)

    def gradients(checkpoint: bool) -> list[mx.array]:
        def loss() -> mx.array:
            losses = unroll(target, drafter, target_states, 1, rows, STEPS, checkpoint=checkpoint)
            return objective(losses, by_reach=True)

        drafter.unfreeze()
        assert drafter.masked_embedding is not None
        drafter.masked_embedding.freeze(recurse=False, keys="token_ordering")
        _, found = nn.value_and_grad(drafter, loss)()
        flat: dict[str, mx.array] = tree_flatten(found, destination={})  # type: ignore[assignment]
        return list(flat.values())

    for kept, computed_again in zip(gradients(False), gradients(True), strict=True):
        assert mx.allclose(kept, computed_again, atol=1e-6)
        assert mx.abs(kept).max() > 0


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_acceptance_is_counted_as_decoding_draws(tiny_models: Models, variant: str) -> None:
    """The probabilities come from the candidates of decoding's own head, and are zero for all other tokens."""
    target, drafter = tiny_models(variant)
    target_states = compute_target_states(target, TOKENS)
    states = unrolled_states(drafter, target_states, 1, 40, STEPS)
    losses = unroll(target, drafter, target_states, 1, 40, STEPS)
    for step in range(STEPS):
        for row in range(0, 40, 7):
            candidates = drafter.candidates(states[step][:, row : row + 1])
            ids = np.arange(512) if candidates.ids is None else np.array(candidates.ids[0])
            q = np.zeros(512)
            q[ids] = np.array(mx.softmax(candidates.logits[0]))
            logits = target.soft_cap(target.embed_tokens.as_linear(target_states.hidden[0, row + 1 + step]))
            p = np.array(mx.softmax(logits))
            assert losses[step].accepted[row].item() == pytest.approx(np.minimum(p, q).sum(), abs=1e-4)
            assert losses[step].agrees[row].item() == (p.argmax() == q.argmax())
            full = np.array(mx.softmax(drafter.model.embed_tokens.as_linear(states[step][0, row])))
            assert losses[step].divergence[row].item() == pytest.approx((p * np.log(p / full)).sum(), abs=1e-3)
    sampled, greedy = acceptance_lengths(losses)
    chances = np.array([[step.accepted[row].item() for step in losses] for row in range(40)])
    assert np.allclose(np.array(sampled), 1 + chances.cumprod(axis=1).sum(axis=1), atol=1e-5)
    agrees = np.array([[step.agrees[row].item() for step in losses] for row in range(40)])
    assert np.allclose(np.array(greedy), 1 + agrees.cumprod(axis=1).sum(axis=1))
    divergences = np.array([np.array(step.divergence + step.centroids) for step in losses]).T
    reach = np.concatenate([np.ones((40, 1)), chances[:, :-1]], axis=1).cumprod(axis=1)
    assert objective(losses, by_reach=True).item() == pytest.approx((reach * divergences).sum() / reach.sum(), rel=1e-4)
    assert objective(losses, by_reach=False).item() == pytest.approx(divergences.mean(), rel=1e-4)


def test_a_head_started_from_the_target(tiny_models: Models) -> None:
    """Clusters have equal size and hold tokens that are similar for the target."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(8, 16))
    truth = np.repeat(np.arange(8), 32)
    order = rng.permutation(256)
    rows = (centers[truth] + 0.1 * rng.normal(size=(256, 16)))[order].astype(np.float32)
    clusters = balanced_clusters(rows, 8, seed=1)
    assert np.bincount(clusters).tolist() == [32] * 8
    same = clusters[:, None] == clusters[None]
    assert (same == (truth[order][:, None] == truth[order][None])).mean() > 0.99
    target, drafter = tiny_models("e2b")
    fresh = Drafter(drafter.config)
    start_from_target(fresh, target, seed=0)
    assert fresh.masked_embedding is not None
    assert sorted(np.array(fresh.masked_embedding.token_ordering).tolist()) == list(range(512))
    # For a hidden state, the head gives the target's logits up to a constant.
    hidden = mx.random.normal((1, 3, target.config.hidden_size), key=mx.random.key(0))
    size = target.config.hidden_size
    state = hidden @ fresh.pre_projection.weight[:, size:].T
    own, theirs = (
        np.array(x)[0] for x in (fresh.model.embed_tokens.as_linear(state), target.embed_tokens.as_linear(hidden))
    )
    if fresh.config.text.hidden_size >= size:
        assert np.allclose(
            own - own.mean(axis=1, keepdims=True), theirs - theirs.mean(axis=1, keepdims=True), atol=1e-3
        )
        assert np.allclose(np.array(fresh.post_projection(state)), np.array(hidden), atol=1e-3)
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(own, theirs, strict=True)]) > 0.5
