"""Conversion of tokens to text as they arrive: the answer up to a stop string, and the thought before it."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlx_mtp.decoding.constraints import Channel

from .call_syntax import CALL_END, CALL_START, STRING_MARK, beginning_at_end

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class Piece(NamedTuple):
    """Text that becomes readable with one token.

    `text` is a part of the answer, and `thought` is a part of the thought. Both are valid UTF-8. `stopped` is the stop
    string that ends the answer. `in_thought` is true if the token belongs to a thought or to its channel.
    """

    text: str = ""
    thought: str = ""
    stopped: str | None = None
    in_thought: bool = False


class TextStream:
    """Stream that converts the tokens of one generation to text.

    The thought is the text inside the thought channel, without its first line, which is the channel's name. All other
    text is the answer. The answer ends before the first of the `stop` strings. `thought` is the number of tokens since
    the prompt opened the channel; None if the prompt does not end inside it.
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
        """Add a token and return the text that becomes readable.

        `token` is None for a token that has no text. After the last token, no text is held back.
        """
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
            # The bytes of an incomplete character must not run into the text after this token.
            self._detokenizer = self._tokenizer.detokenizer
        return Piece(text, thought, stopped, in_thought)

    def _without_name(self, segment: str) -> str:
        if self._is_named:
            return segment
        _, newline, rest = segment.partition("\n")
        self._is_named = bool(newline)
        return rest


_CALL_MARK = re.compile(f"{re.escape(CALL_END)}|{re.escape(STRING_MARK)}")
# This text follows the start mark of a call. The second pattern matches each beginning of it.
_CALL_HEAD = re.compile(r"\s*call:")
_CALL_HEAD_BEGINNING = re.compile(r"\s*(?:c|ca|cal|call)?")


class _StopStrings:
    """Filter that cuts text at the first stop string.

    It holds back text that may become a stop string. It passes tool calls on unchanged and looks for no stop string
    inside them.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self._in_call = self._in_string = False

    def add(self, text: str, *, is_last: bool) -> tuple[str, str | None]:
        """Return the text that can be emitted now and the stop string that ends it, None if there is none."""
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
        """Take text up to a stop string or the start of a call.

        Return the text, whether more can be taken, and the stop string.
        """
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
        """Take text of a call up to its next mark, and return the values that `_take_text` returns.

        An end mark inside a string does not end the call.
        """
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
