"""The smallest text config that a K/V cache accepts."""

import mlx.core as mx

from mlx_mtp.checkpoints.config import LayerConfig, LayerType, RopeConfig, TextConfig
from mlx_mtp.gemma4.kv_cache import KVRows

LAYER_TYPES: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
WINDOW = 8
HEAD_DIM = 2


def two_layers(window: int = WINDOW, head_dim: int = HEAD_DIM, kv_heads: int = 1) -> TextConfig:
    """Return the config of two layers that own K/V, one of each type."""
    layers = [
        LayerConfig(layer_type, head_dim, kv_heads, False, True, index, 4)
        for index, layer_type in enumerate(LAYER_TYPES)
    ]
    rope = {layer.layer_type: RopeConfig(1e4, 1.0) for layer in layers}
    return TextConfig(4, 2, 8, 1e-6, window, 4096, None, tuple(layers), rope, 0, 0, 0, 0, 0)


def unquantized(rows: KVRows) -> mx.array:
    """Return the K/V rows of a cache without quantization as an array."""
    assert isinstance(rows, mx.array)
    return rows
