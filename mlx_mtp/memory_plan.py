"""What a pair takes of memory, from its files' headers alone, and what there is."""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.checkpoints.config import DrafterConfig, LayerType, TargetConfig, TextConfig
from mlx_mtp.checkpoints.weights import FLOAT_TYPES, drafter_names, read_checkpoint, target_names
from mlx_mtp.decoding.stream import chunk_size
from mlx_mtp.gemma4.disk_table import KEPT_BYTES
from mlx_mtp.gemma4.kv_cache import KVQuantization, check_group_size, rows_in_buffers

from .errors import MemoryLimitError, OptionError

# Copies of the logits of a round that live at the same time: warped, sorted, compared.
_LOGITS = 6
_UNITS = {"": 1e9, "GB": 1e9, "MB": 1e6, "GIB": 2.0**30, "MIB": 2.0**20, "B": 1.0}
# MLX counts bytes in 64 bits.
_LARGEST_SIZE = 2**63


def memory_size() -> int:
    """Bytes of this machine's memory."""
    size = mx.device_info().get("memory_size")
    return int(size) if size else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_bytes(text: str) -> int:
    """Bytes from "6", "6GB" (1e9 bytes each), "6GiB", "800MB", "800MiB". Raises OptionError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise OptionError(f"expected a number of GB, or one with GB, MB, GiB or MiB behind it, found {text!r}")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size >= _LARGEST_SIZE:
        raise OptionError(f"expected less than {_LARGEST_SIZE / 1e9:.3g} GB, found {text!r}")
    return int(size)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a pair takes, at its peak, with a context of so many tokens, of which `kv` depends on it.

    `rings` are the K/V of sliding layers, `work` what a chunk of the prompt, a round, or a buffer that grows takes for
    a time. Not in it: what is kept of earlier prompts (`Model.prompt_cache`).
    """

    context: int
    weights: int
    token_embeddings: int
    per_layer_embeddings: int
    drafter: int
    kv_per_token: int
    rings: int
    work: int

    @property
    def kv(self) -> int:
        return rows_in_buffers(self.context) * self.kv_per_token

    @property
    def resident(self) -> int:
        """Of the weights of both models."""
        return self.weights + self.token_embeddings + self.per_layer_embeddings + self.drafter

    @property
    def peak(self) -> int:
        return self.resident + self.rings + self.kv + self.work

    def rows(self) -> Iterator[tuple[str, int]]:
        """Names and bytes, as a table shows them."""
        yield "target's layers", self.weights
        yield "token embeddings (both models)", self.token_embeddings
        if self.per_layer_embeddings:
            yield "per-layer embeddings", self.per_layer_embeddings
        if self.drafter:
            yield "drafter", self.drafter
        yield "K/V of sliding layers", self.rings
        yield f"K/V of {self.context} tokens", self.kv
        yield "work of a pass", self.work
        yield "peak", self.peak

    def __str__(self) -> str:
        lines = [f"{name:<32}{_gigabytes(size):>12}" for name, size in self.rows()]
        return "\n".join([*lines, f"{'K/V per 1000 tokens':<32}{_gigabytes(1000 * self.kv_per_token):>12}"])


def planner(
    target: TargetConfig,
    drafter: DrafterConfig | None,
    *,
    max_block: int,
    prefill_step: int,
    kv: KVQuantization | None = None,
    mapped: bool = False,
) -> Callable[[int], MemoryPlan]:
    """What makes a plan for a context of so many tokens. `max_block` is the most rows of a verify pass, `prefill_step`
    those of a chunk of the prompt, `kv` how K/V are quantized; `mapped` leaves the per-layer embeddings on disk.

    Raises WeightsError for a checkpoint that cannot be read, OptionError for groups that do not fit the heads.
    """
    shares = {"embed_tokens": 0, "embed_tokens_per_layer": 0, "": 0}
    size = 4
    for key, tensor in read_checkpoint(target.path.parent).items():
        for name in target_names(key, target)[:1]:
            module = name.split(".")[0]
            shares[module if module in shares else ""] += tensor.nbytes
            if name == "norm.weight":
                size = tensor.nbytes // math.prod(tensor.shape)
    drafter_size = 0 if drafter is None else _drafter_bytes(drafter, size)
    text = target.text
    largest = max(layer.num_kv_heads * layer.head_dim for layer in text.layers if layer.has_kv)
    ring = text.sliding_window + max_block
    # The last layer with K/V of its own attends with one row only.
    last_own = max(layer.kv_layer for layer in text.layers)
    attends = any(layer.layer_type == "full_attention" for layer in text.layers[:last_own])
    table = shares["embed_tokens_per_layer"]
    if mapped:
        # The rows kept.
        table = min(table, KEPT_BYTES)
    width = _kv_width(text, "full_attention")
    if kv is not None:
        check_group_size(text, kv)

    def plan(context: int) -> MemoryPlan:
        rows = rows_in_buffers(context)
        chunk = min(chunk_size(text, rows, size, prefill_step), context)
        # MLX allocates ahead: scores, and masks, of a full-attention layer and a sliding one, or two layers' products.
        score, layer = text.num_attention_heads * size + 1, _activations(text) * size
        full = rows * (score if attends else 1)
        reading = chunk * ((ring + chunk) * score + layer + max(full, layer))
        deciding = _LOGITS * max_block * text.vocab_size * 4
        return MemoryPlan(
            context=context,
            weights=shares[""],
            token_embeddings=shares["embed_tokens"],
            per_layer_embeddings=table,
            drafter=drafter_size,
            kv_per_token=int(width * size if kv is None or context <= kv.start else width * _quantized_size(kv, size)),
            rings=_kv_width(text, "sliding_attention") * ring * size,
            # Growing takes a second copy of one buffer.
            work=max(reading, deciding, rows * largest * size),
        )

    return plan


def check_memory(plan: Callable[[int], MemoryPlan], context: int, limit: int, source: str) -> None:
    """Raise MemoryLimitError if the plan for a context does not keep a limit of so many bytes; it says what would."""
    wanted = plan(context)
    if wanted.peak <= limit:
        return
    ways = []
    # The longest context that fits: a plan grows with it.
    fitting = bisect_right(range(2, context), limit, key=lambda tokens: plan(tokens).peak) + 1
    if fitting > 1:
        ways.append(f"a context of {fitting} tokens (--max-context {fitting})")
    if wanted.per_layer_embeddings > KEPT_BYTES and wanted.peak - wanted.per_layer_embeddings + KEPT_BYTES <= limit:
        ways.append("the per-layer embeddings left on disk (--per-layer-embeddings mapped)")
    if wanted.drafter and wanted.peak - wanted.drafter <= limit:
        ways.append("no drafter (--drafter none)")
    fits = "what would fit: " + ", or ".join(ways) if ways else "only fewer bits or a smaller model would fit"
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in wanted.rows() if name != "peak")
    raise MemoryLimitError(
        f"{source}: needs {_gigabytes(wanted.peak)}, more than the limit of {_gigabytes(limit)} ({parts}); {fits}"
    )


def _kv_width(text: TextConfig, layer_type: LayerType) -> int:
    """Values per position in the K/V of all layers of a type."""
    return sum(
        2 * layer.num_kv_heads * layer.head_dim
        for layer in text.layers
        if layer.has_kv and layer.layer_type == layer_type
    )


def _quantized_size(kv: KVQuantization, size: int) -> float:
    """Bytes of a value, with its share of a scale and a bias."""
    return kv.bits / 8 + 2 * size / kv.group_size


def _activations(text: TextConfig) -> int:
    """Values per row that a layer and the per-layer inputs take of a chunk of the prompt, beside attention scores.
    Chunks end at the last layer with K/V of its own."""
    read = text.layers[: 1 + max(layer.kv_layer for layer in text.layers)]
    feed_forward = max(3 * layer.intermediate_size for layer in read)
    heads = max(2 * text.num_attention_heads * layer.head_dim for layer in read)
    return 2 * text.hidden_size + max(feed_forward, heads) + 3 * len(text.layers) * text.per_layer_input_size


def _drafter_bytes(config: DrafterConfig, size: int) -> int:
    """A drafter's values take the target's type, its token ids four bytes; U8 are scales, which stay as they are."""
    total = 0
    for key, tensor in read_checkpoint(config.path.parent).items():
        if drafter_names(key, config):
            width = size if tensor.dtype in FLOAT_TYPES else 1 if tensor.dtype == "U8" else 4
            total += math.prod(tensor.shape) * width
    return total


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
