"""Tool calls as Gemma 4 writes them, read from the answer as it comes.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3,o:{},l:[true,null]}<tool_call|>`: bare keys, strings between
marks of their own and without escapes.
"""

import json
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)

CALL_START, CALL_END, STRING_MARK = "<|tool_call>", "<tool_call|>", '<|"|>'
BLANKS = " \t\r\n"
# What must follow `<|tool_call>`, and every beginning of it.
_HEAD = re.compile(r"[ \t\r\n]*call:[ \t\r\n]*([^\s{}<>]+)[ \t\r\n]*(?=\{)")
_HEAD_BEGINNING = re.compile(r"[ \t\r\n]*(?:c|ca|cal|call|call:[ \t\r\n]*(?:[^\s{}<>]+[ \t\r\n]*)?)?")
# Bare words that are JSON as they are.
_BARE_JSON = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Where a bare key and a bare value end, the latter by what closes the object or list it is in.
_KEY_END = re.compile(f":|{re.escape(CALL_END)}")
_VALUE_END = {closer: re.compile("|".join(map(re.escape, (",", closer, CALL_END, STRING_MARK)))) for closer in "}]"}


class ToolCallDelta(NamedTuple):
    """What became known of one call.

    `index` is that of the call within the answer; `name` is in its first delta only; `arguments` is to be appended to
    the call's arguments, the text of a JSON object.
    """

    index: int  # type: ignore[assignment]  # A tuple has a method of this name, which nothing here needs.
    name: str | None
    arguments: str


class ToolCallParser:
    """Separates the calls from the content of one answer, which comes in pieces cut anywhere.

    Arguments are emitted as they come. What is malformed is not lost: a call without `call:NAME{` is content, and from
    where the syntax of arguments breaks, they go on as the model wrote them, so that they are no JSON. Both are warned
    of. The arguments of a call that the end of the text cuts off are incomplete.
    """

    def __init__(self) -> None:
        self._held = ""
        self._calls = 0
        self._call: _Arguments | None = None

    def add(self, text: str, *, is_last: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """The content and the parts of calls that this text makes known; after the last one, nothing is held back."""
        self._held += text
        content: list[str] = []
        deltas: list[ToolCallDelta] = []
        name: str | None = None
        while True:
            if self._call is None:
                content.append(self._take_content(is_last))
                name = self._take_head(content, is_last)
                if self._call is None:
                    return "".join(content), deltas
            arguments, rest = self._call.add(self._held, is_last=is_last)
            if arguments or name is not None:
                deltas.append(ToolCallDelta(self._calls - 1, name, arguments))
            self._held = rest or ""
            if rest is None:
                return "".join(content), deltas
            self._call = None

    def _take_content(self, is_last: bool) -> str:
        """What comes before the next call."""
        start = self._held.find(CALL_START)
        if start < 0:
            start = len(self._held) - (0 if is_last else beginning_at_end(self._held, CALL_START))
        taken, self._held = self._held[:start], self._held[start:]
        return taken

    def _take_head(self, content: list[str], is_last: bool) -> str | None:
        """The name of the call that is begun here; None if it is not known yet, or if there is no call.

        What only looks like a call is added to the content.
        """
        while self._held.startswith(CALL_START):
            head = _HEAD.match(self._held, len(CALL_START))
            if head is not None:
                self._held = self._held[head.end() :]
                self._call = _Arguments(head[1])
                self._calls += 1
                return head[1]
            if not is_last and _HEAD_BEGINNING.fullmatch(self._held, len(CALL_START)):
                return None
            logger.warning("a tool call without call:NAME{ is passed on as content")
            content.append(CALL_START)
            self._held = self._held[len(CALL_START) :]
            content.append(self._take_content(is_last))
        return None


class _Arguments:
    """Makes JSON of one call's arguments, from `{` on, as they come.

    Keys and bare values are held back until they end: only then it is known what they are.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._held = ""
        # What closes the objects and lists that are open.
        self._closers: list[str] = []
        self._is_over = False
        # A step takes what it can from the held text and gives the JSON of it; None if it needs more.
        self._step: Callable[[], str | None] = self._value

    def add(self, text: str, *, is_last: bool) -> tuple[str, str | None]:
        """JSON to append, and the text after the call, None as long as the call goes on."""
        self._held += text
        parts: list[str] = []
        while not self._is_over and (part := self._step()) is not None:
            parts.append(part)
        if self._is_over:
            return "".join(parts), self._held
        if is_last:
            is_string = self._step in (self._string, self._quoted_key)
            parts.append(_escape(self._held) if is_string else self._held)
            self._held = ""
        return "".join(parts), None

    def _first_key(self) -> str | None:
        self._skip_blanks()
        return self._close() if self._held.startswith("}") else self._key()

    def _key(self) -> str | None:
        self._skip_blanks()
        if self._awaits(STRING_MARK):
            return None
        if self._held.startswith(STRING_MARK):
            return self._open_string(self._quoted_key)
        end = _KEY_END.search(self._held)
        if end is None:
            return None
        key = self._held[: end.start()].rstrip(BLANKS)
        if end[0] == CALL_END or not key or key.startswith("}"):
            return self._break()
        self._held = self._held[end.end() :]
        self._step = self._value
        return json.dumps(key, ensure_ascii=False) + ":"

    def _quoted_key(self) -> str | None:
        return self._rest_of_string(self._colon)

    def _colon(self) -> str | None:
        self._skip_blanks()
        return self._take(":", self._value) if self._held.startswith(":") else self._break_unless_empty()

    def _first_value(self) -> str | None:
        self._skip_blanks()
        return self._close() if self._held.startswith("]") else self._value()

    def _value(self) -> str | None:
        self._skip_blanks()
        if self._awaits(STRING_MARK):
            return None
        if self._held.startswith(STRING_MARK):
            return self._open_string(self._string)
        for opener, closer, step in (("{", "}", self._first_key), ("[", "]", self._first_value)):
            if self._held.startswith(opener):
                self._closers.append(closer)
                return self._take(opener, step)
        return self._bare_value()

    def _bare_value(self) -> str | None:
        end = _VALUE_END[self._closers[-1]].search(self._held)
        if end is None:
            return None
        value = self._held[: end.start()].rstrip(BLANKS)
        if end[0] in (CALL_END, STRING_MARK) or not value:
            return self._break()
        self._held = self._held[end.start() :]
        self._step = self._after_value
        return value if _BARE_JSON.fullmatch(value) else json.dumps(value, ensure_ascii=False)

    def _string(self) -> str | None:
        return self._rest_of_string(self._after_value)

    def _after_value(self) -> str | None:
        self._skip_blanks()
        if self._held.startswith(self._closers[-1]):
            return self._close()
        if self._held.startswith(","):
            return self._take(",", self._key if self._closers[-1] == "}" else self._value)
        return self._break_unless_empty()

    def _end(self) -> str | None:
        self._skip_blanks()
        if self._awaits(CALL_END) or self._awaits(CALL_START):
            return None
        # All of the call is there, so that one without its end does no harm to the next.
        self._is_over = self._held.startswith((CALL_END, CALL_START))
        self._held = self._held.removeprefix(CALL_END)
        return "" if self._is_over else self._break()

    def _verbatim(self) -> str | None:
        end = self._held.find(CALL_END)
        self._is_over = end >= 0
        ready = end if end >= 0 else len(self._held) - beginning_at_end(self._held, CALL_END)
        taken = self._held[:ready]
        self._held = self._held[ready + len(CALL_END) :] if self._is_over else self._held[ready:]
        return taken if taken or self._is_over else None

    def _open_string(self, step: Callable[[], str | None]) -> str:
        self._held = self._held[len(STRING_MARK) :]
        self._step = step
        return '"'

    def _rest_of_string(self, step: Callable[[], str | None]) -> str | None:
        """What is there of a string, closed if it ends."""
        end = self._held.find(STRING_MARK)
        if end >= 0:
            text, self._held = self._held[:end], self._held[end + len(STRING_MARK) :]
            self._step = step
            return _escape(text) + '"'
        ready = len(self._held) - beginning_at_end(self._held, STRING_MARK)
        text, self._held = self._held[:ready], self._held[ready:]
        return _escape(text) if text else None

    def _close(self) -> str:
        closer = self._closers.pop()
        return self._take(closer, self._after_value if self._closers else self._end)

    def _take(self, mark: str, step: Callable[[], str | None]) -> str:
        self._held = self._held[len(mark) :]
        self._step = step
        return mark

    def _break_unless_empty(self) -> str | None:
        return self._break() if self._held else None

    def _break(self) -> str:
        logger.warning("the syntax of a call of %s breaks: the rest of its arguments is passed on as it is", self._name)
        self._step = self._verbatim
        return ""

    def _skip_blanks(self) -> None:
        self._held = self._held.lstrip(BLANKS)

    def _awaits(self, mark: str) -> bool:
        """Whether the held text may yet become this mark."""
        return len(self._held) < len(mark) and mark.startswith(self._held)


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def beginning_at_end(text: str, mark: str) -> int:
    """The number of characters at the end of the text that may yet become this mark."""
    return max((count for count in range(1, len(mark)) if text.endswith(mark[:count])), default=0)
