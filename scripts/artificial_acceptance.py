"""Compare the measured speed of rounds with a cost formula, for given chances that a draft token is accepted.

    python scripts/artificial_acceptance.py

An artificial drafter knows the text. It drafts the correct token with the given chance, and a wrong token otherwise.
Its draft steps have the cost of real draft steps. The expected speed-up over plain decoding is
E / (v(k + 1) + k c + o): tokens per round over the cost of a round. The costs are measured in the same run.
"""

import argparse
from statistics import mean, median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

import mlx_mtp
from mlx_mtp.bench.cli import prompt
from mlx_mtp.gemma4.drafter import Allow, Choose, Draft, DraftContext, Drafter, ask_for_each, choose_best
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target

PROMPT_TOKENS, TOKENS = 128, 200


class ArtificialDrafter(Drafter):
    """Drafter that computes a real drafter's steps, but replaces its draft tokens.

    It drafts the next token of a known text with a given chance, and a wrong token otherwise.
    """

    def __init__(self, drafter: Drafter, text: list[int], share: float, seed: int) -> None:
        nn.Module.__init__(self)
        self.config = drafter.config
        self.real = drafter
        chosen = np.random.default_rng(seed).random(len(text)) < share
        wrong = [(token + 1) % drafter.config.text.vocab_size for token in text]
        self._tokens = mx.array(np.where(chosen, text, wrong), mx.int32)

    def draft_context(self, cache: Cache) -> DraftContext:
        return self.real.draft_context(cache)

    def draft(
        self,
        target: Target,
        token: mx.array,
        hidden: mx.array,
        context: DraftContext,
        k: int,
        choose: Choose = choose_best,
        allow: Allow | None = None,
    ) -> Draft:
        """Draft k tokens of the known text. `context.position` is the bonus token's index in the text."""
        real = self.real.draft(target, token, hidden, context, k, choose)
        tokens = self._tokens[context.position + 1 + mx.arange(k)]
        # The real tokens are only a dependency. Without it, MLX does not compute them.
        draft = Draft(tokens[None] + 0 * real.tokens)
        if allow is not None:
            ask_for_each(allow, token, draft)
        return draft


def with_acceptance(model: mlx_mtp.Model, text: list[int], share: float, seed: int) -> mlx_mtp.Model:
    """Return the model with a drafter whose tokens are accepted with this chance. `text` includes the prompt."""
    assert model.drafter is not None
    drafter = ArtificialDrafter(model.drafter, text, share, seed)
    return mlx_mtp.Model(model.target, drafter, model.tokenizer, model.config, model.drafter_config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed by given acceptance, measured and computed.")
    parser.add_argument("--model", default=str(mlx_mtp.DEMO_PAIR), help="A pair (default: the demo pair).")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="Chances (0.5 0.7 0.9).")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="(1 2 3 5 8)")
    parser.add_argument("--repeats", type=int, default=4, help="Runs that count (default: %(default)s).")
    args = parser.parse_args()
    model = mlx_mtp.load(args.model)
    tokens = prompt(model, "code", PROMPT_TOKENS, TOKENS + 10)
    options = mlx_mtp.GenerationOptions(max_tokens=TOKENS, ignore_eos=True)
    text = tokens + model.generate(tokens, options, max_tokens=TOKENS + 10, num_draft_tokens=0).tokens
    runs = {
        (share, k): with_acceptance(model, text, share, seed=k) for share in args.shares for k in args.num_draft_tokens
    }
    speed: dict[Any, list[float]] = {setting: [] for setting in (None, *runs)}
    length: dict[Any, list[float]] = {setting: [] for setting in runs}
    curves = []
    for repeat in tqdm(range(-1, args.repeats), desc="Runs"):
        curves.append(model.calibrate(remeasure=True))
        for setting, speeds in speed.items():
            chosen, k = (model, 0) if setting is None else (runs[setting], setting[1])
            result = chosen.generate(tokens, options, num_draft_tokens=k)
            assert result.tokens == text[len(tokens) : len(tokens) + TOKENS]
            if repeat >= 0:
                speeds.append(result.last.generation_tps)
                if setting is not None:
                    length[setting].append(result.last.stats.acceptance_length or 0)
    print("chance  k  tokens per round (expected)  speed-up  formula  measured/formula")
    for share, k in runs:
        measured = median(a / b for a, b in zip(speed[share, k], speed[None], strict=True))
        expected = (1 - share ** (k + 1)) / (1 - share)
        formula = median(mean(length[share, k]) * curve.round(0) / curve.round(k) for curve in curves)
        print(
            f"{share:6.1f} {k:2} {mean(length[share, k]):17.2f} ({expected:.2f}) {measured:14.2f} {formula:8.2f} "
            f"{measured / formula:17.2f}"
        )


if __name__ == "__main__":
    main()
