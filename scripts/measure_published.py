"""Measure the cost and speed of rounds at the size of a published model, with random quantized weights.

    python scripts/measure_published.py E2B --bits 4 --shares 0 0.5 0.7 0.9 --mlx-lm

The script prints the milliseconds of rounds that verify 1 to 9 rows and of a draft step, and the number of operations
of a round on this device. With `--shares`, it prints tokens/s for each chance that a draft token is accepted: for plain
decoding, fixed draft lengths and `auto`, in turn, compared with the speed that follows from the costs. Random models do
not agree on tokens. The target is therefore made to choose the tokens of a random text.
"""

import argparse
import time
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from artificial_acceptance import ArtificialDrafter
from count_ops import mlx_lm_model, pair
from mlx.utils import tree_map_with_path
from published import NAMES
from tqdm import tqdm

from mlx_mtp.bench.operations import operations, round_outputs
from mlx_mtp.decoding import calibration
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import CostCurve, DraftLength
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream, decode
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target, TargetOutput

PROMPT_TOKENS = 4
LENGTHS: tuple[int | str, ...] = (0, 1, 2, 3, 5, 8, "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of rounds at real sizes.")
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--bits", type=int, default=4, help="Bits of the weights (default: 4).")
    parser.add_argument("--dtype", default="bfloat16", help="Type of activations (default: %(default)s).")
    parser.add_argument("--quick", action="store_true", help="Time each length twice, where a pass takes seconds.")
    parser.add_argument("--shares", type=float, nargs="+", default=[], help="Chances of draft tokens (none).")
    parser.add_argument("--max-tokens", "-m", type=int, default=128, help="To decode in a run (default: %(default)s).")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each that count (default: %(default)s).")
    parser.add_argument("--mlx-lm", action="store_true", help="Run mlx-lm's model of this size, too.")
    args = parser.parse_args()
    target, drafter = pair(args.model, args.bits)
    for module in (target, drafter):
        module.set_dtype(getattr(mx, args.dtype))
        randomize(module, args.bits)
    # With few tokens, there is no product over many rows. MLX's CUDA backend compiles each for a minute.
    calibration.CONTEXT_TOKENS = PROMPT_TOKENS
    if args.quick:
        calibration._WARM_UP, calibration._REPETITIONS = 2, (1, 1)
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
    print(f"peak memory {mx.get_peak_memory() / 1e9:.2f} GB", flush=True)
    if args.shares:
        measure_speed(target, drafter, curve, args)
    if args.mlx_lm:
        mx.random.seed(0)
        print(f"mlx-lm: {mlx_lm_speed(args):.1f} tokens/s")


class ToldTarget(Target):
    """Target whose most likely token is always the next token of a given text, with any weights."""

    _told: mx.array

    def __call__(self, tokens: mx.array, cache: Cache, logit_rows: int = 0, *others: Any, **named: Any) -> TargetOutput:
        first = cache.offset + tokens.shape[1] - logit_rows + 1
        output = super().__call__(tokens, cache, logit_rows, *others, **named)
        told = self._told[first + mx.arange(logit_rows)][:, None] == mx.arange(self.config.vocab_size)
        return output._replace(logits=mx.where(told, mx.inf, output.logits))


def measure_speed(target: Target, drafter: Drafter, curve: CostCurve, args: argparse.Namespace) -> None:
    """Print the tokens/s of each draft length, for each chance that a draft token is accepted."""
    text = mx.random.randint(0, target.config.vocab_size, (PROMPT_TOKENS + args.max_tokens + 10,)).tolist()
    target.__class__ = ToldTarget
    target._told = mx.array(text, mx.int32)
    drafters = {share: (ArtificialDrafter(drafter, text, share, 0), CompiledRounds()) for share in args.shares}
    settings = [(share, k) for share in args.shares for k in LENGTHS]
    speed: dict[Any, list[float]] = {setting: [] for setting in settings}
    stats: dict[Any, Stats] = {setting: Stats() for setting in settings}
    for repeat in tqdm(range(-1, args.repeats), desc="Runs"):
        for share, k in settings:
            who, rounds = drafters[share]
            stream = Stream(target, who, max_draft_tokens=calibration.MAX_DRAFT_TOKENS, rounds=rounds)
            policy = DraftLength(curve) if isinstance(k, str) else k
            decoded = decode(
                stream,
                text[:PROMPT_TOKENS],
                max_tokens=args.max_tokens,
                num_draft_tokens=policy,
                stop_ids=frozenset(),
                prefill_step_size=512,
            )
            next(decoded)
            start = time.perf_counter()
            done = list(decoded)
            seconds = time.perf_counter() - start
            assert stream.tokens == text[: PROMPT_TOKENS + args.max_tokens], "not the text that was told"
            if repeat >= 0:
                speed[share, k].append((args.max_tokens - 1) / seconds)
                for each in done:
                    stats[share, k].add(each.drafted, each.accepted, each.host_reads)
    print("chance    k  tokens/s  to plain (range)    formula  of it  of the best  drafted  tokens per round  reads")
    for share in args.shares:
        fixed = [k for k in LENGTHS if isinstance(k, int)]
        best = speed[share, max(fixed, key=lambda k: median(speed[share, k]))]
        for k in LENGTHS:
            found = stats[share, k]
            ratios = [a / b for a, b in zip(speed[share, k], speed[share, 0], strict=True)]
            of_best = median(a / b for a, b in zip(speed[share, k], best, strict=True))
            formula = 0.0 if isinstance(k, str) else (found.acceptance_length or 0) * curve.round(0) / curve.round(k)
            print(
                f"{share:6.2f} {k:>4} {median(speed[share, k]):9.1f} {median(ratios):9.2f} "
                f"({min(ratios):.2f}-{max(ratios):.2f})"
                + (f" {formula:8.2f} {median(ratios) / formula:6.2f}" if formula else 16 * " ")
                + f" {of_best:12.2f} {found.drafted / found.rounds:8.2f} {found.acceptance_length:17.2f} "
                f"{found.host_reads / found.rounds:6.2f}",
                flush=True,
            )


def mlx_lm_speed(args: argparse.Namespace) -> float:
    """Return the tokens/s of mlx-lm's plain decoding."""
    from mlx_lm.generate import generate_step

    model = mlx_lm_model(args.model, args.bits)
    model.set_dtype(getattr(mx, args.dtype))
    randomize(model, args.bits)
    found = []
    for _ in range(args.repeats + 1):
        steps = generate_step(mx.arange(PROMPT_TOKENS), model, max_tokens=args.max_tokens)
        next(steps)
        start = time.perf_counter()
        rest = sum(1 for _ in steps)
        found.append(rest / (time.perf_counter() - start))
    return median(found[1:])


def progress(bar: "tqdm[None]", done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def randomize(module: nn.Module, bits: int) -> None:
    """Replace zeros with random weights of unit gain, and set norms and scalars to 1, one tensor at a time."""

    def random(name: str, old: mx.array) -> mx.array:
        if old.dtype == mx.uint32:
            new = mx.random.randint(0, 2**31 - 1, old.shape, mx.uint32)
        elif name.endswith((".scales", ".biases")):
            # The values are from -1 to 1 times a bound. A row has 64 inputs for each of its groups.
            bound = (3 / (64 * old.shape[-1])) ** 0.5
            new = mx.full(old.shape, -bound if name.endswith("biases") else 2 * bound / (2**bits - 1), old.dtype)
        else:
            new = mx.arange(old.size).reshape(old.shape) if old.dtype == mx.int32 else mx.ones(old.shape, old.dtype)
        mx.eval(new)
        return new

    module.update(tree_map_with_path(random, module.parameters()))


if __name__ == "__main__":
    main()
