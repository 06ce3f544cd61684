"""Media in the tokens of a prompt: their positions, and the rows that stand there in place of embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import shake_256

import mlx.core as mx
import numpy as np

from mlx_mtp.gemma4.target import PAD, MediaRows


@dataclass(frozen=True, eq=False)
class MediaSpan:
    """A medium at the positions start..start+count-1 of a prompt, one for each of its soft tokens.

    `digest` is the hash of its content. `features` returns its rows for the decoder, [1, count, hidden_size]. It is
    called when they are needed, which is never if the K/V are known. With `sees_both_ways`, the rows see each other in
    both directions in sliding layers. A prompt is then never cut inside the span.
    """

    start: int
    count: int
    digest: str
    features: Callable[[], mx.array]
    sees_both_ways: bool

    @property
    def end(self) -> int:
        """The position after the last soft token."""
        return self.start + self.count


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt in token ids, with its media. `Model.prepare` makes it, and all methods that take prompts accept it."""

    tokens: list[int]
    media: "PromptMedia"

    def with_tokens(self, tokens: Sequence[int]) -> "PreparedPrompt":
        """Return the prompt with more tokens at its end."""
        return PreparedPrompt([*self.tokens, *tokens], self.media)


class PromptMedia:
    """The media of one prompt, in order. A prompt of text has none.

    `reader` is the object that has read the media. Their features are of use to its model only.
    """

    def __init__(self, spans: Sequence[MediaSpan] = (), reader: object = None) -> None:
        self.spans = tuple(spans)
        self.reader = reader

    def keys(self, tokens: list[int]) -> list[int]:
        """Return the tokens of a text, with the content of the media in place of their placeholders.

        Two texts with the same keys have the same K/V. A soft token has a negative number from the hash of its medium
        and its own index, which no token has.
        """
        keys = list(tokens)
        for span in self.spans:
            numbers = np.frombuffer(shake_256(span.digest.encode()).digest(4 * span.count), "<i4")
            keys[span.start : span.end] = (numbers | np.int32(-(2**31))).tolist()
        return keys

    def end_of_chunk(self, start: int, end: int) -> int:
        """Return the end of a chunk that begins at `start` and should end at `end`.

        If this is inside a span that sees both ways, the chunk ends before the span, or contains all of it.
        """
        for span in self.spans:
            if span.sees_both_ways and span.start < end < span.end:
                return span.start if start < span.start else span.end
        return end

    def chunk(self, prompt: list[int], start: int, end: int) -> tuple[list[int], MediaRows | None]:
        """Return the tokens from `start` to `end` for the target, and the rows of them that stand for media."""
        tokens = prompt[start:end]
        features: list[tuple[int, mx.array]] = []
        last_seen = np.arange(start, end, dtype=np.int32)
        for span in self.spans:
            first, last = max(span.start, start), min(span.end, end)
            if first >= last:
                continue
            rows = slice(first - start, last - start)
            tokens[rows] = [PAD] * (last - first)
            features.append((rows.start, span.features()[:, first - span.start : last - span.start]))
            if span.sees_both_ways:
                last_seen[rows] = span.end - 1
        if not features:
            return tokens, None
        is_causal = not any(span.sees_both_ways for span in self.spans)
        return tokens, MediaRows(features, None if is_causal else mx.array(last_seen))
