"""One decoder layer of Gemma 4 and its parts: rotation, attention, feed-forward block, router and experts.

Target and drafter use the same class of layer. A drafter's layers have queries only.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import LayerConfig, RopeConfig, TextConfig

from .kv_cache import KVRows, Quantized, View, Views

# These are fields of mlx.nn.QuantizedLinear.
_QUANTIZATION = ("group_size", "bits", "mode")
# A pass with more rows is a chunk of a prompt. It is not split for the fused kernel.
LONGEST_PASS = 32
# MLX keeps all attention scores in memory if it has no kernel for a head size, as on the CPU. A chunk of a prompt
# attends in parts whose scores stay below this limit in bytes. Most chunks are chosen so that they are one part.
SCORE_BYTES = 1 << 29


def geglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return gelu(gate) * x, with the tanh approximation of gelu."""
    # On the CPU, a kernel takes the C++ compiler about a second, and a prompt does not repay it. MLX's own gelu_approx
    # is always compiled. In a compiled round, both forms are the same.
    return _plain_geglu(gate, x) if mx.default_device() == mx.Device(mx.cpu) else _compiled_geglu(gate, x)


def _plain_geglu(gate: mx.array, x: mx.array) -> mx.array:
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    gated: mx.array = 0.5 * gate * (1 + mx.tanh(inner)) * x
    return gated


_compiled_geglu = mx.compile(_plain_geglu, shapeless=True)


class Rope:
    """Rotary position embedding for one head size.

    It rotates the pairs (i, i + head_dim / 2). With RoPE type `proportional`, it rotates only
    the first pairs, a share `rotated_fraction` of them.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        rotated = int(head_dim * config.rotated_fraction)
        exponents = mx.arange(0, rotated, 2, dtype=mx.float32) / head_dim
        # An infinite period leaves the remaining pairs unrotated.
        still = mx.full((head_dim - rotated) // 2, mx.inf)
        self.periods = mx.concatenate([config.theta**exponents, still])
        # An array that is not evaluated belongs to this thread's stream and cannot be used on another thread.
        mx.eval(self.periods)
        self.dims = head_dim

    def __call__(self, x: mx.array, offset: mx.array) -> mx.array:
        """Rotate x [1, heads, length, head_dim].

        Row 0 is at position `offset`, int32 []. If `offset` is int32 [length], each row has its own position.
        """
        has_positions = offset.ndim == 1
        # Each row with a position of its own is a batch for MLX.
        x = x.transpose(2, 1, 0, 3) if has_positions else x
        x = mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.periods)
        return x.transpose(2, 1, 0, 3) if has_positions else x


class MLP(nn.Module):
    """Gated feed-forward block with GELU activation."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the output for x [1, length, hidden_size], in the same shape."""
        if "gate_up_proj" in self:
            return self.down_proj(geglu(*mx.split(self.gate_up_proj(x), 2, axis=-1)))
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))

    def fuse(self) -> None:
        """Join the gate and up projections into one projection, if their quantization is the same."""
        fused = _join([self.gate_proj, self.up_proj])
        if fused is not None:
            self.gate_up_proj = fused
            del self.gate_proj, self.up_proj


class Projected(NamedTuple):
    """Queries, keys and values of a layer, [1, heads, length, head_dim] each.

    All are normed. Queries and keys are also rotated. `keys` and `values` are None for a layer without K/V of its own.
    """

    queries: mx.array
    keys: mx.array | None = None
    values: mx.array | None = None


# A function that norms and rotates the heads of an attention (see `norm_and_rotate`).
NormAndRotate = Callable[["Attention", mx.array, mx.array], Projected]


class AddUp(Protocol):
    """A function that adds up outputs of which several machines have parts (see `keep`)."""

    def __call__(self, *parts: mx.array) -> Sequence[mx.array]:
        """Return the sums over all machines of each part, all [1, length, size]."""


def keep(*parts: mx.array) -> Sequence[mx.array]:
    """Return the parts: a machine that is alone has the whole outputs."""
    return parts


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, and without a scale.

    Layers that share K/V have queries only.
    """

    def __init__(self, config: TextConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.rope = Rope(config.rope[layer.layer_type], layer.head_dim)
        self.eps = config.rms_norm_eps
        width = config.num_attention_heads * layer.head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = layer.num_kv_heads
        self.k_eq_v = layer.k_eq_v
        # Passes with up to this number of rows attend row by row (see decoding/exact.py).
        self.exact_rows = 0
        # The number of rows in one call of MLX's fused kernel, or 0 if MLX chooses (see fused_attention.py).
        self.fused_rows = 0
        # True if MLX's fused kernel takes the rows of a prompt chunk, so that scores are not kept in memory.
        self.fused_prefill = False
        # A kernel may replace this function (see kernels.py).
        self.norm_and_rotate: NormAndRotate = norm_and_rotate
        # A group of machines replaces this function, and sets the K/V heads of a view that the queries see (see the
        # package `group`). None stands for all heads.
        self.add_up: AddUp = keep
        self.seen_heads: slice | None = None
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(layer.head_dim, eps=config.rms_norm_eps)
        if layer.has_kv:
            kv_width = layer.num_kv_heads * layer.head_dim
            self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
            self.v_proj = None if layer.k_eq_v else nn.Linear(config.hidden_size, kv_width, bias=False)
            self.k_norm = nn.RMSNorm(layer.head_dim, eps=config.rms_norm_eps)

    def fuse(self) -> None:
        """Join all projections of the input into one projection, if their quantization is the same."""
        names = [name for name in ("q_proj", "k_proj", "v_proj") if self.get(name) is not None]
        fused = _join([self[name] for name in names]) if len(names) > 1 else None
        if fused is not None:
            self.qkv_proj = fused
            weights = [self.q_norm.weight] * self.heads + [self.k_norm.weight] * self.kv_heads
            self.qk_scale = mx.stack(weights)[:, None]
            for name in [*names, "q_norm", "k_norm"]:
                del self[name]

    def project(self, x: mx.array, offset: mx.array) -> Projected:
        """Project x [1, length, hidden_size] to queries, keys and values. `Rope` explains `offset`."""
        # A kernel takes one position.
        rotate = norm_and_rotate if offset.ndim else self.norm_and_rotate
        if "qkv_proj" in self:
            return rotate(self, self.qkv_proj(x), offset)
        if "k_proj" not in self:
            return rotate(self, self.q_proj(x), offset)
        queries = self.rope(self.q_norm(self.split_heads(self.q_proj(x))), offset)
        keys = self.split_heads(self.k_proj(x))
        values = keys if self.v_proj is None else self.split_heads(self.v_proj(x))
        return Projected(queries, self.rope(self.k_norm(keys), offset), mx.fast.rms_norm(values, None, self.eps))

    def attend(self, queries: mx.array, views: Views) -> mx.array:
        """Return what queries find in the K/V of the views, [1, length, heads * head_dim], for `__call__`."""
        if isinstance(views, View):
            return self._attend(queries, views).transpose(0, 2, 1, 3).flatten(-2)
        ends = list(accumulate(view.mask.shape[0] for view in views))[:-1]
        parts = zip(mx.split(queries, ends, axis=2), views, strict=True)
        # To join the rows of the streams is a copy. If the heads are moved before it, the last step is none.
        rows = [self._attend(some, view).transpose(0, 2, 1, 3) for some, view in parts]
        return mx.concatenate(rows, axis=1).flatten(-2)

    def __call__(self, attended: mx.array) -> mx.array:
        """Return the attention output [1, length, hidden_size], from the result of `attend`."""
        (output,) = self.add_up(self.o_proj(attended))
        return output

    def _attend(self, queries: mx.array, view: View) -> mx.array:
        """Return the attention output of queries [1, heads, rows, head_dim], in their shape."""
        rows = queries.shape[2]
        if self.seen_heads is not None:
            view = view.of_heads(self.seen_heads)
        is_chunk = rows > LONGEST_PASS
        is_fused = isinstance(view.keys, mx.array) and (self.fused_prefill if is_chunk else bool(self.fused_rows))
        at_once = min(rows, self.fused_rows) if is_fused and not is_chunk else rows
        at_once = 1 if rows <= self.exact_rows else at_once
        if is_chunk and not is_fused:
            scores_of_row = queries.shape[1] * view.mask.shape[-1] * queries.dtype.size
            at_once = min(rows, max(LONGEST_PASS, SCORE_BYTES // scores_of_row))
        parts = []
        for row in range(0, rows, at_once):
            some = slice(row, row + at_once)
            parts.append(attend(queries[:, :, some], view.keys, view.values, view.mask[some], is_fused))
            if is_chunk and at_once < rows:
                # Otherwise MLX allocates the scores of several parts ahead.
                mx.eval(parts[-1])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def split_heads(self, x: mx.array) -> mx.array:
        """Change the shape from [1, length, heads * head_dim] to [1, heads, length, head_dim]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(0, 2, 1, 3)


def norm_and_rotate(attention: "Attention", projected: mx.array, offset: mx.array) -> Projected:
    """Norm and rotate all heads together.

    `projected` [1, length, width] is the output of the only projection. `Rope` explains `offset`.
    """
    if "qkv_proj" not in attention:
        return Projected(attention.rope(attention.q_norm(attention.split_heads(projected)), offset))
    normed = mx.fast.rms_norm(attention.split_heads(projected), None, attention.eps)
    rotated = attention.rope(normed[:, : attention.heads + attention.kv_heads] * attention.qk_scale, offset)
    # The last heads are the values, or the keys if these are the values too.
    return Projected(rotated[:, : attention.heads], rotated[:, attention.heads :], normed[:, -attention.kv_heads :])


def attend(queries: mx.array, keys: KVRows, values: KVRows, mask: mx.array, force_fused: bool = False) -> mx.array:
    """Return the attention output of queries [1, heads, length, head_dim], without a scale, in their shape.

    `force_fused` makes MLX use its fused kernel.
    """
    if isinstance(keys, mx.array) and isinstance(values, mx.array):
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=1.0, mask=mask, force_fused=force_fused
        )
    assert isinstance(keys, Quantized)
    assert isinstance(values, Quantized)
    return _attend_quantized(queries, keys, values, mask)


def _attend_quantized(queries: mx.array, keys: Quantized, values: Quantized, mask: mx.array) -> mx.array:
    _, heads, length, head_dim = queries.shape
    kv_heads = keys.packed.shape[1]
    # Query heads that share K/V become more rows for the same matrix. As a separate dimension, they would make some
    # devices copy the matrix for each head.
    grouped = queries.reshape(1, kv_heads, -1, head_dim)
    multiply = partial(mx.quantized_matmul, group_size=keys.group_size, bits=keys.bits)
    scores = multiply(grouped, *keys.parts, transpose=True)
    scores = mx.where(mask, scores.reshape(1, heads, length, -1), -mx.inf)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(1, kv_heads, grouped.shape[2], -1)
    return multiply(weights, *values.parts, transpose=False).reshape(queries.shape)


class Router(nn.Module):
    """Router that chooses the experts of each row and their weights.

    The weights are a softmax over the chosen scores, times a learned scale per expert.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.top_k = config.top_k_experts
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return expert indices and weights, both [1, length, top_k]."""
        scores = self.proj(mx.fast.rms_norm(x, self.scale * x.shape[-1] ** -0.5, self.eps))
        chosen = mx.argpartition(scores, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
        return chosen, weights * self.per_expert_scale[chosen]


class _ExpertActivation(nn.Module):
    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return geglu(gate, x)


class Experts(nn.Module):
    """The expert feed-forward blocks of a mixture-of-experts layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        # Import it here: mlx-lm imports transformers, which takes seconds, and only the 26B model needs it.
        from mlx_lm.models.switch_layers import SwitchGLU

        self.switch_glu = SwitchGLU(
            config.hidden_size, config.moe_intermediate_size, config.num_experts, activation=_ExpertActivation()
        )

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """Return the weighted sum of the outputs of the chosen experts, [1, length, hidden_size]."""
        return (self.switch_glu(x, chosen) * weights[..., None]).sum(-2)


class Residual(NamedTuple):
    """The residual stream `h`, and `normed`, its norm for the next part of the network. Both are [1, length, size].

    `normed` is `h` if there is no next norm.
    """

    h: mx.array
    normed: mx.array


class AddNorm(Protocol):
    """A function that adds to the residual stream (see `add_norm`)."""

    def __call__(
        self,
        x: mx.array,
        norm: nn.RMSNorm,
        h: mx.array,
        scale: mx.array | None = None,
        following: nn.RMSNorm | None = None,
    ) -> Residual:
        """Return the new residual stream."""


def add_norm(
    x: mx.array,
    norm: nn.RMSNorm,
    h: mx.array,
    scale: mx.array | None = None,
    following: nn.RMSNorm | None = None,
) -> Residual:
    """Add the norm of x [1, length, size] to the residual stream h, multiply by `scale`, and norm by `following`."""
    h = h + norm(x)
    if scale is not None:
        h = h * scale
    return Residual(h, h if following is None else following(h))


class DecoderLayer(nn.Module):
    """One decoder layer: attention and feed-forward block, with optional experts and per-layer input."""

    def __init__(self, config: TextConfig, layer: LayerConfig) -> None:
        super().__init__()
        norm = partial(nn.RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config.hidden_size, layer.intermediate_size)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.layer_scalar = mx.ones((1,))
        # A kernel may replace this function (see kernels.py).
        self.add_norm: AddNorm = add_norm
        # A group of machines replaces this function (see the package `group`).
        self.add_up: AddUp = keep
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.router = Router(config)
            self.experts = Experts(config)
            self.pre_feedforward_layernorm_2 = norm()
            self.post_feedforward_layernorm_1 = norm()
            self.post_feedforward_layernorm_2 = norm()
        if config.per_layer_input_size:
            self.per_layer_input_gate = nn.Linear(config.hidden_size, config.per_layer_input_size, bias=False)
            self.per_layer_projection = nn.Linear(config.per_layer_input_size, config.hidden_size, bias=False)
            self.post_per_layer_input_norm = norm()

    def project(self, normed: mx.array, offset: mx.array) -> Projected:
        """Project the normed residual stream to queries, keys and values. `Rope` explains `offset`."""
        return self.self_attn.project(normed, offset)

    def attend(self, queries: mx.array, views: Views) -> mx.array:
        """Return what queries of `project` find in the K/V of the views, [1, length, heads * head_dim]."""
        return self.self_attn.attend(queries, views)

    def __call__(
        self, h: mx.array, attended: mx.array, following: nn.RMSNorm, per_layer_input: mx.array | None = None
    ) -> Residual:
        """Return the residual stream after this layer, and its norm by `following`, the next norm of the model.

        `attended` comes from `attend`.
        """
        add_norm = self.add_norm
        h, normed = add_norm(
            self.self_attn(attended), self.post_attention_layernorm, h, following=self.pre_feedforward_layernorm
        )
        update = self._feed_forward(h, normed)
        if per_layer_input is None:
            return add_norm(update, self.post_feedforward_layernorm, h, self.layer_scalar, following)
        h, _ = add_norm(update, self.post_feedforward_layernorm, h)
        update = self.per_layer_projection(geglu(self.per_layer_input_gate(h), per_layer_input))
        return add_norm(update, self.post_per_layer_input_norm, h, self.layer_scalar, following)

    def _feed_forward(self, h: mx.array, normed: mx.array) -> mx.array:
        dense: mx.array = self.mlp(normed)
        if not self.has_experts:
            (dense,) = self.add_up(dense)
            return dense
        sparse: mx.array = self.experts(self.pre_feedforward_layernorm_2(h), *self.router(h))
        dense, sparse = self.add_up(dense, sparse)
        return self.add_norm(sparse, self.post_feedforward_layernorm_2, self.post_feedforward_layernorm_1(dense)).h


class Between(Protocol):
    """A function that runs the layers between two attentions (see `between_attentions`)."""

    def __call__(
        self, index: int, h: mx.array, attended: mx.array, per_layer: mx.array | None, offset: mx.array
    ) -> tuple[mx.array, Projected | None]:
        """Return the new residual stream, and the queries, keys and values of the next layer."""


def between_attentions(
    layers: list[DecoderLayer],
    final: nn.RMSNorm,
    index: int,
    h: mx.array,
    attended: mx.array,
    per_layer: mx.array | None,
    offset: mx.array,
) -> tuple[mx.array, Projected | None]:
    """Run the layers of a network from the attention of layer `index` to that of the next layer.

    `h` [1, length, hidden_size] is the residual stream, `attended` the result of `DecoderLayer.attend`, `per_layer`
    [1, length, size] the per-layer input, and `Rope` explains `offset`. Return the new residual stream and the queries,
    keys and values of the next layer. After the last layer, return the hidden states after the norm `final`, and None.
    """
    following = layers[index + 1] if index + 1 < len(layers) else None
    norm = final if following is None else following.input_layernorm
    h, normed = layers[index](h, attended, norm, per_layer)
    return (normed, None) if following is None else (h, following.project(normed, offset))


def fuse_projections(layers: list[DecoderLayer]) -> None:
    """Join projections of the same input, for fewer and larger multiplications.

    Results stay the same up to rounding. No projection is kept twice.
    """
    for layer in layers:
        for module in (layer.self_attn, layer.mlp):
            module.fuse()
            # Evaluate one module at a time, so that only its weights are in memory twice.
            mx.eval(module.parameters())


def spread_layer_scalars(layers: list[DecoderLayer]) -> None:
    """Repeat the scalar of each layer, [1], to [hidden_size], so that the layers share compiled kernels.

    MLX writes a single number into the code of a compiled kernel: each layer would need a kernel of its own.
    """
    for layer in layers:
        layer.layer_scalar = mx.contiguous(mx.broadcast_to(layer.layer_scalar, layer.input_layernorm.weight.shape))
        mx.eval(layer.layer_scalar)


def lay_out_weights(module: nn.Module) -> None:
    """Store float32 projection weights by input instead of by output, if the device is the CPU.

    Products are fastest with this memory layout. Shapes stay the same, and products stay the same up to rounding.

    The BLAS of MLX's CPU build for Linux computes one output after another, and each sum waits for its last term. With
    weights stored by input, it adds to all outputs at once. Other types and devices have kernels for both layouts.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for part in module.modules():
        if type(part) is nn.Linear and part.weight.dtype == mx.float32:
            part.weight = mx.contiguous(part.weight.T).T
            # Evaluate one weight at a time, so that only this weight is in memory twice.
            mx.eval(part.weight)


def _join(projections: list[nn.Module]) -> nn.Module | None:
    """Return one projection with the outputs of all projections.

    Returns None if their types or quantization differ.
    """
    first = projections[0]
    kinds = {(type(p), p.get("bias") is None, *(getattr(p, name, None) for name in _QUANTIZATION)) for p in projections}
    if len(kinds) > 1 or type(first) not in (nn.Linear, nn.QuantizedLinear) or "bias" in first:
        return None
    joined = copy(first)
    joined.update({name: mx.concatenate([p[name] for p in projections]) for name in first.parameters()})
    return joined
