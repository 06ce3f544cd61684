"""Count the operations in the graph of a round, at the sizes of published models.

    python scripts/measure.py ops tests/support/published/E2B --bits 4
    python scripts/measure.py ops tests/support/published/E2B --bits 4 --texts 1,2,4,8

With `--texts`, these are plain rounds of several texts in one pass, whose parts between the attentions are compiled.

The column `kernels` counts compiled rounds with the kernels of this project (mlx_mtp/gemma4/kernels.py). Nothing is
computed: the weights are zeros that take no memory. MLX's norm, rotation and attention are one kernel each
on a Mac, but many operations on the CPU backend. Here, one operation replaces each of them. Views of memory (reshapes,
slices) do not count. A concatenation counts as one copy of each part. The count is a lower bound: some kernels run
twice (split-K products), attention with heads of 512 can be unfused, and rows that are not contiguous are copied first.
"""

import argparse
from collections import Counter
from pathlib import Path

import mlx.core as mx

from mlx_mtp.bench.operations import operations, packed_outputs, round_outputs
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target

from .kernels import countable_kernels, use_countable_kernels
from .sizes import add_bits, add_folder, weightless_mlx_lm_model, weightless_pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, several=True)
    add_bits(parser)
    parser.add_argument("--texts", type=numbers, metavar="N,N", help="Count packed passes of these numbers of texts.")
    parser.add_argument("--details", action="store_true", help="Print the number of operations of each kind.")


def run(args: argparse.Namespace) -> None:
    if args.texts:
        count_texts(args)
    else:
        count_rounds(args)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def count_texts(args: argparse.Namespace) -> None:
    print(f"{'plain pass':16}" + "".join(f"{count:>4} texts" for count in args.texts))
    for folder in args.folders:
        target, _ = weightless_pair(folder, args.bits)
        with countable_kernels():
            ways = [packed_counts(target, args.texts, compiled=compiled) for compiled in (False, True)]
            use_countable_kernels(target)
            ways.append(packed_counts(target, args.texts, compiled=True))
        for name, found in zip(("eager", "compiled", "kernels"), ways, strict=True):
            print(f"{folder.name:6}{name:10}" + "".join(f"{count:10}" for count in found))


def packed_counts(target: Target, texts: list[int], *, compiled: bool) -> list[int]:
    """Return the operations of a plain round of each number of texts. One text alone has its whole round compiled."""
    return [
        operations(
            round_outputs(target, None, 0, compiled=compiled)
            if count == 1
            else packed_outputs(target, count, compiled=compiled)
        ).total()
        for count in texts
    ]


def count_rounds(args: argparse.Namespace) -> None:
    columns = "eager", "compiled", "kernels"
    print(f"{'':8}{'plain round':>30}{'draft step':>30}{'mlx-lm pass':>14}")
    print(f"{'':8}" + 2 * "".join(f"{column:>10}" for column in columns) + f"{'eager':>14}")
    for folder in args.folders:
        target, drafter = weightless_pair(folder, args.bits)
        with countable_kernels():
            found = [counts(target, drafter, compiled=False), counts(target, drafter, compiled=True)]
            reference = operations(mlx_lm_outputs(folder, args.bits))
            for network in (target, drafter):
                use_countable_kernels(network)
            found.append(counts(target, drafter, compiled=True))
        totals = [each[0].total() for each in found] + [draft_step(each) for each in found]
        print(f"{folder.name:8}" + "".join(f"{total:10}" for total in totals) + f"{reference.total():14}")
        if args.details:
            for title, each in zip(columns, found, strict=True):
                print(f"      plain round, {title}:")
                print(*(f"      {count:5} {kind}" for kind, count in each[0].most_common()), sep="\n")


def counts(target: Target, drafter: Drafter, *, compiled: bool) -> list[Counter[str]]:
    """Return the operations of rounds of 0, 2 and 3 draft tokens."""
    return [operations(round_outputs(target, drafter, k, compiled=compiled)) for k in (0, 2, 3)]


def draft_step(found: list[Counter[str]]) -> int:
    """Return the number of operations that a third draft token adds to a round.

    The first two also add operations that all draft tokens share.
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
