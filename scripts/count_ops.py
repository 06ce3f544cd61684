"""Count the operations in the graph of a round, at the sizes of the published models.

    python scripts/count_ops.py E2B --bits 4

Nothing is computed: the weights are zeros that take no memory. MLX's norm, rotation and attention are one kernel each
on a Mac, but many operations on the CPU backend. Here, one operation replaces each of them. Views of memory (reshapes,
slices) do not count. A concatenation counts as one copy of each part. The count is a lower bound: some kernels run
twice (split-K products), attention with heads of 512 can be unfused, and rows that are not contiguous are copied first.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from published import NAMES, published_drafter, published_target

from mlx_mtp.bench.operations import operations, round_outputs
from mlx_mtp.checkpoints.config import read_drafter_config, read_target_config
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the operations of a round.")
    parser.add_argument("models", nargs="*", choices=[[], *NAMES], help="Which of the published models (all).")
    parser.add_argument("--bits", type=int, default=4, help="Bits of the weights (default: 4).")
    parser.add_argument("--details", action="store_true", help="Say which operations.")
    args = parser.parse_args()
    print(f"{'':6}{'plain round':>24}{'draft step':>24}{'mlx-lm pass':>16}")
    print(f"{'':6}" + 2 * f"{'eager':>12}{'compiled':>12}" + f"{'eager':>16}")
    for name in args.models or NAMES:
        target, drafter = pair(name, args.bits)
        with one_kernel_each():
            eager, compiled = (
                [operations(round_outputs(target, drafter, k, compiled=c)) for k in (0, 1, 2)] for c in (False, True)
            )
            reference = operations(mlx_lm_outputs(name, args.bits))
        counts = [found[0].total() for found in (eager, compiled)] + [draft_step(found) for found in (eager, compiled)]
        print(f"{name:6}" + "".join(f"{count:12}" for count in counts) + f"{reference.total():16}")
        if args.details:
            print(*(f"      {n:5} {kind}" for f in (eager, compiled) for kind, n in f[0].most_common()), sep="\n")


def draft_step(found: list[Counter[str]]) -> int:
    """Return the number of operations that the second draft token adds to a round.

    The first draft token also adds the operations that all draft tokens share.
    """
    return found[2].total() - found[1].total()


def pair(name: str, bits: int) -> tuple[Target, Drafter]:
    """Return a target and a drafter of real sizes, without memory for weights.

    They are quantized and fused like a loaded pair.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(published_target(name)))
        target = Target(read_target_config(file.parent).text)
        file.write_text(json.dumps(published_drafter(name)))
        drafter = Drafter(read_drafter_config(file.parent))
    for module in (target, drafter):
        module.set_dtype(mx.bfloat16)
        nn.quantize(module, 64, bits)
    for layer in [*target.layers, *drafter.model.layers]:
        layer.self_attn.fuse()
        layer.mlp.fuse()
        mx.eval(layer.self_attn.rope.periods)
    for module in (target, drafter):
        weightless(module)
    return target, drafter


def weightless(module: nn.Module) -> None:
    """Replace each parameter with one zero that is broadcast to its shape."""
    module.update(tree_map(lambda p: mx.broadcast_to(mx.zeros((), p.dtype), p.shape), module.parameters()))
    mx.eval(module.parameters())


def mlx_lm_model(name: str, bits: int) -> Any:
    """Return mlx-lm's model of the target, without memory for weights."""
    from mlx_lm.models import gemma4_text

    model = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(published_target(name)["text_config"]))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, bits)
    weightless(model)
    mx.eval([module._freqs for module in model.modules() if hasattr(module, "_freqs")])
    return model


def mlx_lm_outputs(name: str, bits: int) -> list[mx.array]:
    """Return the outputs of a pass of mlx-lm's model over one token: the most likely token and the K/V."""
    model = mlx_lm_model(name, bits)
    cache = model.make_cache()
    prompt = mx.zeros((1, 100), mx.int32)
    model(prompt, cache=cache)
    for layer in cache:
        layer.keys, layer.values = (mx.zeros(array.shape, array.dtype) for array in (layer.keys, layer.values))
        mx.eval(layer.keys, layer.values)
    logits = model(prompt[:, :1], cache=cache)
    return [mx.argmax(logits[0, -1]), *(array for layer in cache for array in (layer.keys, layer.values))]


@contextmanager
def one_kernel_each() -> Iterator[None]:
    """Replace each MLX function that is one kernel on a Mac with one operation."""

    def stand_in(x: mx.array, others: list[Any]) -> mx.array:
        arrays = [other for other in others if isinstance(other, mx.array)]
        return mx.softmax(mx.depends([x], arrays)[0], axis=-1)

    def dequantize(w: mx.array, scales: mx.array, *others: Any, group_size: int, bits: int, **_: Any) -> mx.array:
        values = mx.broadcast_to(scales[..., None], (*scales.shape, group_size)).reshape(*scales.shape[:-1], -1)
        return stand_in(values, [w, *others])

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return stand_in(x, [weight])

    def rope(x: mx.array, dims: int, *, offset: Any, freqs: Any = None, **_: Any) -> mx.array:
        return stand_in(x, [offset, freqs])

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any) -> mx.array:
        return stand_in(q, [k, v, mask])

    with ExitStack() as patches:
        for name, kernel in (("rms_norm", rms_norm), ("rope", rope), ("scaled_dot_product_attention", attention)):
            patches.enter_context(patch.object(mx.fast, name, kernel))
        patches.enter_context(patch.object(mx, "dequantize", dequantize))
        yield


if __name__ == "__main__":
    main()
