"""What a drafter is trained on: its draft steps at all positions of a text at once, against the target's distributions.

A draft step sees the target's K/V before the bonus token and nothing of the draft but its own hidden state, so the
steps of all positions differ in their masks alone and run as one pass, each fed with the text's own next token. The
layers are those of decoding; `tests/test_distill.py` holds that the logits are, too.
"""

from typing import NamedTuple

import mlx.core as mx
from mlx.nn.utils import checkpoint as checkpointed

from mlx_mtp.checkpoints.config import LayerType
from mlx_mtp.gemma4.drafter import DraftContext, Drafter
from mlx_mtp.gemma4.kv_cache import Cache, View
from mlx_mtp.gemma4.target import Target


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

    `divergence` is KL(target || drafter) over the tokens that can be drafted, `centroids` the same over the clusters of
    a centroid head (zero for a dense head); both in nats. `accepted` is the chance that a draft token drawn from the
    drafter would be accepted, sum(min(p, q)), with q as decoding draws it: zero outside the centroid candidates.
    `agrees` is 1 where the likeliest tokens are the same.
    """

    divergence: mx.array
    centroids: mx.array
    accepted: mx.array
    agrees: mx.array


class _Wanted(NamedTuple):
    """The target's probabilities of the tokens the drafter can draft, [rows, tokens], and, for a centroid head, of its
    clusters, [rows, clusters]; their entropies [rows], in nats; and the likeliest token of all, [rows]."""

    p: mx.array
    best: mx.array
    entropy: mx.array
    clusters: mx.array
    cluster_entropy: mx.array


def study(target: Target, tokens: list[int]) -> Lesson:
    """Pass a text through the target."""
    cache = Cache(target.config, target.dtype, max_block=len(tokens), capacity=len(tokens))
    ids = mx.array([tokens], mx.int32)
    output = target(ids, cache)
    keys_values: dict[LayerType, tuple[mx.array, mx.array]] = {}
    for layer_type in ("sliding_attention", "full_attention"):
        layer = target.config.last_kv_layer(layer_type)
        keys, values = cache.keys[layer], cache.values[layer]
        assert isinstance(keys, mx.array)
        assert isinstance(values, mx.array)
        # The ring is longer than the text, so that row p holds position p in both kinds of buffer.
        keys_values[layer_type] = keys[:, :, : len(tokens)], values[:, :, : len(tokens)]
    lesson = Lesson(target.embed(ids), output.hidden, keys_values)
    mx.eval(lesson)
    return lesson


def unroll(
    target: Target, drafter: Drafter, lesson: Lesson, first: int, rows: int, steps: int, *, checkpoint: bool = False
) -> list[StepLoss]:
    """The losses of `steps` draft steps for the bonus tokens at positions first..first+rows-1 (first is at least 1).

    With `checkpoint` no logits of the drafter are kept for the gradient: they are computed again.
    """

    def compare(wanted: _Wanted, state: mx.array) -> StepLoss:
        return _compare(drafter, wanted, state)

    if checkpoint:
        compare = checkpointed(drafter, compare)
    # A step's distributions are the next ones of the step before.
    wanted = _distributions(target, drafter, lesson.hidden[:, first : first + rows + steps - 1])
    states = unrolled_states(drafter, lesson, first, rows, steps)
    return [
        compare(_Wanted(*(part[step : step + rows] for part in wanted)), state) for step, state in enumerate(states)
    ]


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
    # A row's bonus token is not in the cache yet, so its position is the number of K/V rows there are.
    offsets = mx.arange(first, first + rows)[:, None]
    window = drafter.config.text.sliding_window
    views: dict[LayerType, View] = {}
    for layer_type, (keys, values) in lesson.keys_values.items():
        # K/V rows that no row of this pass sees are left out.
        start = max(0, first - 1 - window) if layer_type == "sliding_attention" else 0
        seen = slice(start, first + rows - 1)
        positions = mx.arange(seen.start, seen.stop)[None]
        mask = positions < offsets
        if layer_type == "sliding_attention":
            mask = mask & (positions >= offsets - 1 - window)
        views[layer_type] = View(keys[:, :, seen], values[:, :, seen], mask)
    return DraftContext(views, mx.array(first if drafter.config.draft_position == "bonus" else first - 1, mx.int32))


def _distributions(target: Target, drafter: Drafter, hidden: mx.array) -> _Wanted:
    """The target's distributions behind hidden states [1, rows, hidden_size]."""
    logits = target.soft_cap(target.head(hidden)[0]).astype(mx.float32)
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    best = mx.argmax(log_p, axis=-1)
    if drafter.draft_vocab_ids is not None:
        log_p = log_p[:, drafter.draft_vocab_ids]
    p = mx.exp(log_p)
    head = drafter.masked_embedding
    clusters = mx.zeros((p.shape[0], 0))
    if head is not None:
        clusters = p[:, head.token_ordering].reshape(p.shape[0], drafter.config.num_centroids, -1).sum(axis=-1)
    entropy = -(p * log_p).sum(axis=-1)
    cluster_entropy = -(clusters * mx.log(mx.maximum(clusters, 1e-30))).sum(axis=-1)
    wanted = _Wanted(p, best, entropy, clusters, cluster_entropy)
    return _Wanted(*(mx.stop_gradient(part) for part in wanted))


def _compare(drafter: Drafter, wanted: _Wanted, state: mx.array) -> StepLoss:
    scores = drafter.model.embed_tokens.as_linear(state)[0].astype(mx.float32)
    divergence = _cross_entropy(wanted.p, scores) - wanted.entropy
    centroids = mx.zeros_like(divergence)
    head = drafter.masked_embedding
    if head is not None:
        cluster_scores = head.centroids(state)[0].astype(mx.float32)
        centroids = _cross_entropy(wanted.clusters, cluster_scores) - wanted.cluster_entropy
        scores = _candidates_only(scores, cluster_scores, head.token_ordering, head.top_k)
    scores = mx.stop_gradient(scores)
    accepted = mx.minimum(wanted.p, mx.softmax(scores, axis=-1)).sum(axis=-1)
    choice = mx.argmax(scores, axis=-1)
    if drafter.draft_vocab_ids is not None:
        choice = drafter.draft_vocab_ids[choice]
    return StepLoss(divergence, centroids, accepted, (choice == wanted.best).astype(mx.float32))


def _cross_entropy(p: mx.array, scores: mx.array) -> mx.array:
    """Of distributions p, which may lack some of their mass, against those that scores stand for, by row, in nats."""
    return p.sum(axis=-1) * mx.logsumexp(scores, axis=-1) - (p * scores).sum(axis=-1)


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
