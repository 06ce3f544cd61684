"""Layers that images and sound share: linear layers with bounds, and the projection into the text decoder."""

import mlx.core as mx
import mlx.nn as nn


class ClippedLinear(nn.Module):
    """A linear layer without a bias. With `has_bounds`, its input and output are clipped to bounds of the checkpoint.

    The bounds are scalars, and parameters.
    """

    def __init__(self, input_size: int, output_size: int, has_bounds: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, output_size, bias=False)
        if has_bounds:
            self.input_min = self.output_min = mx.array(-mx.inf)
            self.input_max = self.output_max = mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the output [..., output_size] for x [..., input_size], in the type of x."""
        if "input_min" not in self:
            return self.linear(x)
        return _clip(self.linear(_clip(x, self.input_min, self.input_max)), self.output_min, self.output_max)


def _clip(x: mx.array, low: mx.array, high: mx.array) -> mx.array:
    """Return x within bounds. Bounds of a wider type would make the result wider too."""
    return mx.clip(x, low.astype(x.dtype), high.astype(x.dtype))


class MediaProjection(nn.Module):
    """The projection of features to the width of the text decoder, after a norm without a weight."""

    def __init__(self, input_size: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.embedding_projection = nn.Linear(input_size, hidden_size, bias=False)
        self.eps = eps

    def __call__(self, features: mx.array) -> mx.array:
        """Return rows for the text decoder, [1, tokens, hidden_size], of features [1, tokens, input_size]."""
        projected: mx.array = self.embedding_projection(mx.fast.rms_norm(features, None, self.eps))
        return projected
