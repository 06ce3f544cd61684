"""Measure tokens per round with a JSON Schema and without.

    python scripts/schema_acceptance.py --model target --drafter assistant

Both settings decode equal prompts, beginnings of source files of Python's standard library, greedily and sampled.
"""

import argparse

import held_out
import numpy as np
from acceptance_rules import error

import mlx_mtp
from mlx_mtp.decoding.sampling import Sampling

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


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per round with a JSON Schema and without.")
    parser.add_argument("--model", required=True, help="Folder of the target.")
    parser.add_argument("--drafter", required=True, help="Folder of its drafter.")
    parser.add_argument("--num-draft-tokens", type=int, default=3, help="Draft tokens per round (default: 3).")
    parser.add_argument("--max-tokens", type=int, default=200, help="Most tokens per generation (default: 200).")
    parser.add_argument("--prompt-tokens", type=int, default=250, help="Tokens per prompt (default: 250).")
    parser.add_argument("--prompts", type=int, default=8, help="How many prompts (default: 8).")
    parser.add_argument("--seeds", type=int, default=3, help="How many seeds per prompt when sampling (default: 3).")
    args = parser.parse_args()
    model = mlx_mtp.load(args.model, args.drafter)
    prompts = held_out.prompts(model, held_out.stdlib_files(), args.prompt_tokens)[: args.prompts]
    greedy = [Sampling()]
    sampled = [Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=seed) for seed in range(args.seeds)]
    print(f"tokens per round, {args.num_draft_tokens} draft tokens, mean and standard error over generations")
    print(f"{'':<12} {'greedy':>18} {'temperature 1':>18}")
    for name, schema in (("no schema", None), ("schema", SCHEMA)):
        cells = []
        for samplings in (greedy, sampled):
            lengths = np.array(
                [
                    model.generate(
                        prompt,
                        json_schema=schema,
                        sampling=sampling,
                        max_tokens=args.max_tokens,
                        num_draft_tokens=args.num_draft_tokens,
                        ignore_eos=schema is None,
                    ).last.stats.acceptance_length
                    for prompt in prompts
                    for sampling in samplings
                ]
            )
            cells.append(f"{lengths.mean():.2f} +- {error(lengths):.2f}")
        print(f"{name:<12} {cells[0]:>18} {cells[1]:>18}")


if __name__ == "__main__":
    main()
