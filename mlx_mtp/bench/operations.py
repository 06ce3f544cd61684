"""The operations in the graph of a round: a measure of its work on the device."""

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import Choice
from mlx_mtp.decoding.packed import build_packed
from mlx_mtp.decoding.round import round_steps
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.gemma4.target import Target

# Operations that return a view of their input's memory, or that use no memory at all.
_VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# The number of tokens before the round.
_CONTEXT_TOKENS = 100


def round_outputs(
    target: Target,
    drafter: Drafter | None,
    k: int,
    sampling: Sampling | None = None,
    *,
    compiled: bool = True,
    kv_quantization: KVQuantization | None = None,
) -> list[mx.array]:
    """Return all output arrays of a round of k draft tokens, not evaluated."""
    stream = Stream(target, drafter, max_draft_tokens=k, sampling=sampling, kv_quantization=kv_quantization)
    stream.cache.set_length(_CONTEXT_TOKENS)
    stream.cache.reserve(k + 1)
    # New arrays replace the state, so that the graph begins here.
    state = tree_map(_zeros_like, stream.state)
    mx.eval(state)
    if compiled:
        steps = CompiledRounds(always=True).steps(stream.parts, stream.cache, k, ())
    else:
        steps = round_steps(stream.parts, stream.cache, k)
    if target.mapped is None:
        return _arrays(steps.whole(state))
    # The values of the rows have no effect on the graph. So the draft does not have to be evaluated.
    return _arrays(steps.verify(state, steps.draft(state), None, target.read_per_layer_rows([0] * (k + 1))))


def packed_outputs(target: Target, texts: int, *, compiled: bool = True) -> list[mx.array]:
    """Return all output arrays of a plain round of several texts in one pass, not evaluated."""
    streams = [Stream(target, None, max_draft_tokens=0) for _ in range(texts)]
    for stream in streams:
        stream.cache.set_length(_CONTEXT_TOKENS)
        stream.cache.reserve(1)
        # New arrays replace the state, so that the graph begins here.
        stream.state = tree_map(_zeros_like, stream.state)
        mx.eval(stream.state)
    rounds = CompiledRounds(always=True) if compiled else None
    _, reports = build_packed(streams, [Choice(0, ahead=False)] * texts, rounds)
    return _arrays([reports, [stream.state for stream in streams]])


def _zeros_like(leaf: Any) -> Any:
    return mx.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, mx.array) else leaf


def _arrays(tree: object) -> list[mx.array]:
    pairs: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]
    return [leaf for _, leaf in pairs if isinstance(leaf, mx.array)]


def operations(outputs: list[mx.array]) -> Counter[str]:
    """Count the operations of a graph by kind, without operations that only return a view.

    The sum is about the number of kernels that the device launches. A concatenation counts once for each of its parts,
    because it copies each part. Some operations need more than one kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *outputs)
        text = file.read_text()
    # The file has one line per operation, even if several operations share one compiled kernel.
    nodes = re.findall(r'(\d+) \[label ="(\w+)[^"]*", shape=rectangle\]', text)
    kinds = dict(nodes)
    found = Counter(kind for _, kind in nodes)
    found["Concatenate"] = sum(kinds.get(node) == "Concatenate" for node in re.findall(r"-> (\d+)", text))
    return Counter({kind: n for kind, n in found.items() if kind not in _VIEWS})
