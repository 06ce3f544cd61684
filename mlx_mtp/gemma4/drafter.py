"""The drafter ("assistant"): from the target's last hidden state and K/V to the next draft tokens.

The forward pass is that of transformers' Gemma4AssistantForCausalLM: concat(scaled target embedding, hidden) ->
pre_projection -> layers -> head. The layers have queries only. They attend to the target's K/V at one constant
position. post_projection gives the hidden state for the next step.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import DrafterConfig, LayerType

from .kv_cache import Cache, View, Views
from .layers import Between, DecoderLayer, Projected, between_attentions
from .target import TableRows, Target, allowed_tokens, table_rows

# This logit is below any other logit, and its probability is zero next to any other.
_LAST_RESORT = -1e9


class Draft(NamedTuple):
    """Draft tokens, int32 [1, k], and the distributions from which they were drawn.

    `log_probabilities` is [k, candidates], and `ids` is int32 [k, candidates]. All other tokens have probability zero.
    `ids` is None if the candidates are the whole vocabulary, in order. Greedy and coupled drafts have no
    `log_probabilities` and need no `ids`.
    """

    tokens: mx.array
    ids: mx.array | None = None
    log_probabilities: mx.array | None = None


class DraftContext(NamedTuple):
    """The inputs that all draft steps of a round share.

    `views` holds the target's K/V per layer type. `position` is int32 []. In steps of several streams, `views` holds
    a list with the K/V of each, and `position` is int32 [streams].
    """

    views: Mapping[LayerType, Views]
    position: mx.array


class Candidates(NamedTuple):
    """Token ids and logits of the candidates, both [1, candidates].

    All other tokens have probability zero. `ids` is None if the candidates are the whole vocabulary, in order.
    """

    ids: mx.array | None
    logits: mx.array


# This function chooses one candidate at a draft step. It returns the index, int32 [1, 1], and the log probabilities of
# the draw, [1, candidates]. The log probabilities are None if nothing needs them.
Choose = Callable[[int, Candidates], tuple[mx.array, mx.array | None]]

# This function returns the mask of the tokens that may follow a token, int32 [1, 1], at the next draft step. The mask
# is bool [1, vocab], or None if all tokens may.
Allow = Callable[[mx.array], mx.array | None]


def choose_best(_step: int, candidates: Candidates) -> tuple[mx.array, None]:
    """Choose the candidate with the largest logit."""
    return mx.argmax(candidates.logits, axis=-1, keepdims=True), None


class DraftInputs(NamedTuple):
    """The inputs of the draft of one round.

    `token`, int32 [1, 1], is the last token, and `hidden`, [1, 1, backbone_hidden_size], is the hidden state that
    produced it. `context` is the result of `draft_context`. `k` is the number of draft tokens. `choose` chooses the
    token of each draft step. `allow` returns the masks of a guide. It is None if there is no guide.
    """

    token: mx.array
    hidden: mx.array
    context: DraftContext
    k: int
    choose: Choose = choose_best
    allow: Allow | None = None


class DraftStep(NamedTuple):
    """The result of one draft step.

    `state`, [1, 1, hidden_size], is the input of the head. `hidden`, [1, 1, backbone_hidden_size], is an input of the
    next step.
    """

    state: mx.array
    hidden: mx.array


class _Backbone(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        text = config.text
        # This embedding is the output head only. The target's table embeds the inputs.
        self.embed_tokens = nn.Embedding(config.draft_vocab_size or text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, layer) for layer in text.layers]
        self.norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)


class _CentroidHead(nn.Module):
    """A head over clusters of the vocabulary.

    Only the tokens of the `top_k` best centroids are candidates.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.top_k = config.centroid_top_k
        self.centroids = nn.Linear(config.text.hidden_size, config.num_centroids, bias=False)
        self.token_ordering = mx.zeros((config.text.vocab_size,), mx.int32)

    def candidates(self, scores: mx.array, allowed: mx.array | None) -> mx.array:
        """Return the candidate ids, [candidates], from the scores of the centroids, [centroids].

        If `allowed` is given, clusters with an allowed token come first. Some candidates are then allowed.
        """
        if allowed is not None:
            has_allowed = allowed[0][self.token_ordering].reshape(scores.size, -1).any(axis=-1)
            scores = mx.where(has_allowed, scores, -mx.inf)
        best = mx.argpartition(scores, kth=-self.top_k)[-self.top_k :]
        return self.token_ordering.reshape(scores.size, -1)[best].reshape(-1)


class Drafter(nn.Module):
    """The drafter network, which drafts tokens from the target's hidden state and K/V."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size, backbone = config.text.hidden_size, config.backbone_hidden_size
        self.model = _Backbone(config)
        self.pre_projection = nn.Linear(2 * backbone, hidden_size, bias=False)
        self.post_projection = nn.Linear(hidden_size, backbone, bias=False)
        self.masked_embedding = _CentroidHead(config) if config.num_centroids else None
        # For a pruned head, these are the token ids of its rows.
        self.draft_vocab_ids = mx.zeros((config.draft_vocab_size,), mx.int32) if config.draft_vocab_size else None
        # This mask, bool [1, vocab], excludes the tokens that the target never generates. It is not a parameter.
        self._unsuppressed: mx.array | None = None
        # A kernel may replace this function (see kernels.py).
        self.table_rows: TableRows = table_rows
        self._has_dead_cluster = False

    def suppress(self, tokens: Collection[int]) -> None:
        """Never draft these tokens, which the target never generates.

        Call this method after the weights are loaded.
        """
        self._unsuppressed = allowed_tokens(tokens, self.config.text.vocab_size) if tokens else None
        if self._unsuppressed is not None and self.masked_embedding is not None:
            clusters = self._unsuppressed[0][self.masked_embedding.token_ordering]
            self._has_dead_cluster = not clusters.reshape(self.config.num_centroids, -1).any(axis=-1).all().item()

    @property
    def num_candidates(self) -> int:
        """The number of candidates of a draft step."""
        text = self.config.text
        if self.config.num_centroids:
            return self.config.centroid_top_k * (text.vocab_size // self.config.num_centroids)
        # A pruned head has one additional candidate of last resort.
        return self.config.draft_vocab_size + 1 if self.config.draft_vocab_size else text.vocab_size

    def draft_context(self, cache: Cache) -> DraftContext:
        """Return the context of a round.

        The cache does not hold the bonus token yet, so its offset is the position of the bonus token. With the
        `draft_position` "last", the position is one less.
        """
        position = cache.offset if self.config.draft_position == "bonus" else cache.offset - 1
        views: dict[LayerType, Views] = {
            layer_type: cache.draft_view(layer_type) for layer_type in ("sliding_attention", "full_attention")
        }
        return DraftContext(views, position)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, context: DraftContext, between: Between | None = None
    ) -> DraftStep:
        """Run one draft step from a token's scaled embedding and a hidden state.

        Both are [1, 1, backbone_hidden_size], or [1, streams, backbone_hidden_size] in a step of several streams.
        `between` may be a compiled form of `between_attentions`.
        """
        h = self.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
        layers, between = self.model.layers, between or self.between_attentions
        projected: Projected | None = layers[0].project(layers[0].input_layernorm(h), context.position)
        for index, (layer, config) in enumerate(zip(layers, self.config.text.layers, strict=True)):
            assert projected is not None
            attended = layer.attend(projected.queries, context.views[config.layer_type])
            h, projected = between(index, h, attended, None, context.position)
        return DraftStep(h, self.post_projection(h))

    def between_attentions(
        self, index: int, h: mx.array, attended: mx.array, per_layer: mx.array | None, offset: mx.array
    ) -> tuple[mx.array, Projected | None]:
        """Run the layers between two attentions, see `layers.between_attentions`."""
        return between_attentions(self.model.layers, self.model.norm, index, h, attended, per_layer, offset)

    def candidates(self, state: mx.array, allowed: mx.array | None = None) -> Candidates:
        """Return the candidates of the head for a state [1, 1, hidden_size].

        For a dense head, the candidates are the whole vocabulary or the draft vocabulary. For a centroid head, they are
        the tokens of the best centroids. Suppressed tokens, and tokens that are not `allowed`, bool [1, vocab], have
        the logit -inf. If `allowed` is given, it must exclude the suppressed tokens too.
        """
        return self._candidates(state, self._scores(state), allowed)

    def _scores(self, states: mx.array) -> mx.array:
        """Return the logits of a dense head, or the scores of the centroids, [1, streams, ...], for all states at once.

        `states` are [1, streams, hidden_size].
        """
        head = self.masked_embedding
        scores: mx.array = self.model.embed_tokens.as_linear(states) if head is None else head.centroids(states)
        return scores

    def _candidates(self, state: mx.array, scores: mx.array, allowed: mx.array | None) -> Candidates:
        """Return the candidates for a state, from its scores [1, 1, ...]."""
        is_guided = allowed is not None
        allowed = allowed if is_guided else self._unsuppressed
        if self.masked_embedding is None:
            logits = scores.squeeze(0)
            if self.draft_vocab_ids is not None:
                return self._pruned(logits, allowed)
            return Candidates(None, logits if allowed is None else mx.where(allowed, logits, -mx.inf))
        # Suppressed tokens alone do not restrict the clusters, unless all tokens of a cluster are suppressed.
        ids = self.masked_embedding.candidates(scores[0, 0], allowed if is_guided or self._has_dead_cluster else None)
        # This call gathers the rows of the ids, and dequantizes no other rows.
        logits = state.squeeze(0) @ self.table_rows(self.model.embed_tokens, ids).T
        return Candidates(ids[None], logits if allowed is None else mx.where(allowed[:, ids], logits, -mx.inf))

    def _pruned(self, logits: mx.array, allowed: mx.array | None) -> Candidates:
        ids = self.draft_vocab_ids
        assert ids is not None
        # If no token of the draft vocabulary is allowed, the first allowed token is the candidate of last resort. This
        # candidate is always present, so that all steps of a draft have the same number of candidates.
        last = mx.zeros((1,), mx.int32) if allowed is None else mx.argmax(allowed, axis=-1).astype(mx.int32)
        ids = mx.concatenate([ids, last])
        logits = mx.concatenate([logits, mx.full((1, 1), _LAST_RESORT, logits.dtype)], axis=-1)
        return Candidates(ids[None], logits if allowed is None else mx.where(allowed[:, ids], logits, -mx.inf))

    def draft(self, target: Target, inputs: DraftInputs) -> Draft:
        """Draft k tokens after the last token, from the hidden state that produced it."""
        draft = _OpenDraft(inputs)
        for _ in range(inputs.k):
            step = self(target.embed(draft.token), draft.hidden, inputs.context)
            draft.add(self.candidates(step.state, draft.allowed()), step.hidden)
        return draft.close()

    def draft_together(
        self, target: Target, inputs: Sequence[DraftInputs], between: Between | None = None
    ) -> list[Draft]:
        """Draft for several streams, as `draft` does for one. Each step is one for all streams that still draft.

        `between` may be a compiled form of `between_attentions` for steps of all streams.
        """
        drafts = [_OpenDraft(each) for each in inputs]
        for index in range(max(each.k for each in inputs)):
            going = [each for each in drafts if index < each.inputs.k]
            tokens, hidden = mx.concatenate([each.token for each in going], axis=1), [each.hidden for each in going]
            step = self(
                target.embed(tokens),
                mx.concatenate(hidden, axis=1),
                _context_of([each.inputs.context for each in going]),
                between if len(going) == len(drafts) else None,
            )
            if any(each.inputs.allow is not None for each in going):
                # The guides read their tokens one after the other. Now they wait once for all of them.
                mx.eval(tokens)
            scores = self._scores(step.state)
            for row, each in enumerate(going):
                one = slice(row, row + 1)
                candidates = self._candidates(step.state[:, one], scores[:, one], each.allowed())
                each.add(candidates, step.hidden[:, one])
        return [each.close() for each in drafts]


class _OpenDraft:
    """The draft of one stream while it is made: its last token, and the hidden state that produced it."""

    def __init__(self, inputs: DraftInputs) -> None:
        self.inputs = inputs
        self.token = inputs.token
        self.hidden = inputs.hidden
        self._tokens = [mx.zeros((1, 0), mx.int32)]
        self._ids: list[mx.array] = []
        self._log_probabilities: list[mx.array] = []

    def allowed(self) -> mx.array | None:
        """Return the mask of a guide for the next token."""
        return None if self.inputs.allow is None else self.inputs.allow(self.token)

    def add(self, candidates: Candidates, hidden: mx.array) -> None:
        """Choose the next token."""
        choice, distribution = self.inputs.choose(len(self._tokens) - 1, candidates)
        if candidates.ids is None:
            self.token = choice.view(mx.int32)
        else:
            self.token = mx.take_along_axis(candidates.ids, choice, axis=-1).astype(mx.int32)
            self._ids.append(candidates.ids)
        if distribution is not None:
            self._log_probabilities.append(distribution)
        self.hidden = hidden
        self._tokens.append(self.token)

    def close(self) -> Draft:
        """Return the draft."""
        return Draft(
            mx.concatenate(self._tokens, axis=1),
            mx.concatenate(self._ids) if self._ids else None,
            mx.concatenate(self._log_probabilities) if self._log_probabilities else None,
        )


def _context_of(contexts: Sequence[DraftContext]) -> DraftContext:
    """Return the context of the steps of several streams."""
    views: dict[LayerType, Views] = {}
    for layer_type in contexts[0].views:
        of_type = [context.views[layer_type] for context in contexts]
        views[layer_type] = [view for view in of_type if isinstance(view, View)]
    return DraftContext(views, mx.stack([context.position for context in contexts]))


def ask_for_each(inputs: DraftInputs, draft: Draft) -> None:
    """With a guide, request the mask of each draft token.

    This function is for a drafter that finds its draft tokens without masks.
    """
    if inputs.allow is None:
        return
    tokens = mx.concatenate([inputs.token, draft.tokens], axis=1)
    for index in range(draft.tokens.shape[1]):
        inputs.allow(tokens[:, index : index + 1])


class GivenDrafter(Drafter):
    """A drafter that takes its draft tokens from a function, at no cost.

    The function gets the last token, int32 [1, 1], and the number of draft tokens. Only the target's part of a round
    remains. Under a guide, the function must return tokens that the guide allows.
    """

    def __init__(self, give: Callable[[mx.array, int], Draft]) -> None:
        nn.Module.__init__(self)
        self.give = give

    def draft_context(self, cache: Cache) -> DraftContext:
        """Return a context without views."""
        return DraftContext({}, cache.offset)

    def draft(self, target: Target, inputs: DraftInputs) -> Draft:
        """Return the draft that the function gives."""
        draft = self.give(inputs.token, inputs.k)
        ask_for_each(inputs, draft)
        return draft

    def draft_together(
        self, target: Target, inputs: Sequence[DraftInputs], between: Between | None = None
    ) -> list[Draft]:
        """Return the drafts that the function gives."""
        return [self.draft(target, each) for each in inputs]
