"""From tokens to readable text as they come: the answer up to a stop string, and the thought before it."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlx_mtp.decoding.constraints import Channel

from .call_syntax import CALL_END, CALL_START, STRING_MARK, beginning_at_end

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class Piece(NamedTuple):
    """Text that became readable, valid UTF-8, the stop string that ends it, and whether the token belongs to a thought
    or its channel."""

    text: str = ""
    thought: str = ""
    stopped: str | None = None
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


_CALL_MARK = re.compile(f"{re.escape(CALL_END)}|{re.escape(STRING_MARK)}")
# What follows the mark that begins a call, and every beginning of it.
_CALL_HEAD = re.compile(r"\s*call:")
_CALL_HEAD_BEGINNING = re.compile(r"\s*(?:c|ca|cal|call)?")


class _StopStrings:
    """Cuts text at the first stop string, and holds back what may yet become one. A tool call is passed on as it is: no
    stop string is looked for inside it."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self._in_call = self._in_string = False

    def add(self, text: str, *, is_last: bool) -> tuple[str, str | None]:
        """The text that can be emitted now, and the stop string that ends it."""
        if not self._stop:
            return text, None
        self._held += text
        parts: list[str] = []
        stopped: str | None = None
        is_more = False
        while not stopped and (is_more or not parts):
            step = self._take_call if self._in_call else self._take_text
            part, is_more, stopped = step(is_last)
            parts.append(part)
        return "".join(parts), stopped

    def _take_text(self, is_last: bool) -> tuple[str, bool, str | None]:
        """Text up to a stop string or the beginning of a call, whether more can be taken, and the stop string."""
        found = [(index, stop) for stop in self._stop if (index := self._held.find(stop)) >= 0]
        call = self._held.find(CALL_START)
        if found:
            index, stop = min(found, key=lambda pair: pair[0])
            if not 0 <= call < index:
                return self._held[:index], False, stop
        if call >= 0:
            head = call + len(CALL_START)
            if not is_last and _CALL_HEAD_BEGINNING.fullmatch(self._held, head):
                return self._cut(call), False, None
            self._in_call, self._in_string = _CALL_HEAD.match(self._held, head) is not None, False
            return self._cut(head), True, None
        held = 0 if is_last else beginning_at_end(self._held, *self._stop, CALL_START)
        return self._cut(len(self._held) - held), False, None

    def _take_call(self, is_last: bool) -> tuple[str, bool, str | None]:
        """As `_take_text`, up to the mark that ends the call: within a string it ends nothing."""
        mark = _CALL_MARK.search(self._held)
        if mark is None:
            held = 0 if is_last else beginning_at_end(self._held, CALL_END, STRING_MARK)
            return self._cut(len(self._held) - held), False, None
        if mark[0] == CALL_END and not self._in_string:
            self._in_call = False
            return self._cut(mark.start()), True, None
        self._in_string ^= mark[0] == STRING_MARK
        return self._cut(mark.end()), True, None

    def _cut(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
