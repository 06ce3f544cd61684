"""Which draft tokens the target accepts, decided on the device."""

from typing import NamedTuple

import mlx.core as mx


class Acceptance(NamedTuple):
    """`accepted` is int32 []; `tokens` int32 [k + 1], of which the first `accepted + 1` are to be emitted."""

    accepted: mx.array
    tokens: mx.array


def accept_greedy(drafted: mx.array, logits: mx.array) -> Acceptance:
    """Accept the longest prefix of the draft tokens [1, k] equal to the target's argmax over logits [1, k + 1, vocab].

    The target's choice at the first row not matched is emitted after them: where a draft was accepted it is the
    target's choice too, so the choices themselves are the tokens to emit.
    """
    choices = mx.argmax(logits[0], axis=-1).astype(mx.int32)
    matches = (drafted[0] == choices[:-1]).astype(mx.int32)
    return Acceptance(mx.cumprod(matches).sum(), choices)
