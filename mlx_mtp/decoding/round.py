"""One round: draft, verify, accept, advance. Its steps are functions from one `RoundState` to the next.

A round needs nothing that only the report of the round before it tells, but for the guide, the logits processors and
the mapped per-layer embeddings: these follow the text on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.errors import OptionError
from mlx_mtp.gemma4.disk_table import PerLayerRows
from mlx_mtp.gemma4.drafter import Allow, Draft, Drafter
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target

from .rules import TokenRules
from .state import RoundState


class RoundParts(NamedTuple):
    """What all rounds of one text share: the pair, its rules, and how many log probabilities a token is reported with
    (None for none)."""

    target: Target
    drafter: Drafter | None
    rules: TokenRules
    logprobs: int | None = None


class Verified(NamedTuple):
    """The report of a round, still on the device.

    `report` is int32 [k + 2]: how many draft tokens the target accepted, then the tokens to emit, of which the first
    `accepted + 1` count. `logprobs` is float32 [k + 1, 1 + 2 * n] (see `token_logprobs`), empty if none are reported.
    """

    report: mx.array
    logprobs: mx.array


class Steps(NamedTuple):
    """The steps of a round of k draft tokens, plain or compiled.

    `draft` gives the draft of a state. `verify` takes a draft with the masks of a guide and the rows of mapped
    per-layer embeddings, each None if there are none, and ends the round. `whole` is both, where the host has no part.
    """

    draft: Callable[[RoundState], Draft]
    verify: Callable[[RoundState, Draft, mx.array | None, PerLayerRows | None], tuple[RoundState, Verified]]
    whole: Callable[[RoundState], tuple[RoundState, Verified]]


def round_steps(parts: RoundParts, layout: Cache, k: int, text: mx.array | None = None) -> Steps:
    """The steps of a round of k draft tokens over a cache of this layout; k = 0 is plain decoding.

    `text`, int32 [n], is all tokens so far; only logits processors need it.

    Raises OptionError, when they run, for draft tokens without a drafter.
    """

    def draft(state: RoundState) -> Draft:
        return draft_tokens(parts, layout, state, k)

    def verify(
        state: RoundState, draft: Draft, masks: mx.array | None, rows: PerLayerRows | None
    ) -> tuple[RoundState, Verified]:
        cache = layout.over(state.kv)
        tokens = mx.concatenate([state.bonus, draft.tokens], axis=1) if k else state.bonus
        output = parts.target(tokens, cache, k + 1, per_layer_rows=rows)
        logits = output.logits[0]
        accepted, choices = parts.rules.accept(state, draft, logits, masks, text)
        report = mx.concatenate([accepted[None], choices])
        logprobs = token_logprobs(parts, logits, choices)
        kv = cache.kv._replace(offset=cache.offset + accepted + 1)
        return choose_row(state._replace(kv=kv), output.hidden, choices, accepted), Verified(report, logprobs)

    def whole(state: RoundState) -> tuple[RoundState, Verified]:
        return verify(state, draft(state), None, None)

    return Steps(draft, verify, whole)


def draft_tokens(parts: RoundParts, layout: Cache, state: RoundState, k: int, allow: Allow | None = None) -> Draft:
    """k draft tokens after the bonus token. `allow` gives the mask of a guide for each draft step.

    This is a function of its own because no K/V view may live on when the round is evaluated: it would force a copy of
    its whole buffer.
    """
    if not k:
        return Draft(mx.zeros((1, 0), mx.int32))
    if parts.drafter is None:
        raise OptionError(f"{k} draft tokens asked for without a drafter")
    context = parts.drafter.context(layout.over(state.kv))
    choose = parts.rules.drafter_choice(state, k)
    return parts.drafter.draft(parts.target, state.bonus, state.hidden, context, k, choose, allow)


def choose_row(state: RoundState, hidden: mx.array, choices: mx.array, row: mx.array) -> RoundState:
    """Make the target's choice at one verified row the bonus token.

    `hidden` is [1, rows, hidden_size], `choices` int32 [rows], `row` int32 [].
    """
    window = state.window
    if window.size:
        tokens = mx.concatenate([window, choices])
        window = mx.slice(tokens, row[None] + 1, axes=(0,), slice_size=window.shape)
    chosen = choices[row].reshape(1, 1)
    return state._replace(bonus=chosen, hidden=mx.take(hidden, row[None], axis=1), window=window)


def token_logprobs(parts: RoundParts, logits: mx.array, tokens: mx.array) -> mx.array:
    """The target's own log probabilities, before any option, float32 [rows, 1 + 2 * n]: that of each row's token, then
    the ids of the n most likely tokens, then theirs. Empty if none are reported."""
    if parts.logprobs is None:
        return mx.zeros(0)
    capped = parts.target.without_suppressed(parts.target.soft_cap(logits)).astype(mx.float32)
    values = capped - mx.logsumexp(capped, axis=-1, keepdims=True)
    # Stable order: the most likely first, equal ones by id.
    top = mx.argsort(-values, axis=-1)[:, : parts.logprobs]
    own = mx.take_along_axis(values, tokens[:, None], axis=-1)
    # Ids are exact in float32 up to 2**24, more than any vocabulary.
    return mx.concatenate([own, top.astype(mx.float32), mx.take_along_axis(values, top, axis=-1)], axis=-1)
