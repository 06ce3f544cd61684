"""Images of Gemma 4: from pixels to rows of the text decoder, one picture at a time.

`VisionModel` has the tower of E2B, E4B, 26B and 31B. `UnifiedVisionModel` is that of 12B, which has no tower. Parameter
names are the published ones, without `model.`. The computation is that of transformers, without its padding.
"""

import math
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.media_config import UnifiedVisionConfig, VisionConfig

from .layers import SCORE_BYTES, geglu
from .media_layers import ClippedLinear, MediaProjection

# The norms of the unified embedder have the epsilon of PyTorch's LayerNorm.
_LAYER_NORM_EPS = 1e-5


def to_patches(pixels: mx.array, size: int) -> mx.array:
    """Cut pixels [height, width, 3] into squares of `size` pixels, [rows, columns, size * size * 3].

    The values of a patch are in the order (row, column, channel). Height and width must be multiples of `size`.
    """
    height, width, channels = pixels.shape
    cut = pixels.reshape(height // size, size, width // size, size, channels)
    return cut.transpose(0, 2, 1, 3, 4).flatten(2)


def attend_in_parts(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Return the attention output of queries [1, heads, length, head_dim], in their shape.

    All queries see all keys, without a scale. See `SCORE_BYTES` for the memory.
    """
    _, heads, length, _ = queries.shape
    # Softmax is computed in float32.
    at_once = max(1, SCORE_BYTES // (heads * keys.shape[2] * mx.float32.size))
    parts: list[mx.array] = []
    for row in range(0, length, at_once):
        part = queries[:, :, row : row + at_once]
        parts.append(mx.fast.scaled_dot_product_attention(part, keys, values, scale=1.0))
        # Otherwise MLX allocates ahead: the scores of several parts, or those of one together with the next values.
        mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


class Rotation(NamedTuple):
    """The cosines and sines of a picture's patches, float32 [patches, 2, head_dim / 4]: by column, and by row."""

    cos: mx.array
    sin: mx.array

    @classmethod
    def of_grid(cls, rows: int, columns: int, head_dim: int, theta: float) -> "Rotation":
        """Return the rotation of `rows` x `columns` patches, which are in the order of reading."""
        pairs = head_dim // 4
        frequencies = theta ** -(mx.arange(pairs, dtype=mx.float32) / pairs)
        row, column = mx.meshgrid(mx.arange(rows), mx.arange(columns), indexing="ij")
        positions = mx.stack([column.flatten(), row.flatten()], axis=-1)
        angles = positions[..., None] * frequencies
        return cls(mx.cos(angles), mx.sin(angles))

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x [1, heads, patches, head_dim]. Each half of a head has the pairs (i, i + head_dim / 4)."""
        halves = x.reshape(*x.shape[:-1], 2, 2, -1)
        first, second = halves[..., 0, :], halves[..., 1, :]
        rotated = mx.stack([first * self.cos - second * self.sin, second * self.cos + first * self.sin], axis=-2)
        return rotated.reshape(x.shape).astype(x.dtype)


class PatchEmbedder(nn.Module):
    """The linear embedding of patches, with the sum of two learned position embeddings: by column, and by row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.zeros((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, patches: mx.array) -> mx.array:
        """Return embeddings [rows, columns, hidden_size] of patches [rows, columns, values] of values 0 to 1."""
        rows, columns, _ = patches.shape
        table = self.position_embedding_table
        embedded: mx.array = self.input_proj((2 * patches - 1).astype(table.dtype))
        return embedded + (table[0, :columns] + table[1, :rows, None])


class VisionAttention(nn.Module):
    """Attention between all patches of a picture, with normed queries, keys and values, and without a scale."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        linear = partial(ClippedLinear, has_bounds=config.use_clipped_linears)
        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.q_proj = linear(config.hidden_size, width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(width, config.hidden_size)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rotate: Rotation) -> mx.array:
        """Return the attention output for x [1, patches, hidden_size], in the same shape."""
        queries = rotate(self.q_norm(self._split_heads(self.q_proj(x))))
        keys = rotate(self.k_norm(self._split_heads(self.k_proj(x))))
        values = mx.fast.rms_norm(self._split_heads(self.v_proj(x)), None, self.eps)
        out = attend_in_parts(queries, keys, values)
        return self.o_proj(out.transpose(0, 2, 1, 3).flatten(-2))

    def _split_heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(0, 2, 1, 3)


class VisionMLP(nn.Module):
    """Gated feed-forward block with GELU activation."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        linear = partial(ClippedLinear, has_bounds=config.use_clipped_linears)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the output for x [1, patches, hidden_size], in the same shape."""
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """One layer of the tower: attention and feed-forward block, each with a norm before and after it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        norm = partial(nn.RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()

    def __call__(self, x: mx.array, rotate: Rotation) -> mx.array:
        """Return the residual stream after this layer, [1, patches, hidden_size]."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotate))
        update: mx.array = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x + update


class VisionEncoder(nn.Module):
    """The layers of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, rotate: Rotation) -> mx.array:
        """Return the residual stream after the last layer, [1, patches, hidden_size]."""
        for layer in self.layers:
            x = layer(x, rotate)
        return x


class VisionTower(nn.Module):
    """The vision tower. Some patches, pooled, make a token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(self, pixels: mx.array) -> mx.array:
        """Return features [1, tokens, hidden_size] of pixels [height, width, 3] of values 0 to 1."""
        config = self.config
        embedded = self.patch_embedder(to_patches(pixels, config.patch_size))
        rows, columns, _ = embedded.shape
        rotate = Rotation.of_grid(rows, columns, config.head_dim, config.rope_theta)
        encoded = self.encoder(embedded.flatten(0, 1)[None], rotate)
        pooled = self._pool(encoded.reshape(rows, columns, -1))
        # The scaled values can be too large for float16.
        features = pooled.astype(mx.float32) * math.sqrt(config.hidden_size)
        if config.standardize:
            features = (features - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return features.astype(pooled.dtype)

    def _pool(self, x: mx.array) -> mx.array:
        """Return the means of squares of patches, [1, tokens, hidden_size], of x [rows, columns, hidden_size]."""
        rows, columns, hidden_size = x.shape
        size = self.config.pooling_kernel_size
        squares = x.reshape(rows // size, size, columns // size, size, hidden_size).astype(mx.float32)
        return squares.mean((1, 3)).reshape(1, -1, hidden_size).astype(x.dtype)


class VisionModel(nn.Module):
    """The vision tower with its projection to the width of the text decoder."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.embed_vision = MediaProjection(config.hidden_size, hidden_size, config.rms_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Return rows for the text decoder, [1, tokens, hidden_size], of pixels [height, width, 3], float32 0 to 1.

        Height and width must be multiples of `patch_size * pooling_kernel_size`. The rows replace scaled embeddings.
        """
        return self.embed_vision(self.vision_tower(pixels))


class UnifiedVisionEmbedder(nn.Module):
    """The embedder of 12B: a linear layer between norms, and the sum of two learned position embeddings."""

    def __init__(self, config: UnifiedVisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        values = 3 * config.patch_size**2
        self.patch_ln1 = nn.LayerNorm(values, eps=_LAYER_NORM_EPS)
        self.patch_dense = nn.Linear(values, config.embed_dim)
        self.patch_ln2 = nn.LayerNorm(config.embed_dim, eps=_LAYER_NORM_EPS)
        self.pos_embedding = mx.zeros((config.position_embedding_size, 2, config.embed_dim))
        self.pos_norm = nn.LayerNorm(config.embed_dim, eps=_LAYER_NORM_EPS)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Return features [1, tokens, embed_dim] of pixels [height, width, 3] of values 0 to 1."""
        patches = to_patches(pixels, self.patch_size)
        rows, columns, _ = patches.shape
        table = self.pos_embedding
        x = self.patch_ln2(self.patch_dense(self._norm_pixels(patches.astype(table.dtype))))
        x = x + (table[:columns, 0] + table[:rows, None, 1])
        features: mx.array = self.pos_norm(x)
        return features.flatten(0, 1)[None]

    def _norm_pixels(self, patches: mx.array) -> mx.array:
        """Return the first norm of patches, in their type.

        The mean is subtracted twice. MLX's first mean of so many values has an error, which the norm of a patch of
        nearly one colour would enlarge.
        """
        exact = patches.astype(mx.float32)
        normed: mx.array = self.patch_ln1(exact - exact.mean(-1, keepdims=True))
        return normed.astype(patches.dtype)


class UnifiedVisionModel(nn.Module):
    """The vision embedder of 12B with its projection to the width of the text decoder."""

    def __init__(self, config: UnifiedVisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.vision_embedder = UnifiedVisionEmbedder(config)
        self.embed_vision = MediaProjection(config.embed_dim, hidden_size, config.rms_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Return rows for the text decoder, [1, tokens, hidden_size], of pixels [height, width, 3], float32 0 to 1.

        Height and width must be multiples of `patch_size`. The rows replace scaled embeddings.
        """
        return self.embed_vision(self.vision_embedder(pixels))


def vision_model(config: VisionConfig | UnifiedVisionConfig, hidden_size: int) -> VisionModel | UnifiedVisionModel:
    """Return the model of a config, for a text decoder of width `hidden_size`. Its weights are not filled."""
    if isinstance(config, UnifiedVisionConfig):
        return UnifiedVisionModel(config, hidden_size)
    return VisionModel(config, hidden_size)
