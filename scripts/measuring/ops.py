"""Count the operations in the graph of a round, at the sizes of published models.

    python scripts/measure.py ops tests/support/published/E2B --bits 4

Nothing is computed: the weights are zeros that take no memory. MLX's norm, rotation and attention are one kernel each
on a Mac, but many operations on the CPU backend. Here, one operation replaces each of them. Views of memory (reshapes,
slices) do not count. A concatenation counts as one copy of each part. The count is a lower bound: some kernels run
twice (split-K products), attention with heads of 512 can be unfused, and rows that are not contiguous are copied first.
"""

import argparse
from collections import Counter
from pathlib import Path

import mlx.core as mx

from mlx_mtp.bench.operations import operations, round_outputs

from .kernels import countable_kernels
from .sizes import add_bits, add_folder, weightless_mlx_lm_model, weightless_pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, several=True)
    add_bits(parser)
    parser.add_argument("--details", action="store_true", help="Print the number of operations of each kind.")


def run(args: argparse.Namespace) -> None:
    print(f"{'':6}{'plain round':>24}{'draft step':>24}{'mlx-lm pass':>16}")
    print(f"{'':6}" + 2 * f"{'eager':>12}{'compiled':>12}" + f"{'eager':>16}")
    for folder in args.folders:
        target, drafter = weightless_pair(folder, args.bits)
        with countable_kernels():
            eager, compiled = (
                [operations(round_outputs(target, drafter, k, compiled=c)) for k in (0, 1, 2)] for c in (False, True)
            )
            reference = operations(mlx_lm_outputs(folder, args.bits))
        counts = [found[0].total() for found in (eager, compiled)] + [draft_step(found) for found in (eager, compiled)]
        print(f"{folder.name:6}" + "".join(f"{count:12}" for count in counts) + f"{reference.total():16}")
        if args.details:
            for title, found in (("eager", eager), ("compiled", compiled)):
                print(f"      plain round, {title}:")
                print(*(f"      {count:5} {kind}" for kind, count in found[0].most_common()), sep="\n")


def draft_step(found: list[Counter[str]]) -> int:
    """Return the number of operations that the second draft token adds to a round.

    The first draft token also adds the operations that all draft tokens share.
    """
    return found[2].total() - found[1].total()


def mlx_lm_outputs(folder: Path, bits: int) -> list[mx.array]:
    """Return the outputs of a pass of mlx-lm's model over one token: the most likely token and the K/V."""
    model = weightless_mlx_lm_model(folder, bits)
    cache = model.make_cache()
    prompt = mx.zeros((1, 100), mx.int32)
    model(prompt, cache=cache)
    for layer in cache:
        layer.keys, layer.values = (mx.zeros(array.shape, array.dtype) for array in (layer.keys, layer.values))
        mx.eval(layer.keys, layer.values)
    logits = model(prompt[:, :1], cache=cache)
    return [mx.argmax(logits[0, -1]), *(array for layer in cache for array in (layer.keys, layer.values))]
