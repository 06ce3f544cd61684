"""Sound of Gemma 4: from frames to rows of the text decoder, one clip at a time.

`AudioModel` has the tower of E2B and E4B, a conformer over log-mel frames. `UnifiedAudioModel` is that of 12B, which
has no tower. Parameter names are the published ones, without `model.`. The computation is that of transformers, for the
valid frames of a clip.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.media_config import MEL_BINS, AudioConfig, UnifiedAudioConfig

from .media_layers import ClippedLinear, MediaProjection

# The reference gives its norms around the attention and the feed-forward blocks this epsilon, whatever the config says.
_NORM_EPS = 1e-6
_LONGEST_PERIOD = 10000.0


def limit(x: mx.array, most: float) -> mx.array:
    """Return x with values from -most to most, or to the largest number of its type if that is smaller."""
    most = min(most, mx.finfo(x.dtype).max)
    return mx.clip(x, -most, most)


class SubsampleLayer(nn.Module):
    """A convolution that halves frames and bins, with a norm over the channels."""

    def __init__(self, input_channels: int, channels: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_channels, channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(channels, eps=eps, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Return [1, frames / 2, bins / 2, channels], rounded up, of x [1, frames, bins, input_channels]."""
        normed: mx.array = self.norm(self.conv(x))
        return mx.maximum(normed, 0)


class Subsampling(nn.Module):
    """Two convolutions, and a projection: four frames make a token."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.conv_channels
        self.layer0 = SubsampleLayer(1, first, config.rms_norm_eps)
        self.layer1 = SubsampleLayer(first, second, config.rms_norm_eps)
        self.input_proj_linear = nn.Linear(MEL_BINS // 4 * second, config.hidden_size, bias=False)

    def __call__(self, frames: mx.array) -> mx.array:
        """Return [1, tokens, hidden_size] of log-mel frames [frames, bins]."""
        x = frames[None, :, :, None].astype(self.layer0.norm.weight.dtype)
        tokens: mx.array = self.input_proj_linear(self.layer1(self.layer0(x)).flatten(2))
        return tokens


class AudioFeedForward(nn.Module):
    """A feed-forward block with SiLU activation, and a share of its output added to its input."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.most, self.weight = config.activation_limit, config.residual_weight
        self.ffw_layer_1 = ClippedLinear(size, 4 * size, config.use_clipped_linears)
        self.ffw_layer_2 = ClippedLinear(4 * size, size, config.use_clipped_linears)
        self.pre_layer_norm = nn.RMSNorm(size, eps=_NORM_EPS)
        self.post_layer_norm = nn.RMSNorm(size, eps=_NORM_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        """Return x [1, tokens, hidden_size] with the share added."""
        update = self.ffw_layer_2(nn.silu(self.ffw_layer_1(self.pre_layer_norm(limit(x, self.most)))))
        normed: mx.array = self.post_layer_norm(limit(update, self.most))
        return x + self.weight * normed


class AudioAttention(nn.Module):
    """Attention to the last rows, with a learned embedding of distances. It is computed in float32."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size = config.hidden_size
        linear = partial(ClippedLinear, size, size, config.use_clipped_linears)
        self.heads, self.context, self.cap = config.num_attention_heads, config.context, config.logit_cap
        self.q_proj, self.k_proj, self.v_proj, self.post = linear(), linear(), linear(), linear()
        self.relative_k_proj = nn.Linear(size, size, bias=False)
        self.per_dim_scale = mx.zeros((size // config.num_attention_heads,))

    def __call__(self, x: mx.array) -> mx.array:
        """Return the attention output for x [1, tokens, hidden_size], in the same shape."""
        tokens = mx.arange(x.shape[1])
        seen = tokens[:, None] - mx.arange(self.context)
        queries, keys, values = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        factor = queries.shape[-1] ** -0.5 / math.log(2)
        queries = queries * (factor * nn.softplus(self.per_dim_scale.astype(mx.float32)))
        keys = keys * (math.log(1 + math.e) / math.log(2))
        # Rows before the first have a negative index. Any row may stand in for them, because their weight is 0.
        keys, values = (rows[mx.maximum(seen, 0)] for rows in (keys, values))
        scores = (queries[:, None] * (keys + self._distances(x.dtype))).sum(-1)
        scores = mx.where(seen[..., None] >= 0, mx.tanh(scores / self.cap) * self.cap, -mx.inf)
        weights = mx.softmax(scores, axis=1)
        out = (weights[..., None] * values).sum(1)
        return self.post(out.reshape(x.shape).astype(x.dtype))

    def _heads(self, projected: mx.array) -> mx.array:
        """Return [tokens, heads, head_dim] in float32 of one batch [1, tokens, hidden_size]."""
        return projected.astype(mx.float32).reshape(projected.shape[1], self.heads, -1)

    def _distances(self, dtype: mx.Dtype) -> mx.array:
        """Return the embeddings of the distances 0 to context - 1, float32 [context, heads, head_dim]."""
        half = self.heads * self.per_dim_scale.size // 2
        periods = _LONGEST_PERIOD ** (mx.arange(half, dtype=mx.float32) / max(half - 1, 1))
        angles = mx.arange(self.context)[:, None] / periods
        sinusoids = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
        return self._heads(self.relative_k_proj(sinusoids.astype(dtype))[None])


class LightConvolution(nn.Module):
    """A gated convolution of each channel over the last rows."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.most = config.activation_limit
        self.linear_start = ClippedLinear(size, 2 * size, config.use_clipped_linears)
        self.linear_end = ClippedLinear(size, size, config.use_clipped_linears)
        self.depthwise_conv1d = nn.Conv1d(size, size, config.conv_kernel_size, groups=size, bias=False)
        self.earlier = config.conv_kernel_size - 1
        self.pre_layer_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.conv_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        """Return x [1, tokens, hidden_size] with the output of the convolution added."""
        gated = nn.glu(self.linear_start(self.pre_layer_norm(x)))
        # Zeros stand before the first row, so that no row depends on a later one.
        convolved = self.depthwise_conv1d(mx.pad(gated, [(0, 0), (self.earlier, 0), (0, 0)]))
        return x + self.linear_end(nn.silu(self.conv_norm(limit(convolved, self.most))))


class AudioLayer(nn.Module):
    """One layer of the conformer: attention and convolution between two feed-forward blocks."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.most = config.activation_limit
        self.feed_forward1 = AudioFeedForward(config)
        self.feed_forward2 = AudioFeedForward(config)
        self.self_attn = AudioAttention(config)
        self.lconv1d = LightConvolution(config)
        norm = partial(nn.RMSNorm, config.hidden_size, eps=_NORM_EPS)
        self.norm_pre_attn, self.norm_post_attn, self.norm_out = norm(), norm(), norm()

    def __call__(self, x: mx.array) -> mx.array:
        """Return the rows after this layer, for x [1, tokens, hidden_size], in the same shape."""
        x = self.feed_forward1(x)
        update = self.self_attn(self.norm_pre_attn(limit(x, self.most)))
        x = x + self.norm_post_attn(limit(update, self.most))
        normed: mx.array = self.norm_out(limit(self.feed_forward2(self.lconv1d(x)), self.most))
        return normed


class AudioTower(nn.Module):
    """The conformer, with its convolutions before it."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.subsample_conv_projection = Subsampling(config)
        self.layers = [AudioLayer(config) for _ in range(config.num_hidden_layers)]
        self.output_proj = nn.Linear(config.hidden_size, config.output_size)

    def __call__(self, frames: mx.array) -> mx.array:
        """Return features [1, tokens, output_size] of log-mel frames [frames, bins]."""
        x = self.subsample_conv_projection(frames)
        for layer in self.layers:
            x = layer(x)
        features: mx.array = self.output_proj(x)
        return features


class AudioModel(nn.Module):
    """The audio tower with its projection to the width of the text decoder."""

    def __init__(self, config: AudioConfig, hidden_size: int) -> None:
        super().__init__()
        self.audio_tower = AudioTower(config)
        self.embed_audio = MediaProjection(config.output_size, hidden_size, config.rms_norm_eps)

    def __call__(self, frames: mx.array) -> mx.array:
        """Return rows for the text decoder, [1, tokens, hidden_size], of log-mel frames [frames, bins], float32.

        A token stands for four frames; the last one may stand for fewer. The rows replace scaled embeddings.
        """
        return self.embed_audio(self.audio_tower(frames))


class UnifiedAudioModel(nn.Module):
    """The audio embedder of 12B: a projection of raw samples."""

    def __init__(self, config: UnifiedAudioConfig, hidden_size: int) -> None:
        super().__init__()
        self.embed_audio = MediaProjection(config.samples_per_token, hidden_size, config.rms_norm_eps)

    def __call__(self, frames: mx.array) -> mx.array:
        """Return rows for the text decoder, [1, tokens, hidden_size], of frames of samples [tokens, samples].

        Both are float32. The rows replace scaled embeddings.
        """
        return self.embed_audio(frames[None])


def audio_model(config: AudioConfig | UnifiedAudioConfig, hidden_size: int) -> AudioModel | UnifiedAudioModel:
    """Return the model of a config, for a text decoder of width `hidden_size`. Its weights are not filled."""
    if isinstance(config, UnifiedAudioConfig):
        return UnifiedAudioModel(config, hidden_size)
    return AudioModel(config, hidden_size)
