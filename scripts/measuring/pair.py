"""Measure the fit of a drafter to its target, and the speed-up, on text that is not in their training data.

    python scripts/measure.py pair --model target --drafter assistant

The prompts are beginnings of source files from Python's standard library and from other packages. Greedy texts of small
models repeat themselves, which makes the acceptance length too high. The output therefore includes the share of
repeated 4-grams. It also has two measures on the files' own text: the agreement on the most likely token, and
sum(min(p, q)), the chance that a sampled draft token is accepted.
"""

import argparse
from dataclasses import replace
from statistics import mean, median

import mlx.core as mx
import numpy as np

import mlx_mtp
from mlx_mtp.training.losses import compute_target_states, unroll

from . import held_out
from .pairs import add_generation, add_pair, load_pair, mean_and_error, tokens_per_round

DRAFT_STEPS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    add_generation(parser, max_tokens=120, prompt_tokens=250, prompts=12)
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=512,
        help="Tokens of each file for the measures on its own text (%(default)s).",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="Runs of each prompt to time; 0 times none (%(default)s)."
    )


def run(args: argparse.Namespace) -> None:
    model = load_pair(args)
    options = mlx_mtp.GenerationOptions(
        max_tokens=args.max_tokens, num_draft_tokens=args.num_draft_tokens, ignore_eos=True
    )
    own = replace(model.default_sampling, temperature=1.0, seed=0)
    samplings = {"greedy": mlx_mtp.Sampling(), f"temperature 1, top-k {own.top_k}, top-p {own.top_p}": own}
    for title, files in (("standard library", held_out.stdlib_files()), ("other packages", held_out.package_files())):
        prompts = held_out.prompts(model, files, args.prompt_tokens)[: args.prompts]
        print(f"{title}: {len(prompts)} prompts, {args.max_tokens} tokens each, {args.num_draft_tokens} draft tokens")
        for name, sampling in samplings.items():
            lengths, repeats = generated(model, prompts, replace(options, sampling=sampling))
            print(
                f"  {name}: {mean_and_error(lengths)} tokens per round ({lengths.min():.2f} to {lengths.max():.2f}), "
                f"{repeats:.0%} of 4-grams repeated"
            )
        agreement, overlap = teacher_forced(model, held_out.prompts(model, files, args.text_tokens)[: args.prompts])
        print("  agreement by step, on the files' own text: " + " ".join(f"{share:.3f}" for share in agreement))
        print("  sum(min(p, q)) by step: " + " ".join(f"{share:.3f}" for share in overlap))
        for name, sampling in samplings.items() if args.repeats else ():
            chosen = replace(options, sampling=sampling)
            ratios = [speedup(model, prompt, chosen) for prompt in prompts[:5] for _ in range(args.repeats)]
            print(
                f"  speed over plain decoding, in turn, {name}: {median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


def generated(
    model: mlx_mtp.Model, prompts: list[list[int]], options: mlx_mtp.GenerationOptions
) -> tuple[np.ndarray, float]:
    """Return the tokens per round of each prompt's generation, and the mean share of repeated 4-grams."""
    results = [model.generate(prompt, options) for prompt in prompts]
    lengths = np.array([tokens_per_round(result.last.stats) for result in results])
    return lengths, mean(repeated(result.tokens) for result in results)


def repeated(tokens: list[int]) -> float:
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams)


def teacher_forced(model: mlx_mtp.Model, texts: list[list[int]]) -> tuple[list[float], list[float]]:
    """Return the mean agreement and the mean sum(min(p, q)) of each draft step, over all positions of the texts."""
    assert model.drafter is not None
    sums, positions = np.zeros((2, DRAFT_STEPS)), 0
    for tokens in texts:
        rows = len(tokens) - DRAFT_STEPS
        losses = unroll(model.target, model.drafter, compute_target_states(model.target, tokens), 1, rows, DRAFT_STEPS)
        sums += np.array([[mx.sum(step.agrees).item(), mx.sum(step.accepted).item()] for step in losses]).T
        positions += rows
    return (sums[0] / positions).tolist(), (sums[1] / positions).tolist()


def speedup(model: mlx_mtp.Model, prompt: list[int], options: mlx_mtp.GenerationOptions) -> float:
    drafted, plain = model.generate(prompt, options).last, model.generate(prompt, options, num_draft_tokens=0).last
    return drafted.generation_tps / plain.generation_tps
