"""One round of speculative decoding: draft, verify, accept, advance.

`draft` makes a draft from a `RoundState`, and `verify` makes the next `RoundState`. A round does not need the report of
the previous round. The exceptions are the guide, the logits processors and the mapped per-layer embeddings, which
follow the text on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.errors import OptionError
from mlx_mtp.gemma4.disk_table import PerLayerRows
from mlx_mtp.gemma4.drafter import Allow, Draft, Drafter, DraftInputs
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target, TargetOutput

from .rules import TokenRules
from .state import RoundState


class RoundParts(NamedTuple):
    """The parts that all rounds of one text share: target, drafter, token rules and log probability count.

    `logprobs` is the number of most likely tokens that are reported with each emitted token. If it is None, no log
    probabilities are reported.
    """

    target: Target
    drafter: Drafter | None
    rules: TokenRules
    logprobs: int | None = None


class Verified(NamedTuple):
    """The report of a round, still on the device.

    `report` is int32 [k + 1]: the tokens to emit, then -1 for each rejected draft token. `logprobs` is float32 [k + 1,
    1 + 2 * n] (see `token_logprobs`). It is empty if no log probabilities are reported.
    """

    report: mx.array
    logprobs: mx.array


class Drafted(NamedTuple):
    """A round before its verify pass: its draft, and the masks of a guide.

    `copied` are the draft tokens if they were copied from the text, otherwise an empty list. `reads` counts the host
    reads so far.
    """

    draft: Draft
    masks: mx.array | None
    copied: list[int]
    reads: int


class Steps(NamedTuple):
    """The steps of a round of k draft tokens, plain or compiled.

    `draft` returns the draft for a state. `verify` takes a draft, the masks of a guide and the rows of mapped per-layer
    embeddings, and ends the round. The masks and the rows are None if there are none. `whole` does both steps, for
    rounds in which the host has no part. `is_compiled` tells whether the target is called only while they are traced.
    """

    draft: Callable[[RoundState], Draft]
    verify: Callable[[RoundState, Draft, mx.array | None, PerLayerRows | None], tuple[RoundState, Verified]]
    whole: Callable[[RoundState], tuple[RoundState, Verified]]
    is_compiled: bool = False


def round_steps(parts: RoundParts, layout: Cache, k: int, text: mx.array | None = None) -> Steps:
    """Return the steps of a round of k draft tokens over a cache of this layout.

    With k = 0, the round is plain decoding. `text`, int32 [n], holds all tokens so far. Only logits processors need it.

    Raises OptionError, when the steps run, if there are draft tokens but no drafter.
    """

    def draft(state: RoundState) -> Draft:
        return draft_tokens(parts, layout, state, k)

    def verify(
        state: RoundState, draft: Draft, masks: mx.array | None, per_layer_rows: PerLayerRows | None
    ) -> tuple[RoundState, Verified]:
        cache = layout.over(state.kv)
        tokens = tokens_to_verify(state, draft)
        output = parts.target(tokens, cache, k + 1, per_layer_rows=per_layer_rows)
        return end_round(parts, state._replace(kv=cache.kv), draft, output, masks, text)

    def whole(state: RoundState) -> tuple[RoundState, Verified]:
        return verify(state, draft(state), None, None)

    return Steps(draft, verify, whole)


def tokens_to_verify(state: RoundState, draft: Draft) -> mx.array:
    """Return the bonus token and the draft tokens, int32 [1, k + 1]."""
    return mx.concatenate([state.bonus, draft.tokens], axis=1) if draft.tokens.size else state.bonus


def end_round(
    parts: RoundParts,
    state: RoundState,
    draft: Draft,
    output: TargetOutput,
    masks: mx.array | None,
    text: mx.array | None,
) -> tuple[RoundState, Verified]:
    """Accept draft tokens by the output of the verify pass, and return the next state and the report.

    The K/V of `state` have the rows of the pass, and its offset is that before the pass.
    """
    k = draft.tokens.shape[1]
    logits = output.logits.squeeze(0)
    accepted, choices = parts.rules.accept(state, draft, logits, masks, text)
    report = mx.where(mx.arange(k + 1) <= accepted, choices, -1) if k else choices
    logprobs = token_logprobs(parts, logits, choices)
    kv = state.kv._replace(offset=state.kv.offset + accepted + 1)
    return choose_row(state._replace(kv=kv), output.hidden, choices, accepted), Verified(report, logprobs)


def draft_tokens(parts: RoundParts, layout: Cache, state: RoundState, k: int, allow: Allow | None = None) -> Draft:
    """Draft k tokens after the bonus token.

    `allow` returns the mask of a guide for each draft step. This is a separate function because no K/V view may exist
    when the round is evaluated. A view would force MLX to copy the whole buffer.

    Raises OptionError if there are draft tokens but no drafter.
    """
    if not k:
        return Draft(mx.zeros((1, 0), mx.int32))
    return needed_drafter(parts, k).draft(parts.target, draft_inputs(parts, layout, state, k, allow))


def draft_inputs(parts: RoundParts, layout: Cache, state: RoundState, k: int, allow: Allow | None) -> DraftInputs:
    """Return the inputs of the drafter for `draft_tokens`. They hold K/V views.

    Raises OptionError if there is no drafter.
    """
    context = needed_drafter(parts, k).draft_context(layout.over(state.kv))
    return DraftInputs(state.bonus, state.hidden, context, k, parts.rules.drafter_choice(state, k), allow)


def needed_drafter(parts: RoundParts, k: int) -> Drafter:
    """Return the drafter of a round of k draft tokens. Raises OptionError if there is none."""
    if parts.drafter is None:
        raise OptionError(f"{k} draft tokens asked for without a drafter")
    return parts.drafter


def choose_row(state: RoundState, hidden: mx.array, choices: mx.array, row: mx.array) -> RoundState:
    """Make the target's choice at one verified row the bonus token, and return the new state.

    `hidden` is [1, rows, hidden_size], `choices` is int32 [rows], and `row` is int32 [].
    """
    window = state.window
    if window.size:
        tokens = mx.concatenate([window, choices])
        window = mx.slice(tokens, row[None] + 1, axes=(0,), slice_size=window.shape)
    if choices.size > 1:
        choices, hidden = choices[row], mx.take(hidden, row[None], axis=1)
    return state._replace(bonus=choices.reshape(1, 1), hidden=hidden, window=window)


def token_logprobs(parts: RoundParts, logits: mx.array, tokens: mx.array) -> mx.array:
    """Return the target's own log probabilities, before any option, float32 [rows, 1 + 2 * n].

    Each row holds the log probability of the row's token, then the ids of the n most likely tokens, then their log
    probabilities. The result is empty if no log probabilities are reported.
    """
    if parts.logprobs is None:
        return mx.array([], mx.float32)
    capped = parts.target.without_suppressed(parts.target.soft_cap(logits)).astype(mx.float32)
    values = capped - mx.logsumexp(capped, axis=-1, keepdims=True)
    # The sort is stable: the most likely token comes first, and equal values are in order of their ids.
    top = mx.argsort(-values, axis=-1)[:, : parts.logprobs]
    own = mx.take_along_axis(values, tokens[:, None], axis=-1)
    # float32 holds ids up to 2**24 exactly. No vocabulary is that large.
    return mx.concatenate([own, top.astype(mx.float32), mx.take_along_axis(values, top, axis=-1)], axis=-1)
