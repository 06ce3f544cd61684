"""Prompts that are read in advance and kept in files."""

from pathlib import Path

from mlx_mtp.decoding.draft_length import LARGEST_COPY
from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.decoding.prompt_cache import CacheEntry
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.gemma4.target import Target

from .decoding import prompt_cache
from .errors import PromptCacheError


def read_ahead(
    target: Target, tokens: list[int], step_size: int, kv: KVQuantization | None, on_progress: Progress
) -> CacheEntry:
    """Read a prompt in chunks of `step_size` tokens, and return its K/V. If `on_progress` raises, reading ends."""
    stream = Stream(target, None, max_draft_tokens=LARGEST_COPY, kv_quantization=kv)
    stream.read(tokens, step_size, on_progress)
    entry = stream.cache_entry()
    assert entry is not None
    return entry


def load_entry(file: Path, identity: str, expected: KVQuantization | None) -> CacheEntry:
    """Load the K/V of a prompt from a file, for the model with this identity.

    Raises PromptCacheError if the file is damaged, belongs to another model or another format version, or has another
    K/V quantization than `expected`.
    """
    entry = prompt_cache.load(file, identity)
    if entry.kv_format.quantization != expected:
        raise PromptCacheError(
            f"{file}: its K/V quantization is {entry.kv_format.quantization}, but {expected} is asked for: "
            "kv_bits, kv_group_size and quantized_kv_start must be those it was made with"
        )
    return entry
