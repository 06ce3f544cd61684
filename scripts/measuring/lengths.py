"""Simulate the automatic draft length on recorded texts, against each fixed draft length.

    python scripts/measure.py lengths

A greedy text is decoded, and at each of its tokens a round of 8 draft tokens tells how many of them the target accepts.
The rounds of any choice of lengths follow from this, so the figures have no noise of a clock: they are the tokens per
second over plain decoding, by the real policy and by the costs of rounds. These are the costs that are kept for the
pair on this machine, or those of a report of `mlx-mtp bench --json`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import mlx_mtp
from mlx_mtp.bench.prompts import prompt
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, CostCurve, Costs, DraftLength, DraftPolicy
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.stream import Stream

from .pairs import add_pair, decode_to_length, load_pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    parser.add_argument("--kinds", nargs="+", default=["code", "prose"], help="Kinds of text, as of mlx-mtp bench.")
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 200], help="Tokens of the prompts.")
    parser.add_argument("--max-tokens", "-m", type=int, default=160, help="Tokens of each text (%(default)s).")
    parser.add_argument("--reports", nargs="+", type=Path, help="Reports of mlx-mtp bench --json with the costs.")


def run(args: argparse.Namespace) -> None:
    model = load_pair(args)
    found = [costs_of(file) for file in args.reports or []]
    found = found or [model.calibrate(mlx_mtp.Sampling())]
    shares: list[float] = []
    print(
        f"{'text':>12} costs" + "".join(f"{k:>6}" for k in range(MAX_DRAFT_TOKENS + 1)) + "   auto  of 0 to 4  of all"
    )
    for kind in args.kinds:
        for context in args.contexts:
            text = recorded(model, prompt(model, kind, context, args.max_tokens), args.max_tokens)
            for number, costs in enumerate(found):
                plain, *fixed = [speed(text, costs, DraftPolicy(k)) for k in range(MAX_DRAFT_TOKENS + 1)]
                auto = speed(text, costs, DraftLength(costs))
                shares.append(auto / max(plain, *fixed[:4]))
                cells = "".join(f"{each / plain:6.2f}" for each in (plain, *fixed))
                print(
                    f"{kind:>7} {context:4} {number:5}{cells} {auto / plain:6.2f} {shares[-1]:10.3f} "
                    f"{auto / max(plain, *fixed):7.3f}",
                    flush=True,
                )
    print(f"auto is at {sum(shares) / len(shares):.3f} of the best of 0 to 4 draft tokens")


def costs_of(file: Path) -> Costs:
    """Return the costs of rounds that wait, from the first case of a report."""
    costs = json.loads(file.read_text())["cases"][0]["costs"]
    return Costs(CostCurve(costs["verify"], costs["draft"], costs["overhead"]))


def recorded(model: mlx_mtp.Model, start: list[int], count: int) -> list[int]:
    """Return for each token of the greedy text after `start` how many draft tokens of a round there are accepted."""
    rounds = CompiledRounds()

    def decoded(tokens: list[int], more: int, k: int) -> list[RoundReport]:
        parts = model.parts
        stream = Stream(parts.target, parts.drafter, max_draft_tokens=MAX_DRAFT_TOKENS, rounds=rounds)
        # Prefill yields the first token, and `more` tokens follow it.
        return list(decode_to_length(stream, tokens, 1 + more, k))

    text = [token for report in decoded(start, count, 0) for token in report.tokens]
    found = []
    for place in range(count):
        _, first, *_ = decoded(start + text[:place], MAX_DRAFT_TOKENS + 1, MAX_DRAFT_TOKENS)
        found.append(first.accepted)
    return found


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
