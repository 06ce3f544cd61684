"""Conversion of tool call arguments in Gemma's own syntax to JSON, while they arrive."""

import re
from collections.abc import Callable
from typing import NamedTuple

from .argument_schema import ArgumentSchema
from .call_syntax import (
    BLANKS,
    CALL_END,
    CALL_START,
    END,
    HEAD_BEGINNING,
    NEXT_CALL,
    STRING_MARK,
    beginning_at_end,
    json_string,
    literal_type,
)

# Longer keys and literals are read at the end of the call, so that they are not searched again and again.
_LONGEST_NAME = 512
_LITERAL = re.compile(r"(?:[a-z]{1,5}|[0-9.eE+-]*)[ \t\r\n]*")
# This ends a key without quotes.
_KEY_END = re.compile(f":|{re.escape(CALL_END)}")
# The value before a key of this form is complete, whatever follows the key.
_PLAIN_KEY = re.compile(r"[\w$@./-]+")
# This is a key even without the schema. Other text may begin with an extra comma, or may not be a key.
_READABLE_KEY = re.compile(r"[\w$@./-]+(?: +[\w$@./-]+)*")
# This text at the end of a string may not belong to the string if its end mark is missing. It is braces, the next key,
# or the end of the call. The patterns are bounded, so that a long text is not searched again and again.
_CLOSERS = r"(?<![ \t\r\n}\])])[ \t\r\n}\])]{1,200}(?![ \t\r\n}\])])"
_NEXT_KEY = r",[ \t\r\n]{0,40}([\w$@./-]{1,64})[ \t\r\n]{0,40}[:=]"
_MARKS = sorted({mark[:length] for mark in (STRING_MARK, CALL_END, CALL_START) for length in range(1, len(mark) + 1)})
_UNCERTAIN_END = re.compile(
    rf"(?:{_CLOSERS}|(?=[,<]))"
    r"(?:,[ \t\r\n]{0,40}(?:[\w$@./-]{1,64}[ \t\r\n]{0,40}(?:[:=][ \t\r\n]{0,40})?)?)?"
    rf"(?:{'|'.join(map(re.escape, reversed(_MARKS)))})?\Z"
)
_NEXT_KEY_OR_END = re.compile(rf"(?:{_CLOSERS})?(?:{_NEXT_KEY}|{END.pattern})")


class _Open(NamedTuple):
    """Open object or list: its closing bracket, its schema, and the names that are given so far."""

    closer: str
    schema: ArgumentSchema
    given: set[str]


class _Text:
    """Text of the arguments, and the JSON that stands for its first part.

    `held` is the text that no step has taken. The JSON of taken text is pending until it is certain. `is_doubtful` is
    true if no more of it is certain before the call ends.
    """

    def __init__(self) -> None:
        self.held = ""
        self.is_doubtful = False
        self.certain: list[str] = []
        self.pending: list[str] = []
        # This is the length of the text whose JSON is certain.
        self.certain_length = 0
        self._parts: list[str] = []
        self._length = 0

    def __str__(self) -> str:
        return "".join(self._parts)

    def add(self, text: str) -> None:
        """Add text."""
        self.held += text
        self._parts.append(text)
        self._length += len(text)

    def take(self, mark: str, json: str) -> None:
        """Take `mark` from the held text. Its JSON is pending."""
        self.held = self.held[len(mark) :]
        self.pending.append(json)

    def confirm(self) -> None:
        """Make the pending JSON certain, unless the call is in doubt."""
        if not self.is_doubtful:
            self.certain += self.pending
            self.pending = []
            self.certain_length = self._length - len(self.held)

    def skip_blanks(self) -> None:
        """Take the blanks at the start of the held text. They have no JSON."""
        self.held = self.held.lstrip(BLANKS)

    def awaits(self, mark: str) -> bool:
        """Return whether the held text may become this mark."""
        return len(self.held) < len(mark) and mark.startswith(self.held)


class GemmaArguments:
    """Incremental conversion of one call's arguments to JSON, from the opening brace on.

    The steps of this class read arguments in Gemma's own syntax. Their output is pending until it is certain. It is
    certain when the next key or string begins, or when the call ends. Any other syntax stops the steps.
    """

    def __init__(self, schema: ArgumentSchema) -> None:
        # True if the arguments are not in Gemma's own syntax. The steps have then stopped.
        self.is_broken = False
        # True if the rest of the open string may not belong to it.
        self.is_loose = False
        # This is the text after the call, None while the call continues.
        self.rest: str | None = None
        # True if another call follows in the same block.
        self.is_block_open = False
        self._text = _Text()
        self._open: list[_Open] = []
        # This is the last character of the string before the held text.
        self._before = ""
        self._schema = schema
        # A step takes as much of the held text as possible. It returns False if it needs more text.
        self._step: Callable[[], bool] = self._begin

    @property
    def text(self) -> str:
        """All of the text so far."""
        return str(self._text)

    @property
    def emitted(self) -> tuple[str, int]:
        """JSON that is emitted so far, and the length of its text."""
        return "".join(self._text.certain), self._text.certain_length

    def add(self, text: str) -> str:
        """Add text, and return the JSON that becomes certain."""
        self._text.add(text)
        count = len(self._text.certain)
        while self.rest is None and not self.is_broken and self._step():
            pass
        return "".join(self._text.certain[count:])

    def cut(self) -> str:
        """Return the rest of the JSON of a call that the model had no room to finish."""
        if self._step == self._end:
            # The arguments are complete. The held text may be the start of another call.
            return "".join(self._text.pending)
        is_key = self._step in (self._first_key, self._key) and self._text.held.startswith(STRING_MARK)
        if is_key:
            self._take(STRING_MARK, '"', self._step)
        is_string = is_key or self._step == self._string
        return "".join([*self._text.pending, json_string(self._text.held)[1:-1] if is_string else self._text.held])

    def _begin(self) -> bool:
        """Begin the arguments. The name of a tool alone is a call without arguments."""
        if not self._text.held:
            return False
        if self._text.held.startswith("{"):
            self._take_opener("{", "}", self._first_key)
            self._text.confirm()
        elif self._text.held.startswith(("(", "[")):
            self._break()
        else:
            self._text.pending.append("{}")
            self._text.held = self._text.held.removeprefix(CALL_END)
            self._text.confirm()
            self._finish()
        return True

    def _first_key(self) -> bool:
        self._text.skip_blanks()
        return self._close() if self._text.held.startswith("}") else self._key()

    def _key(self) -> bool:
        self._text.skip_blanks()
        if self._text.awaits(STRING_MARK):
            return False
        if self._text.held.startswith(STRING_MARK):
            return self._quoted_key()
        if self._text.held.startswith(("}", '"', "'")):
            return self._break()
        end = _KEY_END.search(self._text.held, 0, _LONGEST_NAME)
        if end is None:
            return False if len(self._text.held) < _LONGEST_NAME else self._break()
        key = self._text.held[: end.start()].rstrip(BLANKS)
        frame = self._open[-1]
        is_readable = key in frame.schema.names or _READABLE_KEY.fullmatch(key) is not None
        if end[0] == CALL_END or not is_readable or key in frame.given:
            return self._break()
        self._text.held = self._text.held[end.end() :]
        return self._named(key, _PLAIN_KEY.fullmatch(key) is not None)

    def _quoted_key(self) -> bool:
        """Read a key between string marks, with its colon."""
        end = self._text.held.find(STRING_MARK, len(STRING_MARK), _LONGEST_NAME)
        if end < 0 and len(self._text.held) >= _LONGEST_NAME:
            return self._break()
        rest = "" if end < 0 else self._text.held[end + len(STRING_MARK) :].lstrip(BLANKS)
        if not rest:
            return False
        if not rest.startswith(":"):
            return self._break()
        key = self._text.held[len(STRING_MARK) : end]
        if key in self._open[-1].given:
            return self._break()
        self._text.held = rest[1:]
        return self._named(key, True)

    def _named(self, key: str, is_plain: bool) -> bool:
        """Add the key of a value. The value before it is complete if the key is an expected one."""
        frame = self._open[-1]
        frame.given.add(key)
        is_expected = key in frame.schema.names if frame.schema.names else is_plain
        self._text.pending.append(json_string(key) + ":")
        self._text.is_doubtful = self._text.is_doubtful or not is_expected
        self._schema = frame.schema.member(key)
        self._step = self._value
        self._text.confirm()
        return True

    def _first_value(self) -> bool:
        self._text.skip_blanks()
        return self._close() if self._text.held.startswith("]") else self._item()

    def _item(self) -> bool:
        self._schema = self._open[-1].schema.items
        return self._value()

    def _value(self) -> bool:
        self._text.skip_blanks()
        if not self._text.held or self._text.awaits(STRING_MARK):
            return False
        for opener, closer, kind, step in (
            ("{", "}", "object", self._first_key),
            ("[", "]", "array", self._first_value),
            (STRING_MARK, "", "string", self._string),
        ):
            if self._text.held.startswith(opener):
                if not self._schema.allows(kind):
                    return self._break()
                if closer:
                    return self._take_opener(opener, closer, step)
                self._before = ""
                self._take(opener, '"', step)
                self._text.confirm()
                return True
        return self._bare_value()

    def _bare_value(self) -> bool:
        found = _LITERAL.match(self._text.held)
        end = 0 if found is None else found.end()
        if end == len(self._text.held) < _LONGEST_NAME:
            return False
        value = self._text.held[:end].rstrip(BLANKS)
        kind = literal_type(value)
        is_over = self._text.held.startswith((",", self._open[-1].closer), end)
        if not is_over or end >= _LONGEST_NAME or kind is None or not self._schema.allows(kind):
            return self._break()
        self._take(self._text.held[:end], value, self._after_value)
        return True

    def _string(self) -> bool:
        """Take the available text of a string, and close the string at its end mark.

        The end mark may be missing. Until it arrives, text that looks like the end of the arguments or like the next
        key is not certain.
        """
        end = self._text.held.find(STRING_MARK)
        if not self.is_loose:
            string = self._text.held if end < 0 else self._text.held[: end + len(STRING_MARK)]
            certain = self._certain_length(string)
            self._take_text(certain)
            self._text.confirm()
            end -= certain if end >= 0 else 0
        if end >= 0:
            self._take_text(end)
            self._take(STRING_MARK, '"', self._after_value)
            self.is_loose = False
        elif self.is_loose:
            self._take_text(len(self._text.held) - beginning_at_end(self._text.held, STRING_MARK))
        return end >= 0

    def _certain_length(self, text: str) -> int:
        """Return the length of the text, up to the string's end mark, that belongs to the string in any case."""
        start = len(self._before)
        text = self._before + text
        uncertain = _UNCERTAIN_END.search(text, start)
        certain = len(text) if uncertain is None else uncertain.start()
        for found in _NEXT_KEY_OR_END.finditer(text, start):
            if found[1] is None or any(found[1] in frame.schema.names.keys() - frame.given for frame in self._open):
                self.is_loose = True
                return min(certain, found.start()) - start
        return certain - start

    def _after_value(self) -> bool:
        self._text.skip_blanks()
        if self._text.held.startswith(self._open[-1].closer):
            return self._close()
        if self._text.held.startswith(","):
            return self._take(",", ",", self._key if self._open[-1].closer == "}" else self._item)
        return self._break() if self._text.held else False

    def _end(self) -> bool:
        """End a complete call at its end mark or before the next call. A missing end mark then does no harm."""
        self._text.skip_blanks()
        next_call = NEXT_CALL.match(self._text.held)
        if self._text.held.startswith((CALL_END, CALL_START)) or next_call:
            self._text.held = (
                self._text.held[next_call.end() :] if next_call else self._text.held.removeprefix(CALL_END)
            )
            self._text.is_doubtful = False
            self._text.confirm()
            self._finish(is_block_open=next_call is not None)
            return True
        unmarked = self._text.held[: len(self._text.held) - beginning_at_end(self._text.held, CALL_END, CALL_START)]
        return False if HEAD_BEGINNING.fullmatch(unmarked) else self._break()

    def _finish(self, is_block_open: bool = False) -> None:
        self.rest = self._text.held
        self.is_block_open = is_block_open

    def _break(self) -> bool:
        """Stop the steps at an irregularity."""
        self.is_broken = True
        return False

    def _take_opener(self, opener: str, closer: str, step: Callable[[], bool]) -> bool:
        self._open.append(_Open(closer, self._schema, set()))
        return self._take(opener, opener, step)

    def _close(self) -> bool:
        closer = self._open.pop().closer
        return self._take(closer, closer, self._after_value if self._open else self._end)

    def _take_text(self, length: int) -> None:
        """Take `length` characters of a string's text."""
        text = self._text.held[:length]
        self._before = text[-1:] or self._before
        self._take(text, json_string(text)[1:-1], self._step)

    def _take(self, mark: str, json: str, step: Callable[[], bool]) -> bool:
        """Take `mark`, whose JSON is pending, and go on with a step."""
        self._text.take(mark, json)
        self._step = step
        return True
