"""Simulate the automatic draft length on recorded texts, against each fixed draft length.

    python scripts/measure.py lengths

A greedy text is decoded, and at each of its tokens a round of 8 draft tokens tells how many of them the target accepts.
The rounds of any choice of lengths follow from this, so the figures have no noise of a clock: they are the tokens per
second over plain decoding, by the real policy and by the costs of rounds. These are the costs that are kept for the
pair on this machine, or those of a report of `mlx-mtp bench --json`.

With `--sampled N`, N texts at temperature 1 follow each prompt instead. Every draft token there is accepted with its
chance sum(min(p, q)), which the models give for the text. Each text is drawn 20 times, and a line has the mean of all.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean

import mlx.core as mx
import numpy as np

import mlx_mtp
from mlx_mtp.bench.prompts import prompt
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, CostCurve, Costs, DraftLength, DraftPolicy
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.training.losses import compute_target_states, unroll

from .pairs import add_pair, decode_to_length, load_pair

# Draws of the accepted tokens of each sampled text.
DRAWS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    parser.add_argument("--kinds", nargs="+", default=["code", "prose"], help="Kinds of text, as of mlx-mtp bench.")
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 200], help="Tokens of the prompts.")
    parser.add_argument("--max-tokens", "-m", type=int, default=160, help="Tokens of each text (%(default)s).")
    parser.add_argument("--sampled", type=int, default=0, metavar="N", help="Sampled texts after each prompt.")
    parser.add_argument("--reports", nargs="+", type=Path, help="Reports of mlx-mtp bench --json with the costs.")


def run(args: argparse.Namespace) -> None:
    model = load_pair(args)
    found = [costs_of(file, -1 if args.sampled else 0) for file in args.reports or []]
    found = found or [model.calibrate(mlx_mtp.Sampling(temperature=float(args.sampled > 0)))]
    shares: list[float] = []
    print(
        f"{'text':>12} costs" + "".join(f"{k:>6}" for k in range(MAX_DRAFT_TOKENS + 1)) + "   auto  of 0 to 4  of all"
    )
    for kind in args.kinds:
        for context in args.contexts:
            start = prompt(model, kind, context, args.max_tokens)
            if args.sampled:
                texts = [t for seed in range(args.sampled) for t in sampled(model, start, args.max_tokens, seed)]
            else:
                texts = [recorded(model, start, args.max_tokens)]
            for number, costs in enumerate(found):
                fixed = [
                    mean(speed(text, costs, DraftPolicy(k)) for text in texts) for k in range(MAX_DRAFT_TOKENS + 1)
                ]
                auto = mean(speed(text, costs, DraftLength(costs)) for text in texts)
                shares.append(auto / max(fixed[:5]))
                cells = "".join(f"{each / fixed[0]:6.2f}" for each in (*fixed, auto))
                print(
                    f"{kind:>7} {context:4} {number:5}{cells} {shares[-1]:10.3f} {auto / max(fixed):7.3f}", flush=True
                )
    print(f"auto is at {mean(shares):.3f} of the best of 0 to 4 draft tokens")


def costs_of(file: Path, case: int) -> Costs:
    """Return the costs of rounds that wait, from a case of a report."""
    costs = json.loads(file.read_text())["cases"][case]["costs"]
    return Costs(CostCurve(costs["verify"], costs["draft"], costs["overhead"]))


def recorded(model: mlx_mtp.Model, start: list[int], count: int) -> list[int]:
    """Return for each token of the greedy text after `start` how many draft tokens of a round there are accepted."""
    rounds = CompiledRounds()

    def decoded(tokens: list[int], more: int, k: int) -> Iterator[RoundReport]:
        parts = model.parts
        stream = Stream(parts.target, parts.drafter, max_draft_tokens=MAX_DRAFT_TOKENS, rounds=rounds)
        # Prefill yields the first token, and `more` tokens follow it.
        return decode_to_length(stream, tokens, 1 + more, k)

    text = [token for report in decoded(start, count, 0) for token in report.tokens]
    found = []
    for place in range(count):
        _, first = islice(decoded(start + text[:place], MAX_DRAFT_TOKENS + 1, MAX_DRAFT_TOKENS), 2)
        found.append(first.accepted)
    return found


def sampled(model: mlx_mtp.Model, start: list[int], count: int, seed: int) -> Iterator[list[int]]:
    """Yield the same for a text sampled at temperature 1, once for each draw."""
    assert model.drafter is not None
    options = mlx_mtp.GenerationOptions(
        max_tokens=count + MAX_DRAFT_TOKENS, ignore_eos=True, sampling=mlx_mtp.Sampling(temperature=1.0, seed=seed)
    )
    text = start + model.generate(start, options, num_draft_tokens=0).tokens
    states = compute_target_states(model.target, text)
    # The drafts of a row follow the token after it, as a round's drafts follow its first token.
    steps = unroll(model.target, model.drafter, states, len(start), count, MAX_DRAFT_TOKENS)
    chances = np.array(mx.stack([step.accepted for step in steps], axis=1))
    random = np.random.default_rng(seed)
    for _ in range(DRAWS):
        right = random.random(chances.shape) < chances
        yield np.cumprod(right, axis=1).sum(axis=1).tolist()


def speed(text: Sequence[int], costs: Costs, policy: DraftPolicy) -> float:
    """Return the tokens per second of a policy. `text` has the largest number of accepted tokens at each place."""
    policy.start([])
    place, seconds = 0, 0.0
    while place < len(text):
        k = policy.choose().k
        accepted = min(k, text[place])
        seconds += costs.round(k)
        place += accepted + 1
        policy.update(RoundReport([0] * (accepted + 1), k, accepted, None, 1), None)
    return place / seconds
