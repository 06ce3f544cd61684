"""MLX's fused attention kernel for the large heads of full-attention layers, where a check at load shows that it works.

By itself, MLX (0.32.4) uses this kernel for heads of 512 values only without a mask array, and these layers always have
one. Elsewhere scores are a matrix in memory, which costs more with each token of the context.
"""

import logging
from collections.abc import Iterable

import mlx.core as mx

from mlx_mtp.checkpoints.config import TextConfig

from .layers import LONGEST_PASS, DecoderLayer
from .target import Target

logger = logging.getLogger(__name__)

# MLX's kernel for few rows takes up to this many rows, and up to this many pairs of a row and a query head of the same
# K/V head. More rows are split.
_MOST_ROWS = 8
_MOST_QUERIES = 32
# MLX chooses its kernel for smaller heads by itself.
_LARGE_HEAD = 512
# The check uses these numbers of K/V rows. From 1024 rows on, MLX's kernel has two passes.
_KV_ROWS = (256, 1280)
# The largest difference to attention that is composed of other operations, as a share of the largest value.
_TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}


def choose_fused_attention(layers: Iterable[DecoderLayer], dtype: mx.Dtype) -> None:
    """Let full-attention layers with large heads use the fused kernel, if it works on this device for this type."""
    known: dict[tuple[int, int, int], tuple[int, bool]] = {}
    for layer in layers:
        attention = layer.self_attn
        shape = attention.heads, attention.kv_heads, attention.head_dim
        if attention.head_dim == _LARGE_HEAD:
            if shape not in known:
                known[shape] = fused_rows(*shape, dtype), fuses_prefill(*shape, dtype)
            attention.fused_rows, attention.fused_prefill = known[shape]


def fused_rows(heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype) -> int:
    """Return the number of query rows in one call of the fused kernel, or 0 if the kernel cannot be used.

    For each number of rows up to the result, the kernel gives the values of composed attention within a tolerance, and
    each row has the bits of a call with a single row.
    """
    rows = min(_MOST_ROWS, _MOST_QUERIES * kv_heads // heads)
    try:
        works = rows > 0 and all(_works(rows, n, heads, kv_heads, head_dim, dtype) for n in _KV_ROWS)
    except (RuntimeError, ValueError) as error:
        logger.info("no fused attention for heads of %d values: %s", head_dim, error)
        return 0
    if not works:
        logger.warning("fused attention for heads of %d values is not used: other values or bits", head_dim)
    return rows if works else 0


def fuses_all_prefill(config: TextConfig, dtype: mx.Dtype) -> bool:
    """Return whether the fused kernel takes the prompt chunks of all full-attention layers of a target."""
    full = [layer for layer in config.layers if layer.layer_type == "full_attention"]
    shapes = {(config.num_attention_heads, layer.num_kv_heads, layer.head_dim) for layer in full}
    return all(shape[2] == _LARGE_HEAD and fuses_prefill(*shape, dtype) for shape in shapes)


def fuses_prefill(heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype) -> bool:
    """Return whether the fused kernel takes the rows of a prompt chunk and gives the values of composed attention."""
    rows, kv_rows = 2 * LONGEST_PASS, _KV_ROWS[-1]
    try:
        queries, k, v, mask = _inputs(rows, kv_rows, heads, kv_heads, head_dim, dtype)
        return _is_close(_fused(queries, k, v, mask), _composed(queries, k, v, mask), dtype)
    except (RuntimeError, ValueError):
        return False


def _works(rows: int, kv_rows: int, heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype) -> bool:
    queries, k, v, mask = _inputs(rows, kv_rows, heads, kv_heads, head_dim, dtype)
    singles = [_fused(queries[:, :, row : row + 1], k, v, mask[row : row + 1]) for row in range(rows)]
    alone = mx.concatenate(singles, axis=2)
    if not _is_close(alone, _composed(queries, k, v, mask), dtype):
        return False
    together = (_fused(queries[:, :, :n], k, v, mask[:n]) for n in range(2, rows + 1))
    return all(mx.array_equal(found, alone[:, :, : found.shape[2]]).item() for found in together)


def _inputs(
    rows: int, kv_rows: int, heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return queries, keys, values and a mask as in a pass.

    Each row sees one row more than the row before it, and the rest of the buffer is hidden.
    """
    keys = mx.random.split(mx.random.key(0), 3)
    queries = mx.random.normal((1, heads, rows, head_dim), dtype, scale=head_dim**-0.5, key=keys[0])
    k, v = (mx.random.normal((1, kv_heads, kv_rows, head_dim), dtype, key=key) for key in keys[1:])
    return queries, k, v, mx.arange(kv_rows)[None] <= mx.arange(rows)[:, None] + (kv_rows - 2 * rows)


def _is_close(found: mx.array, expected: mx.array, dtype: mx.Dtype) -> bool:
    error = mx.abs(found.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    return bool((error <= _TOLERANCE[dtype]).item())


def _fused(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask, force_fused=True)


def _composed(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """Return attention from products and a softmax in float32, [1, heads, rows, head_dim]."""
    q, k, v = (each.astype(mx.float32) for each in (queries, keys, values))
    grouped = q.reshape(1, k.shape[1], -1, *q.shape[2:])
    scores = mx.where(mask, grouped @ k[:, :, None].swapaxes(-1, -2), -mx.inf)
    return (mx.softmax(scores, axis=-1) @ v[:, :, None]).reshape(q.shape)


def describe(target: Target) -> dict[str, str]:
    """Return which attention the layers of each type use, for a report."""
    found: dict[str, str] = {}
    for kind, layer in zip(target.config.layers, target.layers, strict=True):
        attention = layer.self_attn
        passes = f"MLX's fused kernel, {attention.fused_rows} rows a call" if attention.fused_rows else "as MLX chooses"
        found[kind.layer_type] = passes + (", also for prompts" if attention.fused_prefill else "")
    return found
