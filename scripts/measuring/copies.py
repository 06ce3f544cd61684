"""Simulate the choice between copies, draft tokens and plain decoding, on cost curves of Macs and on told texts.

    python scripts/measure.py copies

The policies are the real ones. Each decodes the same texts: changes of source files of Python's standard library,
quotes from its documentation, and code and prose from scratch. The costs of rounds are published for Apple's chips, and
interpolated. The drafter is simulated: it is right with a given chance, which is higher for tokens that the text had
before. The figures are the tokens per second over plain decoding, without copies and with copies by margin, and the
worst ratio of a text to itself without copies. A margin has two values: the second counts after a loss. Texts with an
even number are for the choice of the margin: the lines below the table have the mean ratio of their changes and quotes,
and the worst ratio of their new code and prose. The table has the texts with an odd number.
"""

import argparse
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import mlx_mtp
from mlx_mtp.bench.prompts import QUESTIONS
from mlx_mtp.decoding.copy_index import CopyIndex
from mlx_mtp.decoding.copy_policy import COPY_GAIN, CopyGain, CopyPolicy
from mlx_mtp.decoding.draft_length import LARGEST_COPY, MAX_DRAFT_TOKENS, CostCurve, Costs, DraftLength, DraftPolicy
from mlx_mtp.decoding.report import RoundReport

# The cost of a pass by its number of rows, over that of one row. Where a source stops before 32 rows, the last figure
# is MLX's tile of 32 rows at the price of the last row that the source has, or two tiles of 16.
CURVES = {
    # Rapid-MLX, prompt_lookup.py, and mlx issue 3839.
    "M4 Pro 27B 4 bit": {1: 1, 2: 1.04, 4: 1.5, 8: 2.6, 9: 3.92, 13: 4.96, 32: 5.12},
    # Rapid-MLX, prompt_lookup.py.
    "M2 Pro 4B 4 bit": {1: 1, 2: 1.69, 4: 3.09, 8: 5.89, 16: 6.14, 32: 6.14},
    # mlx pull request 3863.
    "M3 Max 4 bit matrix": {1: 1, 2: 1, 4: 1.28, 6: 2.04, 8: 2.5, 9: 3.14, 10: 3.94, 32: 3.98},
    # mlx pull request 3791.
    "M5 Max 70B 4 bit": {1: 1, 3: 1.11, 5: 1.42, 8: 2.2, 12: 3.3, 32: 3.4},
    # mlx-dspark's kernel for 5 to 16 rows.
    "M4 Pro 27B, own kernel": {1: 1, 2: 1.04, 5: 1.4, 8: 1.4, 16: 2.4, 32: 4.8},
}
# The costs of a draft step and of the rest of drafting, over a pass of one row.
DRAFT, OVERHEAD = 0.05, 0.04
GAINS = (CopyGain(1.0, 1.0), CopyGain(1.2, 1.2), CopyGain(1.4, 1.4), COPY_GAIN, CopyGain(1.7, 1.7))
# Texts that repeat little. They have little to gain, so they must lose little.
NEW_TEXT = ("code", "prose")
_ROUND_TOKENS = LARGEST_COPY + 1


class Text(NamedTuple):
    kind: str
    prompt: list[int]
    answer: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=int, default=40, help="Texts of each kind (%(default)s).")
    parser.add_argument("--prompt-tokens", type=int, default=600, help="Tokens of each file (%(default)s).")
    parser.add_argument("--max-tokens", "-m", type=int, default=400, help="Tokens of each answer (%(default)s).")
    parser.add_argument("--chance", type=float, default=0.75, help="Chance of a draft token (%(default)s).")
    parser.add_argument("--draws", type=int, default=6, help="Draws of the drafter's luck (%(default)s).")
    parser.add_argument(
        "--chance-of-copied", type=float, default=0.9, help="Chance where the text had the token before (%(default)s)."
    )


def run(args: argparse.Namespace) -> None:
    found = [(text, luck(text, args)) for text in texts(args)]
    print(f"{len(found)} texts, {sum(len(text.answer) for text, _ in found)} tokens of answers")
    print(f"in use: a margin of {COPY_GAIN.usual}, and {COPY_GAIN.after_loss} after a loss")
    gains = " ".join(f"{gain.usual}/{gain.after_loss}" for gain in GAINS)
    for name, rows in CURVES.items():
        costs = costs_of(rows)
        print(f"\n{name}\n    kind without {gains}  worst ratio")
        # Speeds over those without copies: a row for each text, a column for each margin.
        changed: list[NDArray[np.float64]] = []
        new: list[NDArray[np.float64]] = []
        for kind in dict.fromkeys(text.kind for text, _ in found):
            of_kind = [each for each in found if each[0].kind == kind]
            without = np.array([speed(*each, costs) for each in of_kind])
            ratios = np.array([[speed(*each, costs, gain) for gain in GAINS] for each in of_kind]) / without[:, None]
            (new if kind in NEW_TEXT else changed).append(ratios[::2])
            odd, speeds = ratios[1::2], without[1::2]
            means = (odd * speeds[:, None]).mean(axis=0)
            print(f"{kind:>8} {speeds.mean():7.2f} {cells(means)}  {cells(odd.min(axis=0))}")
        print(f"    mean of changes {cells(np.concatenate(changed).mean(axis=0))}")
        print(f"    worst new text  {cells(np.concatenate(new).min(axis=0))}", flush=True)


def cells(values: Iterable[float]) -> str:
    return " ".join(f"{value:7.3f}" for value in values)


def costs_of(rows: dict[int, float]) -> Costs:
    """Return the costs of rounds with these costs of passes."""
    verify = np.interp(range(1, _ROUND_TOKENS + 1), list(rows), list(rows.values())).tolist()
    return Costs(CostCurve(verify[: MAX_DRAFT_TOKENS + 1], DRAFT, OVERHEAD), copied=tuple(verify))


def texts(args: argparse.Namespace) -> Iterator[Text]:
    """Yield the texts of all kinds. Each kind has its own files."""
    tokenizer = mlx_mtp.load(mlx_mtp.DEMO_PAIR, drafter="none").tokenizer
    rng = np.random.default_rng(0)
    modules = [path.read_text(errors="replace") for path in Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")]
    topics = [text for text in pydoc_data.topics.topics.values() if len(text) > 3000]
    needed = args.prompt_tokens + args.max_tokens
    for kind in (*QUESTIONS, "code", "prose"):
        pieces = topics if kind in ("cite", "prose") else modules
        order = [pieces[i] for i in rng.permutation(len(pieces))]
        taken = 0
        for piece in order:
            if taken == args.files:
                break
            tokens = tokenizer.encode(piece, add_special_tokens=False)
            if len(tokens) < needed:
                continue
            start = int(rng.integers(len(tokens) - needed + 1))
            if kind in QUESTIONS:
                source = tokens[start : start + args.prompt_tokens]
                question = QUESTIONS[kind](tokenizer.decode(source))
                prompt, answer = (
                    tokenizer.encode(question.instruction) + source,
                    tokenizer.encode(question.answer)[: args.max_tokens],
                )
            else:
                prompt, answer = tokens[start : start + 64], tokens[start + 64 : start + 64 + args.max_tokens]
            if len(answer) < args.max_tokens // 4:
                continue
            taken += 1
            yield Text(kind, prompt, answer)


def speed(text: Text, draws: list[list[bool]], costs: Costs, gain: CopyGain | None = None) -> float:
    """Return the simulated tokens per second over plain decoding, with copies if there is a margin."""
    total = 0.0
    for right in draws:
        chooser = DraftLength(costs)
        total += seconds(text, right, costs, chooser if gain is None else CopyPolicy(chooser, costs, gain))
    return len(draws) * len(text.answer) * costs.round(0) / total


def seconds(text: Text, right: list[bool], costs: Costs, policy: DraftPolicy) -> float:
    """Return the costs of the rounds of an answer. `right` tells for each token whether the drafter finds it."""
    policy.start(text.prompt)
    done, cost = 0, 0.0
    while done < len(text.answer):
        choice = policy.choose()
        k = min(choice.k, len(text.answer) - done - 1)
        if choice.copied is not None:
            hits = [a == b for a, b in zip(choice.copied[:k], text.answer[done:], strict=False)]
            cost += costs.copied[k]
        else:
            hits = right[done : done + k]
            cost += costs.round(k)
        accepted = next((i for i, hit in enumerate(hits) if not hit), k)
        tokens = text.answer[done : done + accepted + 1]
        done += len(tokens)
        policy.update(RoundReport(tokens, k, accepted, None, 1, copied=choice.copied is not None and k > 0), None)
    return cost


def luck(text: Text, args: argparse.Namespace) -> list[list[bool]]:
    """Return for each draw and token of the answer whether the drafter finds it, whatever the rounds are."""
    index = CopyIndex(text.prompt)
    chances = []
    for token in text.answer:
        chances.append(args.chance_of_copied if index.copy(1) == [token] else args.chance)
        index.append(token)
    found: list[list[bool]] = (np.random.default_rng(0).random((args.draws, len(chances))) < chances).tolist()
    return found
