"""Drafters whose tokens are known beforehand: acceptance is given, and only time is measured."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.gemma4.drafter import Draft, DraftContext, Drafter, DraftInputs, ask_for_each
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target


class ArtificialDrafter(Drafter):
    """Drafter that computes a real drafter's steps, but replaces its draft tokens.

    It drafts the next token of a known text, which includes the prompt, with a given chance, and a wrong token
    otherwise.
    """

    def __init__(self, drafter: Drafter, text: list[int], chance: float, seed: int) -> None:
        nn.Module.__init__(self)
        self.config = drafter.config
        self.real = drafter
        is_right = np.random.default_rng(seed).random(len(text)) < chance
        wrong = [(token + 1) % drafter.config.text.vocab_size for token in text]
        self._tokens = mx.array(np.where(is_right, text, wrong), mx.int32)

    def draft_context(self, cache: Cache) -> DraftContext:
        return self.real.draft_context(cache)

    def draft(self, target: Target, inputs: DraftInputs) -> Draft:
        """Draft k tokens of the known text. The position of the context is the bonus token's index in the text."""
        real = self.real.draft(target, inputs._replace(allow=None))
        tokens = self._tokens[inputs.context.position + 1 + mx.arange(inputs.k)]
        # The real tokens are only a dependency. Without it, MLX does not compute them.
        draft = Draft(tokens[None] + 0 * real.tokens)
        ask_for_each(inputs, draft)
        return draft
