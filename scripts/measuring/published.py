"""Measure the cost and speed of rounds at the size of a published model, with random weights, quantized or not.

    python scripts/measure.py published tests/support/published/E2B --bits 4 --chances 0 0.5 0.7 0.9 --mlx-lm

The output has the milliseconds of rounds that verify 1 to 9 rows and of a draft step, and the number of operations of a
round on this device. With `--chances`, it has tokens/s for each chance that a draft token is accepted: for plain
decoding, fixed draft lengths and `auto`, in turn, compared with the speed that follows from the costs. Random models do
not agree on tokens. The target is therefore made to choose the tokens of a random text. `--rounds-ahead on off`,
`--kernels on off` and `--mlx-lm` compare in the same run. The last line is a JSON object with all figures.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.utils import tqdm
from mlx.utils import tree_map_with_path

from mlx_mtp.bench.environment import environment
from mlx_mtp.bench.operations import operations, round_outputs
from mlx_mtp.bench.told import KnownText
from mlx_mtp.decoding.calibration import measure_rounds
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, CostCurve, Costs, DraftLength, DraftPolicy
from mlx_mtp.decoding.report import RoundReport, Stats
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.timing import MeasuringPlan
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.fused_attention import choose_fused_attention
from mlx_mtp.gemma4.kernels import describe, remove_kernels, use_kernels
from mlx_mtp.gemma4.layers import DecoderLayer
from mlx_mtp.gemma4.target import Target

from .artificial import ArtificialDrafter
from .costs import add_quick, measuring_plan
from .pairs import decode_to_length, tokens_per_round
from .random_weights import quantization_value
from .sizes import add_bits, add_folder, weightless_mlx_lm_model, weightless_pair

# With few tokens before the round, there is no product over many rows. MLX's CUDA backend compiles each for a minute.
PROMPT_TOKENS = 4
AUTO: Literal["auto"] = "auto"
FIXED_LENGTHS = (0, 1, 2, 3, 5, 8)
LENGTHS: tuple[int | Literal["auto"], ...] = (*FIXED_LENGTHS, AUTO)


class Setting(NamedTuple):
    """A way to decode the known text: with or without kernels, rounds ahead, the chance of acceptance, draft tokens."""

    kernels: str
    ahead: str
    chance: float
    k: int | Literal["auto"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    add_bits(parser)
    parser.add_argument("--dtype", default="bfloat16", help="Type of activations (%(default)s).")
    add_quick(parser)
    parser.add_argument("--chances", type=float, nargs="+", default=[], help="Chances of acceptance (default: none).")
    parser.add_argument("--max-tokens", "-m", type=int, default=128, help="Tokens to decode in a run (%(default)s).")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each that count (%(default)s).")
    parser.add_argument("--mlx-lm", action="store_true", help="Also measure mlx-lm's model of this size.")
    for flag, choices, what in (
        ("--rounds-ahead", ("auto", "on", "off"), "Rounds dispatched ahead; auto: where they cost less"),
        ("--kernels", ("on", "off"), "Kernels of this project on an accelerator"),
    ):
        help_text = f"{what} (default: {choices[0]}). Several values are compared in one run."
        parser.add_argument(flag, nargs="+", choices=choices, default=choices[:1], help=help_text)


def run(args: argparse.Namespace) -> None:
    target, drafter = weightless_pair(args.folder, args.bits)
    for module in (target, drafter):
        module.set_dtype(getattr(mx, args.dtype))
        randomize(module, args.bits)
        choose_fused_attention(layers_of(module), getattr(mx, args.dtype))
    report: dict[str, Any] = {"environment": environment(), "model": args.folder.name, "bits": args.bits}
    report |= {"dtype": args.dtype, "tokens": args.max_tokens, "kernels": {}, "speeds": []}
    costs = {}
    for kernels in args.kernels:
        set_kernels((target, drafter), kernels)
        counts = {k: operations(round_outputs(target, drafter, k)).total() for k in (0, 3)}
        for k, count in counts.items():
            print(f"kernels {kernels} ({describe(target)}), k = {k}: {count} operations on {mx.default_device()}")
        costs[kernels] = measure_costs(target, drafter, replace(measuring_plan(args), context=PROMPT_TOKENS))
        print_costs(costs[kernels])
        found = {"in_use": describe(target), "operations": counts, "seconds": costs[kernels].as_json()}
        report["kernels"][kernels] = found
    reference = mlx_lm_decoder(args) if args.mlx_lm else None
    speeds = measure_speed(target, drafter, costs, args, reference) if args.chances or reference else {}
    report["mlx_lm"] = speeds.pop(None, [])
    if report["mlx_lm"]:
        print(f"mlx-lm: {median(report['mlx_lm']):.1f} tokens/s")
    report["speeds"] = [
        {**setting._asdict(), "tokens_per_second": found} for setting, found in speeds.items() if setting
    ]
    print(json.dumps(report))


def layers_of(network: Target | Drafter) -> list[DecoderLayer]:
    return network.layers if isinstance(network, Target) else network.model.layers


def set_kernels(networks: tuple[Target, Drafter], setting: str) -> None:
    """Let the networks use the kernels of this device, or none."""
    for network in networks:
        remove_kernels(network)
        if setting == "on":
            use_kernels(network)


def measure_costs(target: Target, drafter: Drafter, plan: MeasuringPlan) -> Costs:
    with tqdm(desc="Rounds") as bar:
        return measure_rounds(target, drafter, Sampling(), partial(show_progress, bar), plan=plan)


def show_progress(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def print_costs(costs: Costs) -> None:
    curve = costs.waiting
    one = curve.verify[0]
    print("v(1) to v(9), ms: " + " ".join(f"{1e3 * seconds:.1f}" for seconds in curve.verify))
    print("v(4), v(6), v(7) and v(8) are interpolated")
    print("over v(1):        " + " ".join(f"{seconds / one:.2f}" for seconds in curve.verify))
    print(
        f"draft step {1e3 * curve.draft:.2f} ms, {curve.draft / one:.3f} of v(1); other {1e3 * curve.overhead:.2f} ms"
    )
    if costs.ahead is not None:
        shares = [ahead / one for ahead in costs.ahead.verify]
        print("ahead over v(1): " + " ".join(f"{share:.2f}" for share in shares))
    print(f"peak memory {mx.get_peak_memory() / 1e9:.2f} GB", flush=True)


def measure_speed(
    target: Target,
    drafter: Drafter,
    costs: dict[str, Costs],
    args: argparse.Namespace,
    reference: Callable[[], float] | None,
) -> dict[Setting | None, list[float]]:
    """Print and return the tokens/s of each setting. The runs of the settings, and of the reference, take turns.

    The speeds of the reference have the key None.
    """
    drawn: Any = mx.random.randint(0, target.config.vocab_size, (PROMPT_TOKENS + args.max_tokens + 10,)).tolist()
    text: list[int] = drawn
    settings = [Setting(*each) for each in product(args.kernels, args.rounds_ahead, args.chances, LENGTHS)]
    drafters = {
        (kernels, chance): (ArtificialDrafter(drafter, text, chance, 0), CompiledRounds())
        for kernels, chance in product(args.kernels, args.chances)
    }
    speeds: dict[Setting | None, list[float]] = {setting: [] for setting in settings}
    stats: dict[Setting, Stats] = {setting: Stats() for setting in settings}
    for repeat in tqdm(range(-1, args.repeats), desc="Runs"):
        for setting in settings:
            set_kernels((target, drafter), setting.kernels)
            artificial, rounds = drafters[setting.kernels, setting.chance]
            stream = Stream(target, artificial, max_draft_tokens=MAX_DRAFT_TOKENS, rounds=rounds)
            stream.parts = stream.parts._replace(rules=KnownText(target, text))
            done, seconds = decode_known(stream, text, args.max_tokens, policy_of(setting, costs[setting.kernels]))
            if repeat >= 0:
                speeds[setting].append((args.max_tokens - 1) / seconds)
                for each in done:
                    stats[setting].add(each.drafted, each.accepted, each.host_reads, ahead=each.ahead)
        if reference is not None:
            speed = reference()
            if repeat >= 0:
                speeds.setdefault(None, []).append(speed)
    if settings:
        print_speeds(speeds, stats, costs)
    return speeds


def policy_of(setting: Setting, costs: Costs) -> DraftPolicy:
    """Return the policy of a setting, with the costs of its way to dispatch rounds."""
    if setting.ahead == "off":
        costs = Costs(costs.waiting)
    elif setting.ahead == "on" and costs.ahead is not None:
        # A round that waits costs more than any round ahead, so no round waits.
        slow = CostCurve([10 * max(costs.ahead.verify)] * len(costs.ahead.verify), 0.0)
        costs = Costs(slow, costs.ahead)
    if isinstance(setting.k, str):
        return DraftLength(costs)
    return DraftPolicy(setting.k, ahead=costs.is_ahead(setting.k))


def print_speeds(
    speeds: dict[Setting | None, list[float]], stats: dict[Setting, Stats], costs: dict[str, Costs]
) -> None:
    print(
        "kernels ahead chance    k  tokens/s  to plain (range)    formula  of it  of the best  drafted  tokens per "
        "round  reads  ahead"
    )
    for setting, found in stats.items():
        plain = speeds[setting._replace(k=0)]
        best = max((speeds[setting._replace(k=k)] for k in FIXED_LENGTHS), key=median)
        cost = costs[setting.kernels]
        expected = None if setting.k == AUTO else tokens_per_round(found) * cost.round(0) / cost.round(setting.k)
        print(
            f"{setting.kernels:>7} {setting.ahead:>5} {setting.chance:6.2f} {setting.k:>4} "
            f"{speed_cells(speeds[setting], plain, best, expected)} {round_cells(found)}",
            flush=True,
        )


def decode_known(
    stream: Stream, text: list[int], max_tokens: int, policy: DraftPolicy
) -> tuple[list[RoundReport], float]:
    """Decode tokens of the known text. Return the rounds after the first token, and their seconds."""
    decoded = decode_to_length(stream, text[:PROMPT_TOKENS], max_tokens, policy)
    next(decoded)
    start = time.perf_counter()
    done = list(decoded)
    seconds = time.perf_counter() - start
    assert stream.tokens == text[: PROMPT_TOKENS + max_tokens], "another text than the known text"
    return done, seconds


def speed_cells(speed: list[float], plain: list[float], best: list[float], expected: float | None) -> str:
    """Return the cells of a speed: itself, over plain decoding, over the formula, and over the best fixed length."""
    ratios = [a / b for a, b in zip(speed, plain, strict=True)]
    of_best = median(a / b for a, b in zip(speed, best, strict=True))
    formula = 16 * " " if expected is None else f" {expected:8.2f} {median(ratios) / expected:6.2f}"
    spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
    return f"{median(speed):9.1f} {median(ratios):9.2f} {spread}{formula} {of_best:12.2f}"


def round_cells(found: Stats) -> str:
    """Return the cells of the rounds: draft tokens, emitted tokens, host reads and the share of rounds ahead."""
    drafted, reads, ahead = (n / found.rounds for n in (found.drafted, found.host_reads, found.rounds_ahead))
    return f"{drafted:8.2f} {tokens_per_round(found):17.2f} {reads:6.2f} {ahead:6.2f}"


def mlx_lm_decoder(args: argparse.Namespace) -> Callable[[], float]:
    """Return a function that decodes plainly with mlx-lm and returns the tokens/s."""
    from mlx_lm.generate import generate_step

    mx.random.seed(0)
    model = weightless_mlx_lm_model(args.folder, args.bits)
    model.set_dtype(getattr(mx, args.dtype))
    randomize(model, args.bits)

    def decode() -> float:
        steps = generate_step(mx.arange(PROMPT_TOKENS), model, max_tokens=args.max_tokens)
        next(steps)
        start = time.perf_counter()
        rest = sum(1 for _ in steps)
        return rest / (time.perf_counter() - start)

    return decode


def randomize(module: nn.Module, bits: int) -> None:
    """Replace zeros with random weights of unit gain, and set norms and scalars to 1, one tensor at a time."""

    def random(name: str, old: mx.array) -> mx.array:
        if old.dtype == mx.uint32:
            new = mx.random.randint(0, 2**31 - 1, old.shape, mx.uint32)
        elif name.endswith((".scales", ".biases")):
            value = quantization_value(name, old.shape[-1], bits)
            new = mx.full(old.shape, value, old.dtype)
        elif old.dtype == mx.int32:
            new = mx.arange(old.size).reshape(old.shape)
        elif old.ndim > 1:
            new = mx.random.normal(old.shape, old.dtype, scale=old.shape[-1] ** -0.5)
        else:
            new = mx.ones(old.shape, old.dtype)
        mx.eval(new)
        return new

    module.update(tree_map_with_path(random, module.parameters()))
