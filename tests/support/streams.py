"""Prompts and drafters for streams of tiny pairs, and a comparison of their state with a fresh pass."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from support.tiny import WINDOW, random_tokens

from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.drafter import Draft, Drafter, DraftInputs, ask_for_each
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target

Models = Callable[[str], tuple[Target, Drafter]]

SHORT = random_tokens(WINDOW - 5, seed=1)
LONG = random_tokens(3 * WINDOW + 5, seed=2)


class Scripted(Drafter):
    """A drafter that knows the plain continuation of a prompt. It drafts it, with wrong tokens at some positions."""

    def __init__(self, drafter: Drafter, prompt: list[int], plain: list[int], wrong_at: tuple[int, ...] = ()) -> None:
        super().__init__(drafter.config)
        self.prompt_length = len(prompt)
        # The zeros make the array longer than the plain tokens by more than one block.
        self.plain = mx.array(plain + [0] * 16, mx.int32)
        self.wrong_at = wrong_at

    def draft(self, target: Target, inputs: DraftInputs) -> Draft:
        # The bonus token's index is the position of the context. The continuation begins at the prompt's end.
        start = inputs.context.position - self.prompt_length + 1
        wrong = mx.array([[int(i in self.wrong_at) for i in range(inputs.k)]], mx.int32)
        draft = Draft((self.plain[start + mx.arange(inputs.k)] + wrong) % 512)
        ask_for_each(inputs, draft)
        return draft


def assert_same_state(stream: Stream, target: Target, tokens: list[int]) -> None:
    """Check that a stream's caches hold exactly these tokens. Visible K/V must equal the K/V of one fresh pass."""
    assert stream.cache.length == int(stream.cache.offset) == len(tokens)
    fresh = Cache(target.config, target.dtype, max_block=stream.cache.max_block)
    target(mx.array([tokens]), fresh)
    fresh.set_length(len(tokens))
    for layer_type in ("sliding_attention", "full_attention"):
        views = stream.cache.draft_view(layer_type), fresh.draft_view(layer_type)
        masks = [np.array(view.mask)[0] for view in views]
        assert (masks[0] == masks[1]).all()
        for name in ("keys", "values"):
            ours, theirs = (np.array(getattr(view, name))[:, :, masks[0]] for view in views)
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
