"""Kernels of this project for Metal and CUDA: each replaces several operations of a pass by one.

MLX compiles only element-wise operations together, so a norm, a residual sum and the next norm are three kernels. Here
they are one. A kernel is used only if a check at load gives the values of the operations that it replaces. The bodies
are in kernel_sources.py.

Set the environment variable MLX_MTP_KERNELS to `off` to use no kernel.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.errors import OptionError

from .drafter import Drafter
from .kernel_sources import CUDA, CUDA_PLACE, FUNCTIONS, METAL, METAL_PLACE, SOURCES
from .layers import Attention, DecoderLayer, NormAndRotate, Projected, Residual, add_norm, norm_and_rotate
from .target import Target, table_rows

logger = logging.getLogger(__name__)

VARIABLE = "MLX_MTP_KERNELS"
# The checks use these numbers of rows. A row must have the same bits in each of them.
_CHECKED_ROWS = (1, 2, 9, 33)
# The position of the first row in a check. The position of a real text is not zero.
_CHECKED_OFFSET = 1000
# The largest difference to the composed operations, as a share of the largest value: about four roundings of it.
_BOUND = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
# Each thread of a norm reads four neighbours at a time, as in MLX's norm.
_READS = 4
_MOST_THREADS = 1024
# A word of 32 bits of a table holds a whole number of values of these sizes.
_TABLE_BITS = (2, 4, 8)

Launch = Callable[..., list[mx.array]]
# A function from a number of rows to arrays of results.
Results = Callable[[int], list[mx.array]]
# The results of a kernel and of the operations that it replaces.
Cases = tuple[Results, Results]
# A function from the name and the results of a kernel to the decision to use it (see `works`).
Check = Callable[[str, Results, Results], bool]


class Kernels(NamedTuple):
    """MLX's functions that launch the kernels of a device."""

    add_norm: Launch
    norm_rotate: Launch
    table_rows: Launch


class InUse(NamedTuple):
    """The number of layers of a network that use each kernel, and whether its input embedding does."""

    layers: int
    add_norm: int
    norm_rotate: int
    table_rows: bool


def use_kernels(network: Target | Drafter) -> None:
    """Let a loaded network use each kernel that gives the values of the operations that it replaces.

    Raises OptionError if the environment variable MLX_MTP_KERNELS is neither `on` nor `off`.
    """
    kernels = device_kernels()
    if kernels is not None:
        attach(network, kernels)


def attach(network: Target | Drafter, kernels: Kernels, check: Check | None = None) -> None:
    """Let a network use those of the kernels that `check` accepts (default: `works`)."""
    check = check or works
    body = network if isinstance(network, Target) else network.model
    fast_add = partial(_add_norm, kernels.add_norm)
    if check("add_norm", *_add_norm_cases(fast_add, body.layers[0], body.norm)):
        for layer in body.layers:
            layer.add_norm = fast_add
    fast_rotate = partial(_norm_rotate, kernels.norm_rotate)
    known: dict[tuple[object, ...], bool] = {}
    for attention in (layer.self_attn for layer in body.layers):
        if "qkv_proj" not in attention and "k_proj" in attention:
            # These projections could not be joined.
            continue
        shape = attention.heads, attention.kv_heads, attention.head_dim, "qkv_proj" in attention, attention.k_eq_v
        if shape not in known:
            known[shape] = check("norm_rotate", *_norm_rotate_cases(fast_rotate, attention))
        if known[shape]:
            attention.norm_and_rotate = fast_rotate
    fast_rows = partial(_table_rows, kernels.table_rows)
    tables = [body[name] for name in ("embed_tokens", "embed_tokens_per_layer") if _is_readable(body.get(name))]
    if tables and all(check("table_rows", *_table_rows_cases(fast_rows, table)) for table in tables):
        network.table_rows = fast_rows


def remove_kernels(network: Target | Drafter) -> None:
    """Let a network use MLX's operations only."""
    for layer in network.layers if isinstance(network, Target) else network.model.layers:
        layer.add_norm = add_norm
        layer.self_attn.norm_and_rotate = norm_and_rotate
    network.table_rows = table_rows


def in_use(network: Target | Drafter) -> InUse:
    """Return which kernels a network uses. A drafter that is no network uses none."""
    body = network if isinstance(network, Target) else network.get("model")
    if body is None:
        return InUse(0, 0, 0, table_rows=False)
    return InUse(
        len(body.layers),
        sum(layer.add_norm is not add_norm for layer in body.layers),
        sum(layer.self_attn.norm_and_rotate is not norm_and_rotate for layer in body.layers),
        network.table_rows is not table_rows and _is_readable(body.embed_tokens),
    )


def describe(network: Target | Drafter) -> str:
    """Return the kernels that a network uses, for a report."""
    used = in_use(network)
    counts = {"add_norm": used.add_norm, "norm_rotate": used.norm_rotate}
    parts = [f"{name} in {count} of {used.layers} layers" for name, count in counts.items() if count]
    return ", ".join(parts + ["table_rows"] * used.table_rows) or "none"


def device_kernels() -> Kernels | None:
    """Return the kernels of MLX's default device.

    Returns None if the device is the CPU, or if the environment variable MLX_MTP_KERNELS is `off`.

    Raises OptionError if the variable is neither `on` nor `off`.
    """
    setting = os.environ.get(VARIABLE, "on")
    if setting not in ("on", "off"):
        raise OptionError(f"the environment variable {VARIABLE} must be 'on' or 'off', found {setting!r}")
    if setting == "off" or mx.default_device() == mx.Device(mx.cpu):
        return None
    languages = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    return next((make_kernels(language) for language, is_available in languages.items() if is_available), None)


def make_kernels(language: str) -> Kernels:
    """Return the kernels in a language, `metal` or `cuda`. Nothing is compiled before the first launch."""
    make: Callable[..., Launch]
    if language == "metal":
        make, header, place = mx.fast.metal_kernel, METAL, METAL_PLACE  # type: ignore[assignment]
    else:
        make, header, place = mx.fast.cuda_kernel, CUDA, CUDA_PLACE  # type: ignore[assignment]
    return Kernels(
        *(
            make(
                name=source.name,
                input_names=source.inputs,
                output_names=source.outputs,
                source=place + source.body,
                header=header + FUNCTIONS,
            )
            for source in SOURCES
        )
    )


def _add_norm(
    launch: Launch,
    x: mx.array,
    norm: nn.RMSNorm,
    h: mx.array,
    scale: mx.array | None = None,
    following: nn.RMSNorm | None = None,
) -> Residual:
    """Return the result of `add_norm`."""
    width = x.shape[-1]
    assert scale is None or scale.size == width, "the layer scalar is not spread (see spread_layer_scalars)"
    # The kernel does not read the weights in the place of an absent scale or norm.
    weights = [norm.weight if scale is None else scale, norm.weight if following is None else following.weight]
    template = {"WIDTH": width, "HAS_SCALE": scale is not None, "HAS_FOLLOWING": following is not None}
    new_h, normed = _launch(
        launch, [x, h, norm.weight, *weights, mx.array([norm.eps])], template,
        x.dtype, x.size // width, -(-width // _READS), [x.shape, x.shape if following is not None else (1,)],
    )  # fmt: skip
    return Residual(new_h, new_h if following is None else normed)


def _norm_rotate(launch: Launch, attention: Attention, x: mx.array, offset: mx.array) -> Projected:
    """Return the result of `norm_and_rotate`."""
    has_kv = "qkv_proj" in attention
    heads, kv_heads, dim = attention.heads, attention.kv_heads if has_kv else 0, attention.head_dim
    rows = x.shape[1]
    template = {
        "DIM": dim, "HEADS": heads, "KV_HEADS": kv_heads, "KEYS_ARE_VALUES": has_kv and attention.k_eq_v,
        "WEIGHT_STEP": dim if has_kv else 0,
    }  # fmt: skip
    weight = attention.qk_scale if has_kv else attention.q_norm.weight
    kv_shape = (1, kv_heads, rows, dim) if has_kv else (1,)
    queries, keys, values = _launch(
        launch, [x, weight, attention.rope.periods, offset.reshape(1), mx.array([attention.eps])], template,
        x.dtype, rows * (heads + 2 * kv_heads), -(-dim // _READS), [(1, heads, rows, dim), kv_shape, kv_shape],
    )  # fmt: skip
    return Projected(queries, keys, values) if has_kv else Projected(queries)


def _table_rows(launch: Launch, table: nn.Module, tokens: mx.array, factor: float | None = None) -> mx.array:
    """Return the result of `table_rows`."""
    if not _is_readable(table):
        return table_rows(table, tokens, factor)
    dtype, width = table.scales.dtype, table.scales.shape[-1] * table.group_size
    (rows,) = _launch(
        launch,
        [tokens, table.weight, table.scales, table.biases, mx.array([1.0 if factor is None else factor], dtype)],
        {"WIDTH": width, "BITS": table.bits, "GROUP_SIZE": table.group_size},
        dtype, tokens.size, width // (32 // table.bits), [(*tokens.shape, width)],
    )  # fmt: skip
    return rows


def _is_readable(table: nn.Module | None) -> bool:
    return isinstance(table, nn.QuantizedEmbedding) and table.mode == "affine" and table.bits in _TABLE_BITS


def _launch(
    launch: Launch,
    inputs: list[mx.array],
    template: dict[str, Any],
    dtype: mx.Dtype,
    groups: int,
    threads: int,
    shapes: Sequence[tuple[int, ...]],
) -> list[mx.array]:
    """Launch a kernel with groups of at least `threads` threads, if a group can have so many."""
    threads = min(_MOST_THREADS, 32 * -(-threads // 32))
    return launch(
        inputs=inputs,
        template=[("T", dtype), ("THREADS", threads), *template.items()],
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=[dtype] * len(shapes),
    )


def _add_norm_cases(fast: Callable[..., Residual], layer: DecoderLayer, final: nn.RMSNorm) -> Cases:
    x, h = _random_rows(final.weight.size, final.weight.dtype)

    def results(function: Callable[..., Residual], rows: int) -> list[mx.array]:
        cases = (None, None), (None, final), (layer.layer_scalar, final)
        return [
            part
            for scale, following in cases
            for part in function(x[:, :rows], layer.post_attention_layernorm, h[:, :rows], scale, following)
        ]

    return partial(results, fast), partial(results, add_norm)


def _norm_rotate_cases(fast: NormAndRotate, attention: Attention) -> Cases:
    is_joined = "qkv_proj" in attention
    heads = attention.heads + (2 - attention.k_eq_v) * attention.kv_heads if is_joined else attention.heads
    dtype = (attention.qk_scale if is_joined else attention.q_norm.weight).dtype
    x, _ = _random_rows(heads * attention.head_dim, dtype)
    offset = mx.array(_CHECKED_OFFSET, mx.int32)

    def results(function: NormAndRotate, rows: int) -> list[mx.array]:
        return [part.swapaxes(1, 2) for part in function(attention, x[:, :rows], offset) if part is not None]

    return partial(results, fast), partial(results, norm_and_rotate)


def _table_rows_cases(fast: Callable[..., mx.array], table: nn.Module) -> Cases:
    count = table.weight.shape[0]
    tokens = mx.array([[(97 * i - 1) % count for i in range(_CHECKED_ROWS[-1])]], mx.int32)

    def results(function: Callable[..., mx.array], rows: int) -> list[mx.array]:
        return [function(table, tokens[:, :rows], factor) for factor in (None, 39.25)]

    return partial(results, fast), partial(results, table_rows)


def _random_rows(width: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(0))
    x, h = (mx.random.normal((1, _CHECKED_ROWS[-1], width), dtype, key=key) for key in keys)
    return x, h


def works(name: str, fast: Results, composed: Results) -> bool:
    """Return whether a kernel gives the values of composed operations, with the same bits for any number of rows.

    `fast` and `composed` compute the same number of rows, which are on axis 1 of each array. If the kernel cannot be
    used, one line of the log says why.
    """
    try:
        whole = fast(_CHECKED_ROWS[-1])
        for rows in _CHECKED_ROWS:
            for found, all_rows, expected in zip(fast(rows), whole, composed(rows), strict=True):
                if not _is_close(found, expected) or not mx.array_equal(found, all_rows[:, :rows]).item():
                    logger.warning("the kernel %s is not used: it gives other values than MLX's operations", name)
                    return False
    except (RuntimeError, ValueError) as error:
        logger.warning("the kernel %s is not used: %s", name, error)
        return False
    return True


def _is_close(found: mx.array, expected: mx.array) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    difference = mx.abs(found.astype(mx.float32) - expected.astype(mx.float32)).max()
    return bool((difference <= _BOUND[expected.dtype] * mx.abs(expected.astype(mx.float32)).max()).item())
