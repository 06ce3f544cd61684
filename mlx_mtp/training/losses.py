"""Training losses of a drafter: it learns the target's distributions, at all positions of a text in one pass.

A draft step sees the target's K/V before the bonus token. Of the draft it sees only the hidden state of the step
before. So the draft steps at different positions differ only in their masks, and they run as one pass. Each step gets
the next token of the text as its draft token. Training uses the same layers as decoding. `tests/unit/test_distill.py`
checks that the logits are the same, too.
"""

from typing import NamedTuple

import mlx.core as mx
from mlx.nn.utils import checkpoint as checkpointed

from mlx_mtp.checkpoints.config import LayerType
from mlx_mtp.gemma4.drafter import DraftContext, Drafter
from mlx_mtp.gemma4.kv_cache import Cache, View
from mlx_mtp.gemma4.target import Target


class TargetStates(NamedTuple):
    """The output of the frozen target for one text of T tokens: all the data that training needs from the target.

    `embeddings` and `hidden` are [1, T, hidden_size]. `keys_values` holds the keys and values that the drafter reads,
    by layer type, each [1, kv_heads, T, head_dim].
    """

    embeddings: mx.array
    hidden: mx.array
    keys_values: dict[LayerType, tuple[mx.array, mx.array]]


class StepLoss(NamedTuple):
    """The losses of one draft step by position. Each field is float32 [rows].

    `divergence` is KL(target || drafter) over the tokens that can be drafted, in nats. `centroids` is the KL divergence
    over the clusters of a centroid head, in nats (zero for a dense head). `accepted` is the probability that the target
    accepts a token sampled from the drafter, sum(min(p, q)). Here q is the distribution that decoding samples from: it
    is zero outside the centroid candidates. `agrees` is 1 where target and drafter have the same most likely token.
    """

    divergence: mx.array
    centroids: mx.array
    accepted: mx.array
    agrees: mx.array


class _TargetDistributions(NamedTuple):
    """The target's distributions, which the drafter learns.

    `p` is the probability of each token that can be drafted, [rows, tokens]. `best` is the most likely token of the
    whole vocabulary, [rows]. `clusters` is the probability of each cluster of a centroid head, [rows, clusters].
    `entropy` and `cluster_entropy` are the entropies of `p` and `clusters`, [rows], in nats.
    """

    p: mx.array
    best: mx.array
    entropy: mx.array
    clusters: mx.array
    cluster_entropy: mx.array


def compute_target_states(target: Target, tokens: list[int]) -> TargetStates:
    """Run the target over a text once. Return its hidden states and K/V for training."""
    cache = Cache(target.config, target.dtype, max_block=len(tokens), capacity=len(tokens))
    ids = mx.array([tokens], mx.int32)
    output = target(ids, cache)
    keys_values: dict[LayerType, tuple[mx.array, mx.array]] = {}
    for layer_type in ("sliding_attention", "full_attention"):
        layer = target.config.last_kv_layer(layer_type)
        keys, values = cache.keys[layer], cache.values[layer]
        assert isinstance(keys, mx.array)
        assert isinstance(values, mx.array)
        # The ring buffer is longer than the text. So row p holds position p in both kinds of buffer.
        keys_values[layer_type] = keys[:, :, : len(tokens)], values[:, :, : len(tokens)]
    target_states = TargetStates(target.embed(ids), output.hidden, keys_values)
    mx.eval(target_states)
    return target_states


def unroll(
    target: Target,
    drafter: Drafter,
    target_states: TargetStates,
    first: int,
    rows: int,
    steps: int,
    *,
    checkpoint: bool = False,
) -> list[StepLoss]:
    """Compute the losses of `steps` draft steps for `rows` bonus tokens.

    The bonus tokens are at positions first..first+rows-1, and `first` is at least 1. With `checkpoint`, the drafter's
    logits are not kept for the gradient: the backward pass computes them again.
    """

    def compare(wanted: _TargetDistributions, state: mx.array) -> StepLoss:
        return _compare(drafter, wanted, state)

    if checkpoint:
        compare = checkpointed(drafter, compare)
    # The distributions of a step are the distributions of the step before, one position later.
    wanted = _distributions(target, drafter, target_states.hidden[:, first : first + rows + steps - 1])
    states = unrolled_states(drafter, target_states, first, rows, steps)
    return [
        compare(_TargetDistributions(*(part[step : step + rows] for part in wanted)), state)
        for step, state in enumerate(states)
    ]


def unrolled_states(drafter: Drafter, target_states: TargetStates, first: int, rows: int, steps: int) -> list[mx.array]:
    """Compute the input of the drafter's head at each draft step, [1, rows, hidden_size].

    The draft tokens are the tokens of the text.
    """
    context = _draft_context(drafter, target_states, first, rows)
    hidden = target_states.hidden[:, first - 1 : first - 1 + rows]
    states = []
    for step in range(steps):
        state, hidden = drafter(target_states.embeddings[:, first + step : first + step + rows], hidden, context)
        states.append(state)
    return states


def _draft_context(drafter: Drafter, target_states: TargetStates, first: int, rows: int) -> DraftContext:
    """Make the draft context of all rows. `Drafter.draft_context` makes it for the single row of a round."""
    # The cache does not hold the bonus token of a row yet. So its position is the number of K/V rows.
    offsets = mx.arange(first, first + rows)[:, None]
    window = drafter.config.text.sliding_window
    views: dict[LayerType, View] = {}
    for layer_type, (keys, values) in target_states.keys_values.items():
        # The view leaves out K/V rows that no row of this pass sees.
        start = max(0, first - 1 - window) if layer_type == "sliding_attention" else 0
        seen = slice(start, first + rows - 1)
        positions = mx.arange(seen.start, seen.stop)[None]
        mask = positions < offsets
        if layer_type == "sliding_attention":
            mask = mask & (positions >= offsets - 1 - window)
        views[layer_type] = View(keys[:, :, seen], values[:, :, seen], mask)
    return DraftContext(views, mx.array(first if drafter.config.draft_position == "bonus" else first - 1, mx.int32))


def _distributions(target: Target, drafter: Drafter, hidden: mx.array) -> _TargetDistributions:
    """Compute the target's distributions from its hidden states [1, rows, hidden_size]."""
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
    wanted = _TargetDistributions(p, best, entropy, clusters, cluster_entropy)
    return _TargetDistributions(*(mx.stop_gradient(part) for part in wanted))


def _compare(drafter: Drafter, wanted: _TargetDistributions, state: mx.array) -> StepLoss:
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
    """Compute the cross entropy of `p` and softmax(scores) for each row, in nats. The sum of `p` may be less than 1."""
    return p.sum(axis=-1) * mx.logsumexp(scores, axis=-1) - (p * scores).sum(axis=-1)


def _candidates_only(scores: mx.array, cluster_scores: mx.array, ordering: mx.array, top_k: int) -> mx.array:
    """Set the scores of all tokens outside the `top_k` best clusters to -inf."""
    best = mx.argpartition(cluster_scores, kth=-top_k, axis=-1)[:, -top_k:]
    chosen = mx.put_along_axis(mx.zeros(cluster_scores.shape, mx.bool_), best, mx.array(True), axis=-1)
    in_order = mx.repeat(chosen, ordering.size // chosen.shape[-1], axis=-1)
    allowed = mx.put_along_axis(
        mx.zeros(scores.shape, mx.bool_), mx.broadcast_to(ordering[None], scores.shape), in_order, axis=-1
    )
    return mx.where(allowed, scores, -mx.inf)


def objective(losses: list[StepLoss], *, by_reach: bool) -> mx.array:
    """Return the mean of token divergence plus cluster divergence over all steps and positions.

    With `by_reach`, the weight of a step is the probability that all draft tokens before it are accepted.
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
    """Return the expected acceptance lengths (sampled, greedy), each [rows].

    Sampled means temperature 1, with draft tokens accepted one by one.
    """
    sampled = greedy = reach = streak = mx.ones_like(losses[0].accepted)
    for loss in losses:
        reach, streak = reach * loss.accepted, streak * loss.agrees
        sampled, greedy = sampled + reach, greedy + streak
    return sampled, greedy
