"""Checks that the device computes a model rightly. Each failure is one error, before any text."""

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import TextConfig
from mlx_mtp.errors import DeviceError

from .kv_cache import Cache, KVQuantization
from .layers import attend

# Products with more weights than this are right on all devices that were tried. Their check would take time.
_SMALL = 1 << 20
# The largest difference to a product in float32, as a share of the largest value. CUDA rounds float32 to 11 bits.
_TOLERANCE = 0.05


def check_products(network: nn.Module, dtype: mx.Dtype) -> None:
    """Check the products of `dtype` activations with small quantized weights.

    MLX's CUDA backend has computed some of them wrong.

    Raises DeviceError for a product that is wrong, or for which the device has no kernel.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return
    known = set()
    for name, module in network.named_modules():
        if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        inputs, outputs = module.scales.shape[1] * module.group_size, module.weight.shape[0]
        kind = inputs, outputs, module.group_size, module.bits, module.mode
        if kind in known or inputs * outputs > _SMALL:
            continue
        known.add(kind)
        for rows in (1, 2, 9):
            x = mx.random.normal((1, rows, inputs), dtype, key=mx.random.key(0))
            if problem := _problem(module, x):
                raise DeviceError(
                    f"{name}: this device cannot multiply {dtype} activations by {module.bits} bit weights "
                    f"[{outputs}, {inputs}] ({problem}): convert the model with --dtype bfloat16, or without -q"
                )


def _problem(module: nn.QuantizedLinear | nn.QuantizedEmbedding, x: mx.array) -> str | None:
    """Return how the product with x, [1, rows, inputs], is wrong, or None."""
    how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    weight = mx.dequantize(module.weight, module.scales, module.get("biases"), **how).astype(mx.float32)
    expected = x.astype(mx.float32) @ weight.T
    try:
        found = mx.quantized_matmul(x, module.weight, module.scales, module.get("biases"), **how).astype(mx.float32)
        mx.eval(found)
    except (RuntimeError, ValueError) as error:
        return str(error)
    largest = mx.maximum(mx.abs(expected).max(), 1e-9)
    share = float((mx.abs(found - expected).max() / largest).item())  # type: ignore[arg-type]
    return None if share <= _TOLERANCE else f"values differ by {share:.2g} of the largest"


def check_quantized_attention(config: TextConfig, dtype: mx.Dtype, quantization: KVQuantization) -> None:
    """Check that the device has kernels for attention of `dtype` queries over quantized K/V.

    Raises DeviceError if it has none.
    """
    layer = config.layers[config.last_kv_layer("full_attention")]
    view = Cache(config, dtype, max_block=1, quantization=quantization._replace(start=0)).draft_view("full_attention")
    for rows in (1, 2, 9):
        queries = mx.zeros((1, config.num_attention_heads, rows, layer.head_dim), dtype)
        try:
            mx.eval(attend(queries, view.keys, view.values, mx.repeat(view.mask, rows, axis=0)))
        except (RuntimeError, ValueError) as error:
            raise DeviceError(
                f"kv_bits is {quantization.bits}, but this device has no kernel for quantized K/V with {dtype} "
                f"activations: leave out kv_bits, or convert the model with --dtype bfloat16 ({error})"
            ) from None
