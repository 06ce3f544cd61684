"""From tokens to readable text as they come: the answer up to a stop string, and the thought before it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .guide import Channel

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class Piece(NamedTuple):
    """Text that became readable, valid UTF-8, whether a stop string ends it, and whether the token belongs to a thought
    or its channel."""

    text: str = ""
    thought: str = ""
    stopped: bool = False
    in_thought: bool = False


class TextStream:
    """Makes text of one generation's tokens.

    What is inside the thought channel, but for the first line, its name, is the thought; the rest is the answer, which
    ends before the first of the `stop` strings. `thought` is the number of tokens since the channel was opened, for a
    prompt that ends inside it.
    """

    def __init__(
        self, tokenizer: "TokenizerWrapper", channel: Channel | None, stop: Sequence[str], thought: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._channel = channel
        self._stop = _StopStrings(stop)
        self._in_thought = thought is not None
        self._is_named = channel is not None and thought is not None and thought >= channel.header
        self._detokenizer = tokenizer.detokenizer

    def add(self, token: int | None, *, is_last: bool) -> Piece:
        """Add a token, None for one that has no text; after the last one, nothing is held back."""
        edge = None if self._channel is None else self._channel.end if self._in_thought else self._channel.start
        is_edge = token is not None and token == edge
        if token is not None and not is_edge:
            self._detokenizer.add_token(token)
        if is_last or is_edge:
            self._detokenizer.finalize()
        segment = self._detokenizer.last_segment
        thought = self._without_name(segment) if self._in_thought else ""
        text, stopped = self._stop.add("" if self._in_thought else segment, is_last=is_last)
        in_thought = self._in_thought or is_edge
        if is_edge:
            self._in_thought, self._is_named = not self._in_thought, False
            # Bytes of a character cut short must not run into what follows.
            self._detokenizer = self._tokenizer.detokenizer
        return Piece(text, thought, stopped, in_thought)

    def _without_name(self, segment: str) -> str:
        if self._is_named:
            return segment
        _, newline, rest = segment.partition("\n")
        self._is_named = bool(newline)
        return rest


class _StopStrings:
    """Cuts text at the first stop string, holding back what may yet become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""

    def add(self, text: str, *, is_last: bool) -> tuple[str, bool]:
        """The text that can be emitted now, and whether a stop string ends it."""
        self._held += text
        found = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if found:
            return self._held[: min(found)], True
        beginnings = [n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        ready = len(self._held) - (0 if is_last else max(beginnings, default=0))
        text, self._held = self._held[:ready], self._held[ready:]
        return text, False
