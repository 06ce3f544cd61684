"""Measure tokens per round with a JSON Schema and without.

    python scripts/measure.py schema

Both settings decode equal prompts, beginnings of source files of Python's standard library, greedily and sampled.
"""

import argparse

import mlx_mtp
from mlx_mtp.decoding.sampling import Sampling

from .pairs import add_generation, add_pair, load_pair, mean_and_error, stdlib_prompts, tokens_per_round

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "author": {"type": "string", "maxLength": 20},
        "pages": {"type": "integer", "minimum": 1, "maximum": 2000},
        "topics": {"type": "array", "items": {"enum": ["files", "network", "text", "system"]}, "maxItems": 4},
        "chapters": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 30}, "is_short": {"type": "boolean"}},
                "required": ["name", "is_short"],
                "additionalProperties": False,
            },
            "minItems": 2,
            "maxItems": 4,
        },
    },
    "required": ["title", "author", "pages", "topics", "chapters"],
    "additionalProperties": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    add_generation(parser, max_tokens=200, prompt_tokens=250, prompts=8)
    parser.add_argument("--seeds", type=int, default=3, help="Seeds per prompt when sampling (%(default)s).")


def run(args: argparse.Namespace) -> None:
    model = load_pair(args)
    prompts = stdlib_prompts(model, args)
    greedy = [Sampling()]
    sampled = [Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=seed) for seed in range(args.seeds)]
    print(f"tokens per round, {args.num_draft_tokens} draft tokens, mean and standard error over generations")
    print(f"{'':<12} {'greedy':>18} {'temperature 1':>18}")
    for name, schema in (("no schema", None), ("schema", SCHEMA)):
        options = mlx_mtp.GenerationOptions(
            json_schema=schema,
            max_tokens=args.max_tokens,
            num_draft_tokens=args.num_draft_tokens,
            ignore_eos=schema is None,
        )
        cells = [mean_and_error(lengths(model, prompts, options, samplings)) for samplings in (greedy, sampled)]
        print(f"{name:<12} {cells[0]:>18} {cells[1]:>18}")


def lengths(
    model: mlx_mtp.Model, prompts: list[list[int]], options: mlx_mtp.GenerationOptions, samplings: list[Sampling]
) -> list[float]:
    """Return the tokens per round of each generation."""
    results = [model.generate(prompt, options, sampling=sampling) for prompt in prompts for sampling in samplings]
    return [tokens_per_round(result.last.stats) for result in results]
