"""What a drafter is trained on: its draft steps at all positions of a text at once, against the target's distributions.

A draft step sees the target's K/V before the bonus token and nothing of the draft but its own hidden state, so the
steps of all positions differ in their masks alone and run as one pass, each fed with the text's own next token. The
layers are those of decoding; `tests/test_distill.py` holds that the logits are, too.
"""

from typing import NamedTuple

import mlx.core as mx
from mlx.nn.utils import checkpoint as checkpointed

from .cache import Cache, View
from .config import LayerType
from .drafter import DraftContext, Drafter
from .gemma4 import Target


class Lesson(NamedTuple):
    """What the frozen target says of one text of T tokens: all that training needs to know of it.

    `embeddings` and `hidden` are [1, T, hidden_size], `keys_values` the K/V rows the drafter reads by layer type,
    [1, kv_heads, T, head_dim] each.
    """

    embeddings: mx.array
    hidden: mx.array
    keys_values: dict[LayerType, tuple[mx.array, mx.array]]


class StepLoss(NamedTuple):
    """Of one draft step, by position, float32 [rows].

    `divergence` is KL(target || drafter) over the vocabulary, `centroids` the same over the clusters of a centroid head
    (zero for a dense head); both in nats. `accepted` is the chance that a draft token drawn from the drafter would be
    accepted, sum(min(p, q)), with q as decoding draws it: zero outside the centroid candidates. `agrees` is 1 where the
    likeliest tokens are the same.
    """

    divergence: mx.array
    centroids: mx.array
    accepted: mx.array
    agrees: mx.array


def study(target: Target, tokens: list[int]) -> Lesson:
    """Pass a text through the target."""
    cache = Cache(target.config, target.dtype, max_block=len(tokens), capacity=len(tokens))
    ids = mx.array([tokens], mx.int32)
    output = target(ids, cache)
    keys_values: dict[LayerType, tuple[mx.array, mx.array]] = {}
    for layer_type in ("sliding_attention", "full_attention"):
        layer = target.config.last_kv_layer(layer_type)
        # The ring is longer than the text, so that row p holds position p in both kinds of buffer.
        keys_values[layer_type] = (
            cache.keys[layer][:, :, : len(tokens)],
            cache.values[layer][:, :, : len(tokens)],
        )
    lesson = Lesson(target.embed(ids), output.hidden, keys_values)
    mx.eval(lesson)
    return lesson


def unroll(
    target: Target, drafter: Drafter, lesson: Lesson, first: int, rows: int, steps: int, *, checkpoint: bool = False
) -> list[StepLoss]:
    """The losses of `steps` draft steps for the bonus tokens at positions first..first+rows-1 (first is at least 1).

    With `checkpoint` nothing of the size of the vocabulary is kept for the gradient but computed again.
    """

    def compare(target_hidden: mx.array, state: mx.array) -> StepLoss:
        return _compare(target, drafter, target_hidden, state)

    if checkpoint:
        compare = checkpointed(drafter, compare)
    states = unrolled_states(drafter, lesson, first, rows, steps)
    return [compare(lesson.hidden[:, first + step : first + step + rows], state) for step, state in enumerate(states)]


def unrolled_states(drafter: Drafter, lesson: Lesson, first: int, rows: int, steps: int) -> list[mx.array]:
    """What the head reads at each draft step, [1, rows, hidden_size], the text's own tokens being the draft."""
    context = _context(drafter, lesson, first, rows)
    hidden = lesson.hidden[:, first - 1 : first - 1 + rows]
    states = []
    for step in range(steps):
        state, hidden = drafter(lesson.embeddings[:, first + step : first + step + rows], hidden, context)
        states.append(state)
    return states


def _context(drafter: Drafter, lesson: Lesson, first: int, rows: int) -> DraftContext:
    """What each row's draft steps share, as `Drafter.context` has it for the one row of a round."""
    keys = mx.arange(lesson.hidden.shape[1])[None]
    # A row's bonus token is not in the cache yet, so its position is the number of K/V rows there are.
    offsets = mx.arange(first, first + rows)[:, None]
    past = keys < offsets
    recent = past & (keys >= offsets - 1 - drafter.config.text.sliding_window)
    masks: dict[LayerType, mx.array] = {"full_attention": past, "sliding_attention": recent}
    views = {layer_type: View(*lesson.keys_values[layer_type], mask) for layer_type, mask in masks.items()}
    return DraftContext(views, mx.array(first if drafter.config.draft_position == "bonus" else first - 1, mx.int32))


def _compare(target: Target, drafter: Drafter, target_hidden: mx.array, state: mx.array) -> StepLoss:
    logits = target.soft_cap(target.embed_tokens.as_linear(target_hidden)[0]).astype(mx.float32)
    log_p = mx.stop_gradient(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    p = mx.exp(log_p)
    scores = drafter.model.embed_tokens.as_linear(state)[0].astype(mx.float32)
    log_q = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    divergence = (p * (log_p - log_q)).sum(axis=-1)
    centroids = mx.zeros_like(divergence)
    head = drafter.masked_embedding
    if head is not None:
        cluster_scores = head.centroids(state)[0].astype(mx.float32)
        log_clusters = cluster_scores - mx.logsumexp(cluster_scores, axis=-1, keepdims=True)
        wanted = p[:, head.token_ordering].reshape(*cluster_scores.shape, -1).sum(axis=-1)
        centroids = (wanted * (mx.log(mx.maximum(wanted, 1e-30)) - log_clusters)).sum(axis=-1)
        scores = _candidates_only(scores, cluster_scores, head.token_ordering, head.top_k)
    scores = mx.stop_gradient(scores)
    q = mx.softmax(scores, axis=-1)
    accepted = mx.minimum(p, q).sum(axis=-1)
    agrees = (mx.argmax(scores, axis=-1) == mx.argmax(log_p, axis=-1)).astype(mx.float32)
    return StepLoss(divergence, centroids, accepted, agrees)


def _candidates_only(scores: mx.array, cluster_scores: mx.array, ordering: mx.array, top_k: int) -> mx.array:
    """Scores with those outside the `top_k` best clusters at -inf."""
    best = mx.argpartition(cluster_scores, kth=-top_k, axis=-1)[:, -top_k:]
    chosen = mx.put_along_axis(mx.zeros(cluster_scores.shape, mx.bool_), best, mx.array(True), axis=-1)
    in_order = mx.repeat(chosen, ordering.size // chosen.shape[-1], axis=-1)
    allowed = mx.put_along_axis(
        mx.zeros(scores.shape, mx.bool_), mx.broadcast_to(ordering[None], scores.shape), in_order, axis=-1
    )
    return mx.where(allowed, scores, -mx.inf)


def objective(losses: list[StepLoss], *, by_reach: bool) -> mx.array:
    """The mean over steps and positions of both divergences.

    With `by_reach` a step counts by the chance that decoding gets there, all steps before it being accepted.
    """
    total, norm = mx.array(0.0), mx.array(0.0)
    reach = mx.ones_like(losses[0].accepted)
    for loss in losses:
        total = total + (reach * (loss.divergence + loss.centroids)).sum()
        norm = norm + reach.sum()
        if by_reach:
            reach = reach * mx.stop_gradient(loss.accepted)
    return total / norm


def acceptance_lengths(losses: list[StepLoss]) -> tuple[mx.array, mx.array]:
    """Tokens a round may expect, [rows] each: sampled at temperature 1 and accepted one by one, and greedily."""
    sampled = greedy = reach = streak = mx.ones_like(losses[0].accepted)
    for loss in losses:
        reach, streak = reach * loss.accepted, streak * loss.agrees
        sampled, greedy = sampled + reach, greedy + streak
    return sampled, greedy
