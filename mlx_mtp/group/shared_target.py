"""A target of which each rank of a group holds a part. All ranks take part in its passes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import TextConfig
from mlx_mtp.gemma4.disk_table import PerLayerRows
from mlx_mtp.gemma4.kv_cache import Cache, KVQuantization, PackedPass, Pass
from mlx_mtp.gemma4.layers import Between, Projected
from mlx_mtp.gemma4.target import MediaRows, Target, TargetOutput

from .split import Part

if TYPE_CHECKING:
    from .leader import Leader


class Collectives(Protocol):
    """The operations in which all ranks take part, in the same order. Their results are the same on all ranks."""

    @property
    def backend(self) -> str:
        """The name of MLX's backend."""

    def all_sum(self, x: mx.array) -> mx.array:
        """Return the sum of the arrays of all ranks, which have the same shape."""

    def all_gather(self, x: mx.array) -> mx.array:
        """Return the arrays of all ranks, which have the same shape, one after the other along the first axis."""


class SharedTarget(Target):
    """The part of a target that one rank holds, and its passes, in which all ranks take part.

    The tokens and offsets of rank 0 count. Followers may give any. The logits of a pass are complete on all ranks, or
    on rank 0 alone if the layers are split.

    Each collective of a pass depends on the one before it, so that their order is the same on all ranks.
    """

    def __init__(self, config: TextConfig, part: Part, ranks: Collectives) -> None:
        super().__init__(config)
        self.part = part
        self._ranks = ranks
        # Tells the followers about passes. None on a follower, and in graphs that are compiled.
        self._leader: Leader | None = None

    def lead(self, leader: "Leader") -> None:
        """Announce each pass to the followers."""
        self._leader = leader

    def take_part(self) -> None:
        """Become the part of the rank, after the parameters of the part were loaded."""
        part = self.part
        self.layers = [self.layers[index] for index in part.layers]
        self.config = part.config
        if part.split.kind == "pipeline":
            return
        for index, (layer, config) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            layer.add_up = self._add_up
            if part.split.kind == "tensor":
                attention = layer.self_attn
                attention.add_up = self._add_up
                attention.heads, attention.kv_heads = self.config.num_attention_heads, config.num_kv_heads
                attention.seen_heads = part.seen_heads(index)
        # The name begins with "_", so that its parameters are not parameters of the target.
        self._own_head: nn.Module | None = None
        if not self.config.own_head:
            self._own_head = _rows_of(self.embed_tokens, slice(*part.head(part.rank)[:2]))

    @property
    def sharing(self) -> dict[str, Any]:
        """The number of ranks, the split and the backend."""
        split = self.part.split
        return {
            "ranks": split.size,
            "split": split.kind,
            "bandwidths": list(split.bandwidths),
            "backend": self._ranks.backend,
        }

    def __call__(
        self,
        tokens: mx.array,
        cache: Cache,
        logit_rows: int = 0,
        hidden_rows: int | None = None,
        per_layer_rows: PerLayerRows | None = None,
        media: MediaRows | None = None,
    ) -> TargetOutput:
        """Take part in a pass over the tokens of rank 0. See `Target`."""
        tokens, last_seen = self._share(tokens, [cache], None if media is None else media.last_seen)
        media = None if media is None else media._replace(last_seen=last_seen)
        with self.undisturbed():
            output = super().__call__(tokens, cache, logit_rows, hidden_rows, per_layer_rows, media)
            if self._leader is not None:
                length = tokens.shape[1]
                self._leader.announce([cache], [length], logit_rows=logit_rows, hidden_rows=hidden_rows, media=media)
                # The followers compute these arrays, too. Without rows, an output would need more of the pass.
                self.async_evaluate([each for each in output if each.size], cache.arrays())
        return output

    def packed(
        self, tokens: mx.array, caches: Sequence[Cache], lengths: Sequence[int], between: Between | None = None
    ) -> list[TargetOutput]:
        """Take part in a packed pass over the tokens of rank 0. See `Target`."""
        tokens, _ = self._share(tokens, caches, None)
        with self.undisturbed():
            outputs = super().packed(tokens, caches, lengths, between)
            if self._leader is not None:
                self._leader.announce(caches, lengths, is_packed=True)
                self.async_evaluate(outputs, [cache.arrays() for cache in caches])
        return outputs

    @property
    def in_graph(self) -> "SharedTarget":
        """This target without announcements, for functions that are compiled."""
        if self._leader is None:
            return self
        silent = copy(self)
        silent._leader = None
        return silent

    def make_cache(self, max_block: int, quantization: KVQuantization | None = None) -> Cache:
        """Return the cache of a new text, which the followers have too. See `Target`."""
        if self._leader is None:
            return super().make_cache(max_block, quantization)
        return self._leader.make_cache(self, max_block, quantization)

    def announce(self, cache: Cache, rows: int) -> None:
        """Announce a pass in a compiled function, just before its evaluation. All its rows have logits."""
        if self._leader is not None:
            self._leader.announce([cache], [rows], logit_rows=rows)

    def when_lost(self, call: Callable[[str], None]) -> None:
        """Call a function with the reason if a follower is lost, on a thread of its connection."""
        if self._leader is not None:
            self._leader.group.when_lost(call)

    def close(self) -> None:
        """Let the followers free their parts."""
        if self._leader is not None:
            self._leader.close()
            self._leader = None

    def undisturbed(self) -> AbstractContextManager[None]:
        """Return a context that Ctrl-C does not interrupt. Otherwise a pass might be announced and never run."""
        return nullcontext() if self._leader is None else self._leader.undisturbed()

    def evaluate(self, *arrays: Any) -> None:
        """Evaluate arrays that depend on passes, and wait. Raises GroupError if a rank is lost meanwhile."""
        evaluate = super().evaluate if self._leader is None else self._leader.evaluate
        evaluate(*arrays)

    def async_evaluate(self, *arrays: Any) -> None:
        """Evaluate arrays that depend on passes. Raises GroupError if a rank is lost meanwhile."""
        evaluate = super().async_evaluate if self._leader is None else self._leader.async_evaluate
        evaluate(*arrays)

    def inputs(self, tokens: mx.array, media: MediaRows | None) -> mx.array:
        """Return the inputs of rank 0, which alone has the rows of media."""
        h = super().inputs(tokens, media)
        return h if media is None else self._from(0, h, h)

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits, of which each rank computes a part. All ranks must have the same number of rows."""
        rows, part = hidden.shape[1], self.part
        if not rows:
            return mx.zeros((1, 0, self.config.vocab_size), hidden.dtype)
        own = self.lm_head(hidden) if self._own_head is None else self._own_head.as_linear(hidden)
        gathered = mx.split(self._ranks.all_gather(own), part.split.size, axis=0)
        # The last ranges overlap.
        starts = [part.logits * rank - part.head(rank).start for rank in range(part.split.size)]
        return mx.concatenate([each[..., start:] for each, start in zip(gathered, starts, strict=True)], axis=-1)

    def _share(
        self, tokens: mx.array, caches: Sequence[Cache], last_seen: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Return the tokens [1, length] and `last_seen` of rank 0, and give the caches the offsets of rank 0."""
        numbers = [*(cache.offset[None] for cache in caches), tokens[0], *([] if last_seen is None else [last_seen])]
        mine = mx.concatenate(numbers)
        shared = self._ranks.all_sum(mx.zeros_like(mine) if self.part.rank else mine)
        for index, cache in enumerate(caches):
            cache.offset = shared[index]
        end = len(caches) + tokens.shape[1]
        return shared[None, len(caches) : end], None if last_seen is None else shared[end:]

    def _from(self, rank: int, mine: mx.array, before: mx.array) -> mx.array:
        """Return `mine` of one rank. `before` depends on the last collective, and so does this one."""
        if self.part.rank != rank:
            (mine,) = mx.depends([mx.zeros_like(mine)], [before])
        return self._ranks.all_sum(mine)

    def _add_up(self, *parts: mx.array) -> Sequence[mx.array]:
        """Return the sums over all ranks, with one collective."""
        if len(parts) == 1:
            return [self._ranks.all_sum(parts[0])]
        return list(mx.split(self._ranks.all_sum(mx.concatenate(list(parts), axis=-1)), len(parts), axis=-1))


class PipelineTarget(SharedTarget):
    """A part that consists of whole layers. Rank 0 has the last layers and the head, the last rank the first layers."""

    def run_layers(
        self,
        h: mx.array,
        per_layer: mx.array | None,
        step: Pass | PackedPass,
        logit_rows: int,
        last_rows: int,
        between: Between | None = None,
    ) -> TargetOutput:
        """Run the layers of all ranks, and compute the last rows only on rank 0. See `Target`."""
        rank = self.part.rank
        for stage in reversed(range(self.part.split.size)):
            mine = h
            if stage == rank:
                rows = last_rows if rank == 0 else h.shape[1]
                mine, logits = super().run_layers(h, None, step, logit_rows if rank == 0 else 0, rows, between)
            if stage == 0:
                return TargetOutput(mine, logits) if rank == 0 else TargetOutput(h, mx.zeros((1, logit_rows, 0)))
            h = self._from(stage, mine, h)
        raise AssertionError("a pipeline has a rank 0")

    def between_attentions(
        self, index: int, h: mx.array, attended: mx.array, per_layer: mx.array | None, offset: mx.array
    ) -> tuple[mx.array, Projected | None]:
        """Run the layers between two attentions. After the last layer, only rank 0 applies the final norm."""
        if self.part.rank and index + 1 == len(self.layers):
            return self.layers[index](h, attended, self.norm, per_layer).h, None
        return super().between_attentions(index, h, attended, per_layer, offset)

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits, which rank 0 computes alone."""
        return Target.head(self, hidden)


def _rows_of(table: nn.Embedding, rows: slice) -> nn.Module:
    """Return an embedding of some rows of a table, which shares the memory of the table."""
    part = copy(table)
    part.update({name: value[rows] for name, value in table.parameters().items()})
    mx.eval(part.parameters())
    return part
