"""Exact verify passes: their results have the same bits as plain decoding.

Devices use other kernels for several rows than for one row, and these kernels round differently. Here each projection
is tried in three ways: unchanged, with the rows as a batch of single rows (`mx.gather_qmm`, for quantized projections),
and row by row. The first way that gives the bits of single rows is used. Attention goes row by row.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.errors import DeviceError
from mlx_mtp.gemma4.drafter import Draft, Drafter, GivenDrafter
from mlx_mtp.gemma4.kv_cache import Cache, KVQuantization
from mlx_mtp.gemma4.layers import Experts, Router
from mlx_mtp.gemma4.target import Target

from .compiled import CompiledRounds
from .draft_length import MAX_DRAFT_TOKENS
from .stream import Stream

# This is the largest number of rows in a verify pass.
MAX_ROWS = MAX_DRAFT_TOKENS + 1
TOGETHER, BATCHED, APART = "together", "batched", "apart"
# `_TRIALS` is the number of passes in which the ways are tried. `_CONTEXT_TOKENS` is the number of tokens before the
# rounds that are compared last.
_TRIALS = 3
_CONTEXT_TOKENS = 40


class ExactRows(nn.Module):
    """A module whose results for a few rows, [1, rows, ...], have the bits of single rows.

    `way` is a way of computation that gives these bits on this device.
    """

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.inner = inner
        self.way = way

    def __call__(self, x: mx.array, *others: mx.array) -> mx.array | tuple[mx.array, ...]:
        """Return the result of the module for x, [1, rows, ...], and any other inputs."""
        if 1 < x.shape[1] <= MAX_ROWS:
            return _compute(self.way, self.inner, x, *others)
        result: mx.array | tuple[mx.array, ...] = self.inner(x, *others)
        return result


class ExactTable(nn.Module):
    """An embedding whose output head gives a few rows, [1, rows, ...], the bits of single rows.

    `way` is a way of computation that gives these bits on this device.
    """

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.inner = inner
        self.way = way

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the embeddings of tokens [1, length]."""
        embedded: mx.array = self.inner(tokens)
        return embedded

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits of hidden states x, [1, rows, hidden_size]."""
        way = self.way if 1 < x.shape[1] <= MAX_ROWS else TOGETHER
        logits = _compute(way, self.inner, x)
        assert isinstance(logits, mx.array)
        return logits


class _Trial(nn.Module):
    """A stand-in for a module while the ways are tried.

    It removes the ways that give this kind of module other bits than single rows.
    """

    def __init__(self, inner: nn.Module, ways: dict[str, list[str]]) -> None:
        super().__init__()
        self.inner = inner
        self._ways = ways

    def __call__(self, x: mx.array, *others: mx.array) -> mx.array | tuple[mx.array, ...]:
        return _try_ways(self._ways, self.inner, x, *others)


def make_exact(target: Target) -> None:
    """Change a loaded target so that verify passes have the bits of single-row passes.

    Each module uses the first way, in the usual order of speed, that gives these bits on this device.
    """
    ways: dict[str, list[str]] = {}
    places = [
        (parent, name)
        for parent in [target, *(part for layer in target.layers for part in (layer, layer.self_attn, layer.mlp))]
        for name, module in parent.items()
        if isinstance(module, nn.Linear | nn.QuantizedLinear | Router | Experts) and name != "lm_head"
    ]
    for parent, name in places:
        parent[name] = _Trial(parent[name], ways)
    for layer in target.layers:
        layer.self_attn.exact_rows = MAX_ROWS
    head = target.lm_head if target.config.own_head else target.embed_tokens
    for trial in range(_TRIALS):
        cache = Cache(target.config, target.dtype, max_block=MAX_ROWS)
        tokens = [(31 * i + 17 * trial + 5) % target.config.vocab_size for i in range(MAX_ROWS)]
        _try_ways(ways, head, target(mx.array([tokens], mx.int32), cache).hidden)
    for parent, name in places:
        module = parent[name].inner
        way = ways[_kernel_key(module)][0]
        parent[name] = module if way == TOGETHER else ExactRows(module, way)
    way = ways[_kernel_key(head)][0]
    if way != TOGETHER:
        exact = {"lm_head": ExactRows(head, way)} if target.config.own_head else {"embed_tokens": ExactTable(head, way)}
        target.update_modules(exact)


def _kernel_key(module: nn.Module) -> str:
    """Return the type and the shapes of a module. The same kernels compute all modules with the same key."""
    shapes = {name: value.shape for name, value in module.items() if isinstance(value, mx.array)}
    return f"{type(module).__name__} {shapes}"


def _try_ways(
    ways: dict[str, list[str]], module: nn.Module, x: mx.array, *others: mx.array
) -> mx.array | tuple[mx.array, ...]:
    """Compute x row by row, and return the result.

    `ways` keeps only the ways that give this kind of module the same bits for any number of rows.
    """
    is_quantized = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    remaining = ways.setdefault(_kernel_key(module), [TOGETHER, BATCHED, APART] if is_quantized else [TOGETHER, APART])
    expected = _compute(APART, module, x, *others)
    for rows in range(2, x.shape[1] + 1):
        few = [array[:, :rows] for array in (x, *others)]
        remaining[:] = [way for way in remaining if way == APART or _same(_compute(way, module, *few), expected, rows)]
    return expected


def _same(found: mx.array | tuple[mx.array, ...], expected: mx.array | tuple[mx.array, ...], rows: int) -> bool:
    parts = zip(_parts(found), _parts(expected), strict=True)
    return all(mx.array_equal(one, other[:, :rows]).item() for one, other in parts)


def _compute(way: str, module: nn.Module, x: mx.array, *others: mx.array) -> mx.array | tuple[mx.array, ...]:
    function = module if not isinstance(module, nn.Embedding | nn.QuantizedEmbedding) else module.as_linear
    if way == TOGETHER:
        together: mx.array | tuple[mx.array, ...] = function(x, *others)
        return together
    if way == BATCHED:
        return _batched(module, x)
    results = [function(*(array[:, row : row + 1] for array in (x, *others))) for row in range(x.shape[1])]
    if isinstance(results[0], tuple):
        return tuple(mx.concatenate(list(parts), axis=1) for parts in zip(*results, strict=True))
    return mx.concatenate(results, axis=1)


def _batched(module: nn.Module, x: mx.array) -> mx.array:
    rows = x.reshape(-1, 1, x.shape[-1])
    biases = module.get("biases")
    product = mx.gather_qmm(
        rows,
        module.weight[None],
        module.scales[None],
        None if biases is None else biases[None],
        rhs_indices=mx.zeros(rows.shape[0], mx.uint32),
        transpose=True,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
    return product.reshape(*x.shape[:-1], -1)


def _parts(result: mx.array | tuple[mx.array, ...]) -> tuple[mx.array, ...]:
    return result if isinstance(result, tuple) else (result,)


def check_exact(target: Target, kv_quantization: KVQuantization | None = None) -> None:
    """Compare compiled rounds that verify several rows with plain rounds, bit by bit.

    If `kv_quantization` is given, the rounds use quantized K/V.

    Raises DeviceError if the bits differ. They differ if norms or rotations depend on the number of rows.
    """
    # The drafts below come from no drafter, so no other stream may use these rounds.
    rounds = CompiledRounds(always=True)
    plain = _stream(target, None, rounds, kv_quantization)
    hidden, tokens = [], []
    for _ in range(MAX_ROWS):
        tokens += plain.round(0).tokens
        hidden.append(plain.state.hidden)
    given = GivenDrafter(lambda _, k: Draft(mx.array([tokens[:k]], mx.int32)))
    for k in range(1, MAX_ROWS):
        stream = _stream(target, given, rounds, kv_quantization)
        result = stream.round(k)
        if result.tokens != tokens[: k + 1] or not mx.array_equal(stream.state.hidden, hidden[k]).item():
            raise DeviceError(
                f"exact: on this device a pass over {k + 1} rows has other bits than single passes, even with every "
                "projection row by row; plain decoding (num_draft_tokens 0) is what is left"
            )


def _stream(
    target: Target, drafter: Drafter | None, rounds: CompiledRounds, kv_quantization: KVQuantization | None
) -> Stream:
    stream = Stream(target, drafter, max_draft_tokens=MAX_DRAFT_TOKENS, rounds=rounds, kv_quantization=kv_quantization)
    stream.prefill([(7 * i + 5) % target.config.vocab_size for i in range(_CONTEXT_TOKENS)], _CONTEXT_TOKENS)
    return stream
