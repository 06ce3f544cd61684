"""Acceptance of draft tokens by the target, decided on the device."""

from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.gemma4.drafter import Draft


class Acceptance(NamedTuple):
    """The number of accepted draft tokens, and the tokens to emit.

    `accepted` is int32 []. `tokens` is int32 [k + 1]. Only its first `accepted + 1` tokens are valid.
    """

    accepted: mx.array
    tokens: mx.array


def accept_matching(drafted: mx.array, scores: mx.array) -> Acceptance:
    """Accept the longest prefix of the draft tokens [1, k] equal to the argmax over scores [k + 1, vocab].

    The target's choice at the first row without a match is emitted after this prefix. An accepted draft token equals
    the target's choice, so the choices are the tokens to emit. For greedy decoding, the scores are logits. For coupled
    acceptance, they are log probabilities plus noise that drafter and target share.
    """
    choices = mx.argmax(scores, axis=-1).view(mx.int32)
    if not drafted.size:
        # Do not take a product of zero elements: MLX's CUDA backend divides by their number, which ends the process.
        return Acceptance(mx.array(0), choices)
    matches = (drafted.squeeze(0) == choices[:-1]).astype(mx.int32)
    return Acceptance(mx.cumprod(matches).sum(), choices)


def accept_block(draft: Draft, log_probabilities: mx.array, key: mx.array) -> Acceptance:
    """Accept draft tokens by block verification (Sun et al. 2024, arXiv 2403.10444).

    The emitted tokens have the target's own distribution. `log_probabilities` are the target's, [k + 1, vocab].

    Let p be the target's probabilities, q the drafter's, P[0] = 1, and P[i] = min(P[i-1] * p(X_i) / q(X_i), 1). The
    first i tokens pass with probability h[i]. For all k tokens, h[k] = P[k]. For i < k, h[i] = S / (S + 1 - P[i]) with
    S = sum_x max(P[i] * p(x | X_1..X_i) - q(x | X_1..X_i), 0). The longest prefix that passes is accepted. The next
    token is drawn from the same difference, normalized. After all k tokens, it is drawn from p.
    """
    k = draft.tokens.shape[1]
    uniform_key, next_key = mx.random.split(key)
    if k == 0:
        return Acceptance(mx.array(0), mx.random.categorical(log_probabilities, key=next_key).astype(mx.int32))
    assert draft.log_probabilities is not None
    p, q = mx.exp(log_probabilities), mx.exp(draft.log_probabilities)
    # The sums below need the target's probabilities for the drafter's candidates only.
    p_shared = p[:-1] if draft.ids is None else mx.take_along_axis(p[:-1], draft.ids, axis=-1)
    chosen = _of_token(draft, q)
    ratios = mx.take_along_axis(p[:-1], draft.tokens.T, axis=-1)[:, 0] / chosen
    reached = [mx.array(1.0)]
    for i in range(k):
        reached.append(mx.minimum(reached[-1] * ratios[i], 1.0))
    weights = mx.stack(reached)
    # sum_x max(P * p - q, 0) = P - sum_x min(P * p, q). The second sum needs the candidates only.
    surplus = weights[:-1] - mx.minimum(weights[:-1, None] * p_shared, q).sum(axis=-1)
    surplus = mx.maximum(surplus, 0)
    room = surplus + 1 - weights[:-1]
    partial = mx.where(room > 0, surplus / mx.maximum(room, 1e-30), 0)
    passes = mx.random.uniform(shape=(k,), key=uniform_key) < mx.concatenate([partial[1:], weights[-1:]])
    accepted = mx.max(mx.where(passes, mx.arange(1, k + 1), 0))
    following = next_token(draft, p, q, weights, accepted, next_key)
    tokens = mx.concatenate([draft.tokens[0], mx.zeros(1, mx.int32)])
    return Acceptance(accepted, mx.where(mx.arange(k + 1) == accepted, following, tokens))


def _of_token(draft: Draft, q: mx.array) -> mx.array:
    """Return the drafter's probability of each token that it drew, [k]."""
    if draft.ids is None:
        return mx.take_along_axis(q, draft.tokens.T, axis=-1)[:, 0]
    return mx.where(draft.ids == draft.tokens.T, q, 0).sum(axis=-1)


def next_token(
    draft: Draft, p: mx.array, q: mx.array, weights: mx.array, accepted: mx.array, key: mx.array
) -> mx.array:
    """Draw the token after the accepted draft tokens, int32 [].

    After a rejection, its distribution is proportional to max(weights * p - q, 0) at the rejected row. Otherwise it is
    p after the last draft token. `p` is [k + 1, vocab], `q` is [k, candidates], and `weights` [k + 1] is P.
    """
    k = draft.tokens.shape[1]
    row = mx.minimum(accepted, k - 1)
    spent = q[row] if draft.ids is None else mx.zeros(p.shape[-1]).at[draft.ids[row]].add(q[row])
    residual = mx.maximum(weights[row] * p[row] - spent, 0)
    # The difference is zero everywhere only if a rejection was impossible and rounding caused one. The token is then
    # drawn from p.
    residual = mx.where((accepted < k) & (residual.sum() > 0), residual, p[accepted])
    return mx.random.categorical(mx.log(residual), key=key).astype(mx.int32)
