"""What rounds cost here at the size of a published model, with random quantized weights.

    python scripts/measure_published.py E2B --bits 4

Prints milliseconds of rounds that verify 1 to 9 rows, of a draft step, and the operations of a round on this device.
"""

import argparse
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from count_ops import pair
from mlx.utils import tree_map_with_path
from published import NAMES
from tqdm import tqdm

from mlx_mtp import calibration
from mlx_mtp.graph import operations, round_outputs
from mlx_mtp.sampling import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of rounds at real sizes.")
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--bits", type=int, default=4, help="Bits of the weights (default: 4).")
    parser.add_argument("--dtype", default="bfloat16", help="Type of activations (default: %(default)s).")
    parser.add_argument("--quick", action="store_true", help="Time each length twice, where a pass takes seconds.")
    args = parser.parse_args()
    target, drafter = pair(args.model, args.bits)
    for module in (target, drafter):
        module.set_dtype(getattr(mx, args.dtype))
        randomize(module, args.bits)
    if args.quick:
        calibration._CONTEXT, calibration._WARM_UP, calibration._REPETITIONS = 4, 2, (1, 1)
    for k in (0, 3):
        print(f"k = {k}: {operations(round_outputs(target, drafter, k)).total()} operations on {mx.default_device()}")
    with tqdm(desc="Rounds") as bar:
        curve = calibration.measure_rounds(target, drafter, Sampling(), partial(progress, bar))
    one = curve.verify[0]
    print("v(1) to v(9), ms: " + " ".join(f"{1e3 * seconds:.1f}" for seconds in curve.verify))
    print("over v(1):        " + " ".join(f"{seconds / one:.2f}" for seconds in curve.verify))
    print(
        f"draft step {1e3 * curve.draft:.2f} ms, {curve.draft / one:.3f} of v(1); other {1e3 * curve.overhead:.2f} ms"
    )
    print(f"peak memory {mx.get_peak_memory() / 1e9:.2f} GB")


def progress(bar: "tqdm[None]", done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def randomize(module: nn.Module, bits: int) -> None:
    """Random weights of unit gain in the place of zeros; norms and scales of 1. A tensor at a time is made."""

    def random(name: str, old: mx.array) -> mx.array:
        if old.dtype == mx.uint32:
            new = mx.random.randint(0, 2**31 - 1, old.shape, mx.uint32)
        elif name.endswith((".scales", ".biases")):
            # Values from -1 to 1 times a bound, for rows of as many inputs as there are groups of 64.
            bound = (3 / (64 * old.shape[-1])) ** 0.5
            new = mx.full(old.shape, -bound if name.endswith("biases") else 2 * bound / (2**bits - 1), old.dtype)
        else:
            new = mx.arange(old.size).reshape(old.shape) if old.dtype == mx.int32 else mx.ones(old.shape, old.dtype)
        mx.eval(new)
        return new

    module.update(tree_map_with_path(random, module.parameters()))


if __name__ == "__main__":
    main()
