"""Compare the measured speed of rounds with a cost formula, for given chances that a draft token is accepted.

    python scripts/measure.py formula

An artificial drafter knows the text. It drafts the correct token with the given chance, and a wrong token otherwise.
Its draft steps have the cost of real draft steps. The expected speed-up over plain decoding is
E / (v(k + 1) + k c + o): tokens per round over the cost of a round. The costs are measured in the same run.
"""

import argparse
from statistics import mean, median

from huggingface_hub.utils import tqdm

import mlx_mtp
from mlx_mtp.bench.prompts import prompt
from mlx_mtp.decoding.calibration import measure_rounds
from mlx_mtp.decoding.draft_length import Costs

from .artificial import ArtificialDrafter
from .costs import add_quick, measuring_plan
from .pairs import add_pair, load_pair, tokens_per_round

PROMPT_TOKENS = 128
# Tokens of the known text beyond those that are decoded. A last round may draft some of them.
SPARE_TOKENS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    parser.add_argument("--chances", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="Chances (0.5 0.7 0.9).")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="(1 2 3 5 8)")
    parser.add_argument("--max-tokens", "-m", type=int, default=200, help="Tokens per generation (%(default)s).")
    parser.add_argument("--repeats", type=int, default=4, help="Runs that count (%(default)s).")
    add_quick(parser)


def run(args: argparse.Namespace) -> None:
    model = load_pair(args)
    assert model.drafter is not None
    tokens = prompt(model, "code", PROMPT_TOKENS, args.max_tokens + SPARE_TOKENS)
    options = mlx_mtp.GenerationOptions(max_tokens=args.max_tokens, ignore_eos=True, num_draft_tokens=0)
    text = tokens + model.generate(tokens, options, max_tokens=args.max_tokens + SPARE_TOKENS).tokens
    runs = {(p, k): with_acceptance(model, text, p, seed=k) for p in args.chances for k in args.num_draft_tokens}
    plain: list[float] = []
    speeds: dict[tuple[float, int], list[float]] = {setting: [] for setting in runs}
    lengths: dict[tuple[float, int], list[float]] = {setting: [] for setting in runs}
    curves: list[Costs] = []
    for repeat in tqdm(range(-1, args.repeats), desc="Runs"):
        curves.append(measure_rounds(model.target, model.drafter, options.sampling, plan=measuring_plan(args)))
        last = checked(model.generate(tokens, options), text[len(tokens) :])
        if repeat >= 0:
            plain.append(last.generation_tps)
        for (chance, k), chosen in runs.items():
            last = checked(chosen.generate(tokens, options, num_draft_tokens=k), text[len(tokens) :])
            if repeat >= 0:
                speeds[chance, k].append(last.generation_tps)
                lengths[chance, k].append(tokens_per_round(last.stats))
    print("chance  k  tokens per round (expected)  speed-up  formula  measured/formula")
    for chance, k in runs:
        length = mean(lengths[chance, k])
        measured = median(a / b for a, b in zip(speeds[chance, k], plain, strict=True))
        formula = median(length * curve.round(0) / curve.round(k) for curve in curves)
        print(
            f"{chance:6.1f} {k:2} {length:17.2f} ({expected_length(chance, k):.2f}) {measured:14.2f} {formula:8.2f} "
            f"{measured / formula:17.2f}"
        )


def with_acceptance(model: mlx_mtp.Model, text: list[int], chance: float, seed: int) -> mlx_mtp.Model:
    """Return the model with a drafter whose tokens are accepted with this chance. `text` includes the prompt."""
    assert model.drafter is not None
    drafter = ArtificialDrafter(model.drafter, text, chance, seed)
    return mlx_mtp.Model(model.target, drafter, model.tokenizer, model.config, model.drafter_config)


def expected_length(chance: float, k: int) -> float:
    """Return the expected tokens per round of k draft tokens."""
    return sum(chance**i for i in range(k + 1))


def checked(result: mlx_mtp.GenerationResult, known: list[int]) -> mlx_mtp.GenerationResponse:
    """Return the last response of a result whose tokens are the known text."""
    assert result.tokens == known[: len(result.tokens)], "another text than plain decoding's"
    return result.last
