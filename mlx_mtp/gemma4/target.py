"""The text decoder of the Gemma 4 target: from tokens and K/V to hidden states and logits.

It covers E2B, E4B, 12B, 26B-A4B and 31B, and does not depend on drafting. Parameter names are those of mlx-lm's Gemma 4
below `language_model.model.`.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import TextConfig

from .disk_table import MappedEmbedding, PerLayerRows
from .kv_cache import Cache, KVQuantization, PackedPass, Pass, View
from .layers import Between, DecoderLayer, Projected, between_attentions

# The token at rows that stand for media. Its row of the per-layer table counts, as in transformers.
PAD = 0


class TargetOutput(NamedTuple):
    """Hidden states and logits of one pass.

    `hidden` is [1, length, hidden_size], after the final norm. `logits` is [1, rows, vocab_size], before the soft cap.
    The soft cap is monotone, so the argmax does not need it. In bfloat16, its tanh would also make ties. See
    `soft_cap`.
    """

    hidden: mx.array
    logits: mx.array


def allowed_tokens(suppressed: Collection[int], vocab_size: int) -> mx.array:
    """Return a mask of all tokens except the suppressed tokens, bool [1, vocab]."""
    allowed = mx.ones((1, vocab_size), mx.bool_)
    allowed[:, mx.array(sorted(suppressed))] = False
    # An array that is not evaluated belongs to this thread's stream and cannot be used on another thread.
    mx.eval(allowed)
    return allowed


class MediaRows(NamedTuple):
    """The rows of a pass that stand for media.

    `features` are rows [1, count, hidden_size] that replace scaled embeddings, each with the index of its first row in
    the pass. `last_seen` is that of `Cache.start`. The tokens at these rows are `PAD`.
    """

    features: list[tuple[int, mx.array]]
    last_seen: mx.array | None

    def put(self, h: mx.array) -> mx.array:
        """Return the embeddings [1, length, hidden_size] with the features in their places."""
        for start, rows in self.features:
            h = mx.slice_update(h, rows.astype(h.dtype), mx.array([start]), axes=(1,))
        return h


class TableRows(Protocol):
    """A function that reads rows of a table (see `table_rows`)."""

    def __call__(self, table: nn.Module, tokens: mx.array, factor: float | None = None) -> mx.array:
        """Return the rows."""


def table_rows(table: nn.Module, tokens: mx.array, factor: float | None = None) -> mx.array:
    """Return the rows of an embedding for tokens [...], multiplied by `factor`, [..., size]."""
    rows: mx.array = table(tokens)
    return rows if factor is None else rows * factor


class Target(nn.Module):
    """The text decoder with its output head, which is the embedding or a separate projection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.per_layer_input_size:
            width = len(config.layers) * config.per_layer_input_size
            self.embed_tokens_per_layer: nn.Module = nn.Embedding(config.per_layer_vocab_size, width)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, width, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(config.per_layer_input_size, eps=config.rms_norm_eps)
        if config.own_head:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # This mask, bool [vocab], is true for tokens that are never generated. It is not a parameter, because its name
        # begins with "_".
        self._suppressed: mx.array | None = None
        # A kernel may replace this function (see kernels.py).
        self.table_rows: TableRows = table_rows

    def suppress(self, tokens: Collection[int]) -> None:
        """Never generate these tokens (`suppress_tokens` of generation_config.json)."""
        self._suppressed = None
        if tokens:
            self._suppressed = ~allowed_tokens(tokens, self.config.vocab_size)[0]
            mx.eval(self._suppressed)

    def without_suppressed(self, logits: mx.array) -> mx.array:
        """Return the logits [..., vocab] with -inf at the tokens that are never generated."""
        return logits if self._suppressed is None else mx.where(self._suppressed, -mx.inf, logits)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations and K/V."""
        dtype: mx.Dtype = self.norm.weight.dtype
        return dtype

    @property
    def mapped(self) -> MappedEmbedding | None:
        """The per-layer table if it stays in its files, otherwise None."""
        table = self.get("embed_tokens_per_layer")
        return table if isinstance(table, MappedEmbedding) else None

    @property
    def fuses_prefill(self) -> bool:
        """Whether no full-attention layer keeps the attention scores of a prompt chunk in memory."""
        full = (i for i, layer in enumerate(self.config.layers) if layer.layer_type == "full_attention")
        return all(self.layers[i].self_attn.fused_prefill for i in full)

    @property
    def in_graph(self) -> "Target":
        """The target for functions that are compiled, which call it while they are traced only."""
        return self

    @property
    def sharing(self) -> dict[str, Any] | None:
        """The ranks that share the target, as the costs of its passes depend on them. None for a single process."""
        return None

    def make_cache(self, max_block: int, quantization: KVQuantization | None = None) -> Cache:
        """Return the cache of a new text. See `Cache` for the parameters and errors."""
        return Cache(self.config, self.dtype, max_block=max_block, quantization=quantization)

    def announce(self, cache: Cache, rows: int) -> None:
        """Tell other machines about a pass of `rows` rows in a compiled function. A single process has no others."""

    def when_lost(self, call: Callable[[str], None]) -> None:
        """Call a function with a reason if another machine is lost. A single process has no others."""

    def close(self) -> None:
        """Let other machines free their parts of the target. A single process has no others."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """Return a context in which a pass is announced and dispatched, and which Ctrl-C does not interrupt.

        A single process announces nothing, so Ctrl-C may interrupt it anywhere.
        """
        return nullcontext()

    def evaluate(self, *arrays: Any) -> None:
        """Evaluate trees of arrays that depend on passes, and wait for them."""
        mx.eval(*arrays)

    def async_evaluate(self, *arrays: Any) -> None:
        """Evaluate trees of arrays that depend on passes, without waiting for them."""
        mx.async_eval(*arrays)

    def read_per_layer_rows(self, tokens: list[int]) -> PerLayerRows | None:
        """Read the rows of the mapped per-layer table that a pass over these tokens needs.

        Returns None if no table is mapped.

        Raises WeightsError if the table can no longer be read.
        """
        return None if self.mapped is None else self.mapped.read(tokens)

    def __call__(
        self,
        tokens: mx.array,
        cache: Cache,
        logit_rows: int = 0,
        hidden_rows: int | None = None,
        per_layer_rows: PerLayerRows | None = None,
        media: MediaRows | None = None,
    ) -> TargetOutput:
        """Run one pass over tokens [1, length] at positions offset..offset+length-1.

        The pass writes the K/V of the tokens into `cache` and does not advance its offset. Hidden states are computed
        for the last `hidden_rows` rows only (default: all rows), and logits for the last `logit_rows` rows.
        `per_layer_rows` is the result of `read_per_layer_rows` for the tokens. If it is needed but not given, the pass
        waits for the tokens. `media` are the rows that stand for media.
        """
        length = tokens.shape[1]
        last_rows = length if hidden_rows is None else hidden_rows
        h = self.inputs(tokens, media)
        per_layer = self._per_layer_inputs(tokens, h, per_layer_rows)
        step = cache.start(length, None if media is None else media.last_seen)
        return self.run_layers(h, per_layer, step, logit_rows, last_rows)

    def inputs(self, tokens: mx.array, media: MediaRows | None) -> mx.array:
        """Return the embeddings of tokens [1, length] with the rows of media in their places, [1, length, size]."""
        return self.embed(tokens) if media is None else media.put(self.embed(tokens))

    def packed(
        self, tokens: mx.array, caches: Sequence[Cache], lengths: Sequence[int], between: Between | None = None
    ) -> list[TargetOutput]:
        """Run the passes of several streams as one pass, and return the output of each.

        `tokens` [1, rows] has `lengths[i]` tokens of stream i, one stream after the other. Each stream has its own
        cache, in which the pass writes as `__call__` does. Hidden states and logits are computed for all rows. The pass
        waits for the tokens if the per-layer table is mapped. `between` may be a compiled form of `between_attentions`.
        """
        h = self.embed(tokens)
        per_layer = self._per_layer_inputs(tokens, h, None)
        step = PackedPass([cache.start(length) for cache, length in zip(caches, lengths, strict=True)])
        rows = tokens.shape[1]
        hidden, logits = (step.split(each, 1) for each in self.run_layers(h, per_layer, step, rows, rows, between))
        return list(map(TargetOutput, hidden, logits))

    def run_layers(
        self,
        h: mx.array,
        per_layer: mx.array | None,
        step: Pass | PackedPass,
        logit_rows: int,
        last_rows: int,
        between: Between | None = None,
    ) -> TargetOutput:
        """Run all layers over embeddings h [1, length, hidden_size], and compute the last rows only, see `__call__`.

        A packed pass computes all rows.
        """
        length, between = h.shape[1], between or self.between_attentions
        offset, last_own = step.offset, max(config.kv_layer for config in self.config.layers)
        projected: Projected | None = self.layers[0].project(self.layers[0].input_layernorm(h), offset)
        for index, (layer, config) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            assert projected is not None
            queries, keys, values = projected
            views = step.read(config.kv_layer) if keys is None or values is None else step.write(index, keys, values)
            if index == last_own and last_rows < length:
                # From here on, no row needs the hidden states of another row. It needs only K/V, which are all written.
                if not last_rows:
                    h = h[:, :0]
                    break
                queries, h, offset = queries[:, :, -last_rows:], h[:, -last_rows:], offset + (length - last_rows)
                per_layer = None if per_layer is None else per_layer[:, -last_rows:]
            if h.shape[1] < length and isinstance(views, View):
                views = views._replace(mask=views.mask[-last_rows:])
            attended = layer.attend(queries, views)
            h, projected = between(index, h, attended, None if per_layer is None else per_layer[:, :, index], offset)
        return TargetOutput(h, self.head(h[:, h.shape[1] - logit_rows :]))

    def between_attentions(
        self, index: int, h: mx.array, attended: mx.array, per_layer: mx.array | None, offset: mx.array
    ) -> tuple[mx.array, Projected | None]:
        """Run the layers between two attentions, see `layers.between_attentions`."""
        return between_attentions(self.layers, self.norm, index, h, attended, per_layer, offset)

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits [1, rows, vocab], before the soft cap, of hidden states [1, rows, hidden_size]."""
        logits: mx.array = self.lm_head(hidden) if self.config.own_head else self.embed_tokens.as_linear(hidden)
        return logits

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the scaled input embeddings, [1, length, hidden_size], of tokens [1, length].

        The drafter uses them too.
        """
        return self.table_rows(self.embed_tokens, tokens, self.config.hidden_size**0.5)

    def soft_cap(self, logits: mx.array) -> mx.array:
        """Return the model's own logits: `tanh(logits / cap) * cap` (config field `final_logit_softcapping`)."""
        cap = self.config.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def _per_layer_inputs(self, tokens: mx.array, h: mx.array, per_layer_rows: PerLayerRows | None) -> mx.array | None:
        """Return the per-layer inputs, [1, length, layers, per_layer_input_size].

        Each input is the scaled sum of the layer's own embedding of the token and a projection of h.
        """
        size = self.config.per_layer_input_size
        if not size:
            return None
        shape = (*tokens.shape, len(self.layers), size)
        table = self.embed_tokens_per_layer
        embedded = self.table_rows(table, tokens) if per_layer_rows is None else table.unpack(per_layer_rows)
        embedded = embedded.reshape(shape) * size**0.5
        projected = self.per_layer_model_projection(h).reshape(shape)
        norm = self.per_layer_projection_norm
        # The projection has a scale of hidden_size ** -0.5 before its norm. The norm removes any scale but that of eps.
        normed = mx.fast.rms_norm(projected, norm.weight, norm.eps * self.config.hidden_size)
        inputs: mx.array = (normed + embedded) * 2.0**-0.5
        return inputs
