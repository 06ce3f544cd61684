"""Prefill: read a prompt in chunks, with snapshots of the rings for later prompts."""

from collections.abc import Callable

import mlx.core as mx

from mlx_mtp.checkpoints.config import TextConfig
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.layers import LONGEST_PASS, SCORE_BYTES
from mlx_mtp.gemma4.target import Target

from .prompt_cache import CacheEntry, KVFormat, ReusedPrefix, Snapshot
from .prompt_media import PromptMedia

# The prefill calls this function with (tokens done, tokens in total).
Progress = Callable[[int, int], None]

# The limit of attention scores in bytes does not reduce a chunk below this number of rows.
_LEAST_CHUNK = LONGEST_PASS


class PromptReader:
    """The reader of one text's prompt.

    It keeps the rings of the sliding layers every `snapshot_every` tokens and at the end of the prompt, or nothing if
    `snapshot_every` is None. Other prompts with the same beginning can resume from these snapshots.
    """

    def __init__(self, target: Target, snapshot_every: int | None, media: PromptMedia) -> None:
        self._target = target
        self._media = media
        self._snapshot_every = snapshot_every
        self._snapshots: list[Snapshot] = []
        # This is true while a chunk of the prompt is read. The rings then hold neither the old rows nor the new rows.
        self._is_reading = False

    def resume(self, cache: Cache, reused: ReusedPrefix) -> None:
        """Put the K/V of an earlier text into the cache."""
        entry, snapshot, length = reused
        cache.restore(entry.full, snapshot.rings, length, snapshot.written)
        self._snapshots = [earlier for earlier in entry.snapshots if earlier.position <= length]

    def read_chunk(
        self, cache: Cache, prompt: list[int], step_size: int, on_progress: Progress | None = None
    ) -> tuple[mx.array, mx.array] | None:
        """Read the next chunk of the prompt, at most `step_size` tokens after the cache's length.

        After the last chunk, return the logits [1, vocab] and the hidden state [1, 1, hidden_size] of the last token of
        the prompt. Return None before.
        """
        start, target = cache.length, self._target
        # Quantized K/V always have scores.
        is_fused = target.fuses_prefill and cache.quantization is None
        kv_rows = cache.rows_for(step_size)
        size = chunk_size(target.config, kv_rows, target.dtype.size, step_size, is_fused=is_fused)
        end = self._media.end_of_chunk(start, min(len(prompt), start + cache.longest_pass(size)))
        self._is_reading = True
        logits, hidden = self._read_chunk(cache, prompt, end)
        cache.set_length(end)
        self._is_reading = False
        every = self._snapshot_every
        if every is not None and (end == len(prompt) or end // every > start // every):
            self._snapshots.append(Snapshot(end, cache.written, cache.buffers("sliding_attention")))
        if on_progress is not None:
            on_progress(end, len(prompt))
        return (logits, hidden) if end == len(prompt) else None

    def _read_chunk(self, cache: Cache, prompt: list[int], end: int) -> tuple[mx.array, mx.array]:
        """Read the prompt up to `end`, and return the logits and the hidden state after its last token.

        Both have no rows before the last chunk.
        """
        target, is_last = self._target, end == len(prompt)
        chunk, media = self._media.chunk(prompt, cache.length, end)
        per_layer_rows = target.read_per_layer_rows(chunk)
        tokens, count = mx.array([chunk], mx.int32), int(is_last)
        output = target(tokens, cache, logit_rows=count, hidden_rows=count, per_layer_rows=per_layer_rows, media=media)
        logits, hidden = mx.zeros((0, target.config.vocab_size)), mx.zeros((1, 0, target.config.hidden_size))
        if is_last:
            logits, hidden = output.logits.squeeze(0), output.hidden
        # Nothing needs the rest of the output, so MLX does not compute it.
        del output
        target.evaluate(logits, hidden, cache.arrays())
        return logits, hidden

    def cache_entry(self, cache: Cache, tokens: list[int], kv_format: KVFormat) -> CacheEntry | None:
        """Return the K/V of a text for later texts, or None if a failure left nothing usable."""
        live = cache.buffers("sliding_attention")
        snapshots = [snapshot for snapshot in self._snapshots if snapshot.position < cache.length]
        if not self._is_reading and live:
            snapshots.append(Snapshot(cache.length, cache.written, live))
        full = cache.buffers("full_attention")
        if not full or not snapshots:
            return None
        return CacheEntry(kv_format, self._media.keys(tokens)[: snapshots[-1].position], full, snapshots)


def chunk_size(config: TextConfig, kv_rows: int, itemsize: int, step_size: int, *, is_fused: bool) -> int:
    """Return the number of prompt tokens to read in one pass that sees `kv_rows` K/V rows.

    MLX keeps all attention scores in memory if it has no kernel for a head size. The chunk keeps the scores of a layer
    below a limit in bytes. If a kernel takes the full-attention layers (`is_fused`), the scores of sliding layers
    remain.
    """
    if is_fused:
        kv_rows = config.sliding_window + step_size
    most = SCORE_BYTES // (config.num_attention_heads * kv_rows * itemsize)
    return min(step_size, max(_LEAST_CHUNK, most))
