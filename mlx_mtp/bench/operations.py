"""What a round asks of the device: the operations in its graph."""

import re
import tempfile
from collections import Counter
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.round import round_steps
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.gemma4.target import Target

# Operations that give another view of their input's memory, or none at all.
_VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# Tokens before the round.
_CONTEXT = 100


def round_outputs(
    target: Target,
    drafter: Drafter | None,
    k: int,
    sampling: Sampling | None = None,
    *,
    compiled: bool = True,
    kv_quantization: KVQuantization | None = None,
) -> list[mx.array]:
    """Everything that a round of k draft tokens computes, not evaluated."""
    stream = Stream(target, drafter, max_draft_tokens=k, sampling=sampling, kv_quantization=kv_quantization)
    stream.cache.set_length(_CONTEXT)
    stream.cache.reserve(k + 1)
    # Arrays of their own, so that the graph begins here.
    state = tree_map(lambda array: mx.zeros(array.shape, array.dtype), stream.state)
    mx.eval(state)
    if compiled:
        steps = CompiledRounds(always=True).steps(stream.parts, stream.cache, k, ())
    else:
        steps = round_steps(stream.parts, stream.cache, k)
    if target.mapped is None:
        return _arrays(steps.whole(state))
    # Any rows will do: the draft need not be evaluated.
    return _arrays(steps.verify(state, steps.draft(state), None, target.read_rows([0] * (k + 1))))


def _arrays(tree: object) -> list[mx.array]:
    pairs: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
    return [array for _, array in pairs]


def operations(outputs: list[mx.array]) -> Counter[str]:
    """The operations of a graph by kind, without those that only look at memory in another way. About as many kernels
    are launched: a concatenation copies each of its parts, and some operations take more than one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *outputs)
        text = file.read_text()
    # One line per operation, even if its compiled kernel serves several.
    nodes = re.findall(r'(\d+) \[label ="([^"]*)", shape=rectangle\]', text)
    kinds = dict(nodes)
    found = Counter(kind for _, kind in nodes)
    found["Concatenate"] = sum(kinds.get(node) == "Concatenate" for node in re.findall(r"-> (\d+)", text))
    return Counter({kind: n for kind, n in found.items() if kind not in _VIEWS})
