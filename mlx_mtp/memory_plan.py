"""The memory that a pair needs, planned from the headers of its files, and the memory of the machine."""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from mlx_mtp.checkpoints.config import DrafterConfig, LayerType, TargetConfig, TextConfig
from mlx_mtp.checkpoints.layouts import drafter_names, is_media, target_names
from mlx_mtp.checkpoints.media_config import AudioConfig, UnifiedVisionConfig, VisionConfig, read_media_config
from mlx_mtp.checkpoints.tensors import DTYPES, FLOAT_TYPES, read_checkpoint
from mlx_mtp.decoding.prefill import chunk_size
from mlx_mtp.gemma4.disk_table import KEPT_BYTES
from mlx_mtp.gemma4.fused_attention import fuses_all_prefill
from mlx_mtp.gemma4.kv_cache import KVQuantization, check_group_size, rows_in_buffers, spare_slots
from mlx_mtp.gemma4.layers import SCORE_BYTES
from mlx_mtp.media.audio import MEL_BINS, MEL_STEP, MOST_SAMPLES
from mlx_mtp.media.images import BUDGETS

from .errors import ConfigError, MemoryLimitError, OptionError

if TYPE_CHECKING:
    # A process that is alone does not import this package.
    from mlx_mtp.group.split import Part

# The number of copies of a round's logits that exist at the same time: warped, sorted, compared.
_LOGITS = 6
# The number of them that each more text in the round adds. Most are freed before those of the next text are made.
_MORE_LOGITS = 3
_UNITS = {"": 1e9, "GB": 1e9, "MB": 1e6, "GIB": 2.0**30, "MIB": 2.0**20, "B": 1.0}
# MLX counts bytes in 64 bits.
_LARGEST_SIZE = 2**63


def memory_size() -> int:
    """Return the size of this machine's memory in bytes."""
    size = mx.device_info().get("memory_size")
    return int(size) if size else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory() -> int:
    """Return the bytes that this machine's device recommends to use, or the size of the memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended) if recommended else memory_size()


def parse_bytes(text: str) -> int:
    """Convert a size such as "6", "6GB", "6GiB", "800MB" or "800MiB" to bytes.

    A number alone is in GB (1e9 bytes). Raises OptionError for any other text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise OptionError(f"expected a number of GB, or one with GB, MB, GiB or MiB behind it, found {text!r}")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size >= _LARGEST_SIZE:
        raise OptionError(f"expected less than {_LARGEST_SIZE / 1e9:.3g} GB, found {text!r}")
    return int(size)


@dataclass(frozen=True)
class SharedPlan:
    """The memory and the cost of a target that several machines share.

    `peaks` are the bytes that each rank needs, `read` the most bytes of weights that a rank reads in a pass over one
    token, and `whole` those of a single machine. A pass has `collectives` exchanges between the ranks, of `latency`
    seconds each. `bandwidth` is that of the memory of rank 0, in bytes per second.
    """

    split: str
    peaks: tuple[int, ...]
    read: int
    whole: int
    collectives: int
    latency: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """The seconds of a pass that its collectives take. A round has one pass."""
        return self.collectives * self.latency

    @property
    def alone(self) -> float:
        """The least seconds of a pass of one machine like rank 0."""
        return self.whole / self.bandwidth

    @property
    def together(self) -> float:
        """The least seconds of a pass of machines like rank 0. Those of a pipeline compute one after the other."""
        return self.seconds + (self.whole if self.split == "pipeline" else self.read) / self.bandwidth

    def __str__(self) -> str:
        peaks = ", ".join(f"rank {rank} {_gigabytes(peak)}" for rank, peak in enumerate(self.peaks))
        lines = [
            f"split {self.split} over {len(self.peaks)} machines: {peaks}",
            f"a pass has {self.collectives} collectives of {1000 * self.latency:.3g} ms: {1000 * self.seconds:.3g} ms",
        ]
        if self.split == "pipeline":
            lines.append("a pipeline divides the memory, not the time: the machines compute one after the other")
        else:
            saved = self.whole - self.read
            lines.append(
                f"a machine reads {_gigabytes(self.read)} of weights a pass instead of {_gigabytes(self.whole)}: "
                f"faster than one machine below {saved / self.seconds / 1e9:.3g} GB/s of memory bandwidth"
            )
        lines.append(
            f"at the {self.bandwidth / 1e9:.3g} GB/s of rank 0, a pass over one token takes at least "
            f"{1000 * self.together:.3g} ms, and {1000 * self.alone:.3g} ms on one machine"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory in bytes that a pair needs at its peak, for a context of `context` tokens.

    `kv` is the K/V of full-attention layers, which grow with the context. `rings` is the K/V of sliding layers. `work`
    is the temporary memory of a chunk of the prompt, of a round, or of a buffer that grows. The plan leaves out the K/V
    of earlier prompts (`Model.prompt_cache`). `media` is what the first prompt with a picture or a sound adds: the
    weights of these parts, and their attention scores. `peak` does not count it. `peak` is that of one text: each more
    text that decodes at the same time adds its `rings`, its `kv` and `more_work`. If several machines share the target,
    the plan is that of rank 0, and `shared` has the others.
    """

    context: int
    weights: int
    token_embeddings: int
    per_layer_embeddings: int
    drafter: int
    kv_per_token: int
    rings: int
    work: int
    more_work: int
    media: int
    shared: SharedPlan | None = None

    @property
    def kv(self) -> int:
        """Bytes of the K/V of full-attention layers."""
        return rows_in_buffers(self.context) * self.kv_per_token

    @property
    def resident(self) -> int:
        """Bytes of the weights of both models."""
        return self.weights + self.token_embeddings + self.per_layer_embeddings + self.drafter

    @property
    def peak(self) -> int:
        """Bytes of weights, K/V and work together."""
        return self.resident + self.rings + self.kv + self.work

    def rows(self) -> Iterator[tuple[str, int]]:
        """Yield the name and the bytes of each part, as a table shows them."""
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
        media = [("more, if a prompt has media", self.media)] if self.media else []
        per_tokens = ("K/V per 1000 tokens", 1000 * self.kv_per_token)
        rows = [
            *self.rows(),
            *media,
            ("each more text at the same time", self.rings + self.kv + self.more_work),
            per_tokens,
        ]
        table = "\n".join(f"{name:<32}{_gigabytes(size):>12}" for name, size in rows)
        return table if self.shared is None else f"{table}\n{self.shared}"


def planner(
    target: TargetConfig,
    drafter: DrafterConfig | None,
    *,
    max_block: int,
    prefill_step: int,
    kv: KVQuantization | None = None,
    mapped: bool = False,
    part: "Part | None" = None,
) -> Callable[[int], MemoryPlan]:
    """Return a function that makes the plan for a context of a given number of tokens.

    `max_block` is the largest number of rows of a verify pass. `prefill_step` is the largest number of rows of a chunk
    of the prompt. `kv` is the K/V quantization. `mapped` leaves the per-layer embeddings on disk. `part` is the part of
    the target that a rank of a group holds. Only rank 0 has a drafter, and reads media.

    Raises WeightsError if a checkpoint cannot be read, and OptionError if the groups of `kv` do not fit the heads.
    """
    weights = _target_weights(target, part)
    size, text = weights.dtype.size, target.text if part is None else part.config
    is_leader = part is None or not part.rank
    is_fused = fuses_all_prefill(text, weights.dtype)
    # Quantized K/V always have scores, and a text can begin with K/V that are not quantized.
    ways = {is_fused, is_fused and kv is None}
    media = _media_bytes(target, size) if is_leader else 0
    drafter_size = 0 if drafter is None or not is_leader else _drafter_bytes(drafter, size)
    table = weights.per_layer_embeddings
    if mapped:
        # Only the rows used last are kept in memory.
        table = min(table, KEPT_BYTES)
    if kv is not None:
        check_group_size(text, kv)

    def plan(context_length: int) -> MemoryPlan:
        text_memory = TextMemory(text, size, context_length, max_block, kv)
        return MemoryPlan(
            context=context_length,
            weights=weights.layers,
            token_embeddings=weights.token_embeddings,
            per_layer_embeddings=table,
            drafter=drafter_size,
            kv_per_token=text_memory.kv_per_token,
            rings=text_memory.rings,
            work=max(_work(text, context_length, size, max_block, prefill_step, is_fused=way) for way in ways),
            more_work=text_memory.more_work,
            media=media,
        )

    return plan


@dataclass(frozen=True)
class TextMemory:
    """The memory in bytes that one text needs while it decodes: its K/V, for at most `tokens` tokens.

    `size` is that of a value of the activations in bytes, `max_block` the largest number of rows of a verify pass, and
    `kv` the K/V quantization.
    """

    config: TextConfig
    size: int
    tokens: int
    max_block: int
    kv: KVQuantization | None = None

    @property
    def rings(self) -> int:
        """Bytes of the K/V of sliding layers."""
        slots = self.config.sliding_window + spare_slots(self.max_block)
        return _kv_width(self.config, "sliding_attention") * slots * self.size

    @property
    def kv_per_token(self) -> int:
        """Bytes of the K/V of a token in full-attention layers."""
        is_quantized = self.kv is not None and self.tokens > self.kv.start
        value = _quantized_size(self.kv, self.size) if self.kv is not None and is_quantized else self.size
        return int(_kv_width(self.config, "full_attention") * value)

    @property
    def kept(self) -> int:
        """Bytes of all K/V."""
        return self.rings + rows_in_buffers(self.tokens) * self.kv_per_token

    @property
    def more_work(self) -> int:
        """Temporary bytes that the text adds to a round of other texts."""
        return _MORE_LOGITS * self.max_block * self.config.vocab_size * 4

    def work(self, prefill_step: int, *, is_fused: bool) -> int:
        """Return the temporary bytes of a chunk of its prompt, of a round alone, or of a buffer that grows."""
        return _work(self.config, self.tokens, self.size, self.max_block, prefill_step, is_fused=is_fused)


def check_memory(plan: Callable[[int], MemoryPlan], context_length: int, limit: int, source: str) -> None:
    """Raise MemoryLimitError if the plan for a context needs more than `limit` bytes.

    The message says which changes would keep the limit.
    """
    wanted = plan(context_length)
    if wanted.peak <= limit:
        return
    ways = []
    # Search the longest context that fits: the peak grows with the context.
    fitting = bisect_right(range(2, context_length), limit, key=lambda tokens: plan(tokens).peak) + 1
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


class _TargetWeights(NamedTuple):
    """Bytes of the parts of a target in its files, and the type of its activations."""

    layers: int
    token_embeddings: int
    per_layer_embeddings: int
    dtype: mx.Dtype


def _target_weights(config: TargetConfig, part: "Part | None") -> _TargetWeights:
    """Return the sizes of a target, or of a part of it. Raises WeightsError if the checkpoint cannot be read."""
    sizes = {"embed_tokens": 0, "embed_tokens_per_layer": 0, "": 0}
    dtype = mx.float32
    for key, tensor in read_checkpoint(config.path.parent).items():
        for name in target_names(key, config)[:1]:
            module = name.split(".")[0]
            share = Fraction(1) if part is None else part.share(name)
            sizes[module if module in sizes else ""] += int(tensor.nbytes * share)
            if name == "norm.weight":
                dtype = DTYPES[tensor.dtype].mlx
    return _TargetWeights(sizes[""], sizes["embed_tokens"], sizes["embed_tokens_per_layer"], dtype)


def read_per_pass(config: TargetConfig, part: "Part | None" = None) -> int:
    """Return the bytes of weights that a pass over one token reads, of a target or of a rank's part of it.

    Of the experts, only the chosen experts count. A table that is no head does not count, because a pass reads only one
    row of it. Raises WeightsError if the checkpoint cannot be read.
    """
    text, total = config.text, Fraction(0)
    for key, tensor in read_checkpoint(config.path.parent).items():
        for name in target_names(key, config)[:1]:
            is_table = name.startswith("embed_tokens.")
            if name.startswith("embed_tokens_per_layer.") or (is_table and text.own_head):
                continue
            share = Fraction(1)
            if part is not None:
                share = part.head_share if is_table else part.share(name)
            if "switch_glu" in name:
                share *= Fraction(text.top_k_experts, text.num_experts)
            total += tensor.nbytes * share
    return int(total)


def _media_bytes(config: TargetConfig, size: int) -> int:
    """Return the bytes that the first picture or sound adds: the weights, and the work of the largest one.

    A checkpoint without media parts, or with parts that are not supported, adds nothing. Some conversions keep the
    description of parts without their tensors.
    """
    try:
        media = read_media_config(config)
    except ConfigError:
        return 0
    if media.vision is None and media.audio is None:
        return 0
    weights = sum(tensor.nbytes for key, tensor in read_checkpoint(config.path.parent).items() if is_media(key))
    if not weights:
        return 0
    picture = _picture_bytes(media.vision, size) if media.vision is not None else 0
    sound = _sound_bytes(media.audio, size) if isinstance(media.audio, AudioConfig) else 0
    return weights + max(picture, sound)


def _sound_bytes(audio: AudioConfig, size: int) -> int:
    """Return the temporary bytes of the audio tower for the longest sound. Values have `size` bytes each."""
    # The first convolution halves both sides. MLX allocates some arrays of its output, and more if they change type.
    # The number of arrays was measured.
    output = MOST_SAMPLES // MEL_STEP // 2 * (MEL_BINS // 2) * audio.conv_channels[0]
    return (8 if size == mx.float32.size else 10) * output * mx.float32.size


def _picture_bytes(vision: VisionConfig | UnifiedVisionConfig, size: int) -> int:
    """Return the temporary bytes of a vision model for the largest picture. Values have `size` bytes each."""
    if isinstance(vision, UnifiedVisionConfig):
        # The embedder has some arrays with the size of the pixels, and some of its width. Their numbers were measured.
        values = 6.5 * 3 * vision.patch_size**2 + 9.5 * vision.embed_dim
        return int(max(BUDGETS) * values * mx.float32.size)
    patches = max(BUDGETS) * vision.pooling_kernel_size**2
    # The CPU has no fused attention, so all scores of a part of the rows exist at the same time.
    is_cpu = mx.default_device() == mx.Device(mx.cpu)
    scores = min(SCORE_BYTES // mx.float32.size, vision.num_attention_heads * patches**2) * size if is_cpu else 0
    # MLX allocates ahead: all values up to the attention of a layer exist at the same time, and all values between it
    # and that of the next layer. Norms and rotations are in float32. The numbers of such values were measured.
    attention = scores + patches * vision.hidden_size * (8 * size + 10 * mx.float32.size)
    feed_forward = patches * (4 * vision.intermediate_size * size + 12 * vision.hidden_size * mx.float32.size)
    pixels = patches * 3 * vision.patch_size**2 * mx.float32.size
    return max(attention, feed_forward) + pixels


def _work(
    text: TextConfig, context_length: int, size: int, max_block: int, prefill_step: int, *, is_fused: bool
) -> int:
    """Return the temporary bytes of a prompt chunk, of a round, or of a buffer that grows: the largest of them."""
    kv_rows = rows_in_buffers(context_length)
    chunk = min(chunk_size(text, kv_rows, size, prefill_step, is_fused=is_fused), context_length)
    reading = _chunk_bytes(text, chunk, kv_rows, text.sliding_window + spare_slots(max_block), size, is_fused)
    deciding = _LOGITS * max_block * text.vocab_size * 4
    largest = max(layer.num_kv_heads * layer.head_dim for layer in text.layers if layer.has_kv)
    # A buffer that grows needs a second copy.
    return max(reading, deciding, kv_rows * largest * size)


def _chunk_bytes(text: TextConfig, chunk: int, kv_rows: int, ring: int, size: int, is_fused: bool) -> int:
    """Return the temporary bytes of a prompt chunk that sees `kv_rows` rows in full attention."""
    # The last layer that owns K/V attends with one row only.
    last_own = max(layer.kv_layer for layer in text.layers)
    has_scores = not is_fused and any(layer.layer_type == "full_attention" for layer in text.layers[:last_own])
    # MLX allocates ahead. The scores and masks of a sliding layer and the activations of a layer exist at the same
    # time as the scores and masks of a full-attention layer, or as the activations of a second layer.
    score, layer = text.num_attention_heads * size + 1, _activations(text) * size
    full = kv_rows * (score if has_scores else 1)
    return chunk * ((ring + chunk) * score + layer + max(full, layer))


def _kv_width(text: TextConfig, layer_type: LayerType) -> int:
    """Return the number of values per position in the K/V of all layers of a type."""
    return sum(
        2 * layer.num_kv_heads * layer.head_dim
        for layer in text.layers
        if layer.has_kv and layer.layer_type == layer_type
    )


def _quantized_size(kv: KVQuantization, size: int) -> float:
    """Return the bytes of a quantized value, with its share of a scale and a bias."""
    return kv.bits / 8 + 2 * size / kv.group_size


def _activations(text: TextConfig) -> int:
    """Return the number of values that a layer and the per-layer inputs need for a row of a prompt chunk.

    Attention scores are not included. Chunks end at the last layer that owns K/V.
    """
    read = text.layers[: 1 + max(layer.kv_layer for layer in text.layers)]
    feed_forward = max(3 * layer.intermediate_size for layer in read)
    heads = max(2 * text.num_attention_heads * layer.head_dim for layer in read)
    return 2 * text.hidden_size + max(feed_forward, heads) + 3 * len(text.layers) * text.per_layer_input_size


def _drafter_bytes(config: DrafterConfig, size: int) -> int:
    """Return the number of bytes of a loaded drafter.

    Float values take the target's type, and token ids take four bytes each. U8 values are scales and stay as they are.
    """
    total = 0
    for key, tensor in read_checkpoint(config.path.parent).items():
        if drafter_names(key, config):
            width = size if tensor.dtype in FLOAT_TYPES else 1 if tensor.dtype == "U8" else 4
            total += math.prod(tensor.shape) * width
    return total


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
