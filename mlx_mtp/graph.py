"""What a round asks of the device: the operations in its graph."""

import re
import tempfile
from collections import Counter
from pathlib import Path

import mlx.core as mx

from .acceptance import Draft
from .cache import KVQuantization
from .drafter import Drafter
from .embeddings import PerLayerRows
from .gemma4 import Target
from .sampling import Sampling
from .speculative import Rounds, Stream

# Operations that give another view of their input's memory, or none at all.
_VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# Tokens before the round.
_CONTEXT = 100


class _Unread(Stream):
    """Takes the same per-layer rows whatever is drafted, so that the draft need not be evaluated."""

    def _read_rows(self, draft: Draft) -> PerLayerRows | None:
        return self.target.read_rows([0] * (1 + draft.tokens.shape[1]))


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
    rounds = Rounds()
    stream = _Unread(target, drafter, max_draft_tokens=k, sampling=sampling, kv_quantization=kv_quantization)
    stream.cache.set_length(_CONTEXT)
    for _ in range(2 if compiled else 1):
        # Arrays of their own, so that the graph begins here.
        arrays = [mx.zeros(array.shape, array.dtype) for array in stream._take_arrays()]
        mx.eval(arrays)
        stream._set_arrays(arrays)
        verified = rounds.run(stream, k)
    return [*verified, *stream._take_arrays()]


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
