"""Parser of tool calls as Gemma 4 writes them, which reads them while the answer arrives.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3,o:{},l:[true,null]}<tool_call|>`. Keys have no quotes. Strings
are between marks of their own and have no escapes. `tool_call_repair` reads arguments in any other syntax.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .argument_schema import ANYTHING, ArgumentSchema
from .call_syntax import BLANKS, CALL_END, CALL_START, STRING_MARK, beginning_at_end, is_json, json_string, literal_type
from .tool_call_repair import NEXT_CALL, Reading, read_arguments

logger = logging.getLogger(__name__)

_END = re.compile(rf"{re.escape(CALL_END)}|{re.escape(CALL_START)}")
_MARK = f"(?:{re.escape(STRING_MARK)})?"
# The pattern is bounded, so that a long text is not searched again and again.
_GAP = r"[ \t\r\n]{0,256}"
_NAME = rf"{_GAP}{_MARK}([^\s{{}}<>()]{{1,256}})"
# This text must follow `<|tool_call>`, or a call in the same block. The second pattern matches each beginning of it.
_HEAD = re.compile(rf"[ \t\r\n,;]{{0,256}}call:{_NAME}{_MARK}{_GAP}(?=[{{(]|{_END.pattern}|\Z)")
_HEAD_BEGINNING = re.compile(rf"[ \t\r\n,;]{{0,256}}(?:c|ca|cal|call|call:(?:{_NAME}{_MARK}{_GAP}|{_GAP}{_MARK}))?")
_QUOTED_NAME = re.compile(r"([\"'`])([\w.:-]+)\1")
# This opens a list around the arguments. The list is not a part of the arguments.
_LIST_OF_ONE = re.compile(r"\[[ \t\r\n]*(?=\{)")
# The strings of one call may hold this number of end marks.
_MOST_ENDS = 8
_QUOTE = re.compile(rf"{re.escape(STRING_MARK)}|[\"']")
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
_NEXT_KEY_OR_END = re.compile(rf"(?:{_CLOSERS})?(?:{_NEXT_KEY}|{_END.pattern})")


class ToolCallDelta(NamedTuple):
    """New part of one tool call.

    `index` is the index of the call within the answer. `name` is in the first delta of the call only. `arguments` is
    text to append to the call's arguments, which are the text of a JSON object.
    """

    index: int  # type: ignore[assignment]  # A tuple has a method of this name, which nothing here needs.
    name: str | None
    arguments: str


class ToolCallParser:
    """Parser that separates the tool calls of one answer from its content.

    The answer arrives in pieces, cut anywhere. `tools` are the tools of the request in OpenAI's format. Their schemas
    help to read faulty arguments.

    The parser emits arguments as they arrive, as far as their meaning is certain. At the first irregularity, it holds
    the rest back until the call ends, and reads the arguments as a whole. Nothing is lost. A call without `call:NAME`
    is content. Arguments that cannot be read with certainty are passed on unchanged, so they are not JSON. The parser
    logs a warning in both cases. If the text ends within a call, the arguments of the call are incomplete.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._schemas = {name: ArgumentSchema(schema) for name, schema in map(_name_and_parameters, tools)}
        self._held = ""
        self._calls = 0
        self._call: _Arguments | None = None
        # True if a call is complete, but its block is not.
        self._in_block = False
        self._unreadable = 0

    @property
    def unreadable(self) -> int:
        """Number of calls whose arguments could not be read and were passed on unchanged."""
        return self._unreadable

    def add(self, text: str, *, is_last: bool = False, is_cut: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """Add text, and return the content and the parts of calls that become certain.

        After the last text, nothing is held back. `is_cut` tells that the model had not finished at the last text. A
        call that is open then stays incomplete.
        """
        self._held += text
        content: list[str] = []
        deltas: list[ToolCallDelta] = []
        while True:
            name: str | None = None
            if self._call is None:
                name = self._take_head(content, is_last, is_cut)
                if self._call is None:
                    return "".join(content), deltas
            arguments, rest = self._call.add(self._held, is_last=is_last, is_cut=is_cut)
            if arguments or name is not None:
                deltas.append(ToolCallDelta(self._calls - 1, name, arguments))
            self._held = rest or ""
            if rest is None:
                return "".join(content), deltas
            self._in_block = self._call.is_block_open
            self._unreadable += not self._call.is_readable
            self._call = None

    def _take_content(self, is_last: bool) -> str:
        """Take the content before the next call."""
        start = self._held.find(CALL_START)
        if start < 0:
            start = len(self._held) - (0 if is_last else beginning_at_end(self._held, CALL_START))
        taken, self._held = self._held[:start], self._held[start:]
        return taken

    def _take_head(self, content: list[str], is_last: bool, is_cut: bool) -> str | None:
        """Take the head of the next call and return the tool's name.

        Return None if the name is not known yet or there is no call. Text that only looks like a call becomes content.
        """
        if not self._in_block:
            content.append(self._take_content(is_last))
        while self._in_block or self._held.startswith(CALL_START):
            start = 0 if self._in_block else len(CALL_START)
            head = _HEAD.match(self._held, start)
            is_whole = head is not None and (head.end() < len(self._held) or (is_last and not is_cut))
            if head is not None and is_whole:
                self._held = self._held[head.end() :]
                self._in_block = False
                return self._begin(head[1])
            marked = beginning_at_end(self._held, CALL_END, CALL_START, STRING_MARK)
            unmarked = self._held[: len(self._held) - marked]
            if len(unmarked) < start or _HEAD_BEGINNING.fullmatch(unmarked, start):
                if is_last and is_cut:
                    # The text was cut off before the name of the tool.
                    self._held = ""
                if not is_last or is_cut:
                    return None
            logger.warning("a tool call without call:NAME{ is passed on as content")
            content.append(self._held[:start])
            self._held = self._held[start:]
            self._in_block = False
            content.append(self._take_content(is_last))
        return None

    def _begin(self, written: str) -> str:
        """Begin a call and return the tool's name, without the namespace before it. Tool names have no colon."""
        name, rest = self._name(written)
        self._held = rest + self._held
        self._call = _Arguments(name, self._schemas.get(name, ANYTHING))
        self._calls += 1
        return name

    def _name(self, written: str) -> tuple[str, str]:
        """Return the tool's name, and the text after it that belongs to the arguments."""
        if written in self._schemas:
            return written, ""
        name, bracket, rest = written.partition("[")
        for found, left in ((written, ""), (name, bracket + rest)):
            whole = found.rstrip(":=")
            bare = whole[1:-1] if len(whole) > 2 and whole[0] == whole[-1] and whole[0] in "\"'`" else whole
            for tool in (whole, bare, bare.rpartition(":")[2]):
                if tool in self._schemas:
                    return tool, left
        unquoted = _QUOTED_NAME.fullmatch(written)
        return unquoted[2] if unquoted else written, ""


class _Open(NamedTuple):
    """Open object or list: its closing bracket, its schema, and the names that are given so far."""

    closer: str
    schema: ArgumentSchema
    given: set[str]


class _Arguments:
    """Incremental conversion of one call's arguments to JSON, from the opening brace on.

    The steps of this class read arguments in Gemma's own syntax. Their output is pending until it is certain. It is
    certain when the next key or string begins, or when the call ends. Any other syntax stops the steps. All arguments
    are then read again when the call has ended.
    """

    def __init__(self, name: str, schema: ArgumentSchema) -> None:
        self._name = name
        self._held = ""
        # These are all of the text so far, its length, the length of its emitted part, and the emitted JSON.
        self._texts: list[str] = []
        self._length = 0
        self._emitted_length = 0
        self._emitted: list[str] = []
        self._pending: list[str] = []
        self._output: list[str] = []
        # True if no more output is certain before the call ends.
        self._is_doubtful = False
        self._open: list[_Open] = []
        # True if the rest of the open string may not belong to it.
        self._is_loose = False
        # This is the last character of the string before the held text.
        self._before = ""
        self._schema = self._root = schema
        self._is_over = False
        # The call may have ended at this offset, at an end mark that may be within a string. The reading has the
        # arguments before it. `_ends` is the number of these end marks.
        self._best_end: tuple[int, Reading | None] | None = None
        self._ends = 0
        self.is_block_open = False
        self.is_readable = True
        # A step takes as much of the held text as possible. It returns False if it needs more text.
        self._step: Callable[[], bool] = self._begin

    def add(self, text: str, *, is_last: bool, is_cut: bool) -> tuple[str, str | None]:
        """Add text. Return JSON to append, and the text after the call; None while the call continues."""
        self._held += text
        self._texts.append(text)
        self._length += len(text)
        while not self._is_over and self._step():
            pass
        if is_last and self._is_loose:
            # The end of the call is within a string that is not closed.
            self._break()
            while not self._is_over and self._step():
                pass
        if is_last and not self._is_over:
            if is_cut:
                self._cut()
            else:
                self._finish()
        taken, self._output = "".join(self._output), []
        return taken, self._held if self._is_over else None

    # Steps

    def _begin(self) -> bool:
        """Begin the arguments. The name of a tool alone is a call without arguments."""
        if not self._held:
            return False
        if self._held.startswith("{"):
            self._take_opener("{", "}", self._first_key)
            self._flush()
        elif self._held.startswith(("(", "[")):
            self._break()
        else:
            self._pending.append("{}")
            self._held = self._held.removeprefix(CALL_END)
            self._flush()
            self._is_over = True
        return True

    def _first_key(self) -> bool:
        self._skip_blanks()
        return self._close() if self._held.startswith("}") else self._key()

    def _key(self) -> bool:
        self._skip_blanks()
        if self._awaits(STRING_MARK):
            return False
        if self._held.startswith(STRING_MARK):
            return self._quoted_key()
        if self._held.startswith(("}", '"', "'")):
            return self._break()
        end = _KEY_END.search(self._held, 0, _LONGEST_NAME)
        if end is None:
            return False if len(self._held) < _LONGEST_NAME else self._break()
        key = self._held[: end.start()].rstrip(BLANKS)
        frame = self._open[-1]
        is_readable = key in frame.schema.names or _READABLE_KEY.fullmatch(key) is not None
        if end[0] == CALL_END or not is_readable or key in frame.given:
            return self._break()
        self._held = self._held[end.end() :]
        return self._named(key, _PLAIN_KEY.fullmatch(key) is not None)

    def _quoted_key(self) -> bool:
        """Read a key between string marks, with its colon."""
        end = self._held.find(STRING_MARK, len(STRING_MARK), _LONGEST_NAME)
        if end < 0 and len(self._held) >= _LONGEST_NAME:
            return self._break()
        rest = "" if end < 0 else self._held[end + len(STRING_MARK) :].lstrip(BLANKS)
        if not rest:
            return False
        if not rest.startswith(":"):
            return self._break()
        key = self._held[len(STRING_MARK) : end]
        if key in self._open[-1].given:
            return self._break()
        self._held = rest[1:]
        return self._named(key, True)

    def _named(self, key: str, is_plain: bool) -> bool:
        """Add the key of a value. The value before it is complete if the key is an expected one."""
        frame = self._open[-1]
        frame.given.add(key)
        is_expected = key in frame.schema.names if frame.schema.names else is_plain
        self._pending.append(json_string(key) + ":")
        self._is_doubtful = self._is_doubtful or not is_expected
        self._schema = frame.schema.member(key)
        self._step = self._value
        self._flush()
        return True

    def _first_value(self) -> bool:
        self._skip_blanks()
        return self._close() if self._held.startswith("]") else self._item()

    def _item(self) -> bool:
        self._schema = self._open[-1].schema.items
        return self._value()

    def _value(self) -> bool:
        self._skip_blanks()
        if not self._held or self._awaits(STRING_MARK):
            return False
        for opener, closer, kind, step in (
            ("{", "}", "object", self._first_key),
            ("[", "]", "array", self._first_value),
            (STRING_MARK, "", "string", self._string),
        ):
            if self._held.startswith(opener):
                if not self._schema.allows(kind):
                    return self._break()
                if closer:
                    return self._take_opener(opener, closer, step)
                self._before = ""
                self._take(opener, '"', step)
                self._flush()
                return True
        return self._bare_value()

    def _bare_value(self) -> bool:
        found = _LITERAL.match(self._held)
        end = 0 if found is None else found.end()
        if end == len(self._held) < _LONGEST_NAME:
            return False
        value = self._held[:end].rstrip(BLANKS)
        kind = literal_type(value)
        is_over = self._held.startswith((",", self._open[-1].closer), end)
        if not is_over or end >= _LONGEST_NAME or kind is None or not self._schema.allows(kind):
            return self._break()
        self._take(self._held[:end], value, self._after_value)
        return True

    def _string(self) -> bool:
        """Take the available text of a string, and close the string at its end mark.

        The end mark may be missing. Until it arrives, text that looks like the end of the arguments or like the next
        key is not certain.
        """
        end = self._held.find(STRING_MARK)
        if not self._is_loose:
            certain = self._certain_length(self._held if end < 0 else self._held[: end + len(STRING_MARK)])
            self._take_text(certain)
            self._flush()
            end -= certain if end >= 0 else 0
        if end >= 0:
            self._take_text(end)
            self._take(STRING_MARK, '"', self._after_value)
            self._is_loose = False
        elif self._is_loose:
            self._take_text(len(self._held) - beginning_at_end(self._held, STRING_MARK))
        return end >= 0

    def _certain_length(self, text: str) -> int:
        """Return the length of the text, up to the string's end mark, that belongs to the string in any case."""
        start = len(self._before)
        text = self._before + text
        uncertain = _UNCERTAIN_END.search(text, start)
        certain = len(text) if uncertain is None else uncertain.start()
        for found in _NEXT_KEY_OR_END.finditer(text, start):
            if found[1] is None or any(found[1] in frame.schema.names.keys() - frame.given for frame in self._open):
                self._is_loose = True
                return min(certain, found.start()) - start
        return certain - start

    def _after_value(self) -> bool:
        self._skip_blanks()
        if self._held.startswith(self._open[-1].closer):
            return self._close()
        if self._held.startswith(","):
            return self._take(",", ",", self._key if self._open[-1].closer == "}" else self._item)
        return self._break() if self._held else False

    def _end(self) -> bool:
        """End a complete call at its end mark or before the next call. A missing end mark then does no harm."""
        self._skip_blanks()
        next_call = NEXT_CALL.match(self._held)
        if self._held.startswith((CALL_END, CALL_START)) or next_call:
            self._held = self._held[next_call.end() :] if next_call else self._held.removeprefix(CALL_END)
            self._is_over = True
            self.is_block_open = next_call is not None
            self._is_doubtful = False
            self._flush()
            return True
        unmarked = self._held[: len(self._held) - beginning_at_end(self._held, CALL_END, CALL_START)]
        return False if _HEAD_BEGINNING.fullmatch(unmarked) else self._break()

    # End of the call

    def _break(self) -> bool:
        """Stop the steps, and search all of the arguments for the end of the call."""
        self._pending = []
        self._is_loose = False
        self._held = "".join(self._texts)
        self._step = self._wait
        return True

    def _wait(self) -> bool:
        """Search for the end of the call. An end mark that seems to be within a string may not be the end."""
        found = _END.search(self._held)
        if found is None:
            self._held = self._held[-len(CALL_END) :]
            return False
        text = "".join(self._texts)
        at = self._length - len(self._held) + found.start()
        first = self._best_end
        is_next_call = found[0] == CALL_START and first is not None and not text[first[0] + len(CALL_END) : at].strip()
        reading = None if is_next_call else self._read(text[:at], is_ended=True)
        is_better = reading is not None and (first is None or first[1] is None or reading.slips < first[1].slips)
        best = (at, reading) if first is None or is_better else first
        if found[0] == CALL_START or self._ends == _MOST_ENDS or not _may_go_on(text[:at], best[1]):
            self._conclude(*best)
        else:
            self._best_end = best
            self._ends += 1
            self._held = self._held[found.end() :]
        return True

    def _finish(self) -> None:
        """Conclude a call that the model did not end before it stopped."""
        text = "".join(self._texts)
        if self._best_end is not None:
            self._conclude(*self._best_end)
        elif not text:
            self._output.append("{}")
            self._is_over = True
        else:
            self._conclude(len(text), self._read(text, is_ended=False))

    def _cut(self) -> None:
        """Emit the rest of a call that the model had no room to finish."""
        if self._best_end is not None:
            self._conclude(*self._best_end)
        elif self._step == self._end:
            # The arguments are complete. The held text may be the start of another call.
            self._output += self._pending
        elif self._step == self._wait:
            self._output.append("".join(self._texts)[self._emitted_length :])
        else:
            is_key = self._step in (self._first_key, self._key) and self._held.startswith(STRING_MARK)
            if is_key:
                self._take(STRING_MARK, '"', self._step)
            is_string = is_key or self._step == self._string
            self._output += [*self._pending, json_string(self._held)[1:-1] if is_string else self._held]
        self._held = ""

    def _read(self, text: str, *, is_ended: bool) -> Reading | None:
        """Return the reading of a text; None if it is not certain or does not begin with the emitted JSON."""
        bracket = _LIST_OF_ONE.match(text)
        if bracket is not None:
            # The arguments are in a list.
            text = text[bracket.end() :]
            inner = text.rstrip(BLANKS)
            text = inner.removesuffix("]") + " " * (len(text) - len(inner) + inner.endswith("]"))
        if not text.startswith(("{", "(")):
            return None
        reading = read_arguments(text, self._root, is_ended=is_ended)
        if reading is not None and bracket is not None:
            reading = reading._replace(end=reading.end + bracket.end(), slips=reading.slips + 1)
        return reading if reading and reading.arguments.startswith("".join(self._emitted)) else None

    def _conclude(self, at: int, reading: Reading | None) -> None:
        """Emit the rest of the reading up to the offset `at`, or the rest of the text if it is not readable."""
        text, emitted = "".join(self._texts), "".join(self._emitted)
        if reading is not None:
            logger.info("a call of %s is read with %d slips in its syntax", self._name, reading.slips)
            self._output.append(reading.arguments[len(emitted) :])
            self.is_block_open = reading.end < at
            at = reading.end
        else:
            logger.warning("a call of %s cannot be read: its arguments are passed on as they are", self._name)
            rest = text[self._emitted_length : at]
            # Arguments that could not be read with certainty must not look like JSON.
            self._output.append(rest + CALL_END if is_json(emitted + rest) else rest)
            self.is_readable = False
        self._held = text[at:].removeprefix(CALL_END)
        self._is_over = True

    # Text

    def _take_opener(self, opener: str, closer: str, step: Callable[[], bool]) -> bool:
        self._open.append(_Open(closer, self._schema, set()))
        return self._take(opener, opener, step)

    def _close(self) -> bool:
        closer = self._open.pop().closer
        return self._take(closer, closer, self._after_value if self._open else self._end)

    def _take_text(self, length: int) -> None:
        """Take `length` characters of a string's text."""
        text = self._held[:length]
        self._before = text[-1:] or self._before
        self._take(text, json_string(text)[1:-1], self._step)

    def _take(self, mark: str, json: str, step: Callable[[], bool]) -> bool:
        """Take `mark` from the held text, and add `json` to the pending output."""
        self._held = self._held[len(mark) :]
        self._pending.append(json)
        self._step = step
        return True

    def _flush(self) -> None:
        """Emit the pending output, because it is certain, unless the call is in doubt."""
        if not self._is_doubtful:
            self._output += self._pending
            self._emitted += self._pending
            self._pending = []
            self._emitted_length = self._length - len(self._held)

    def _skip_blanks(self) -> None:
        self._held = self._held.lstrip(BLANKS)

    def _awaits(self, mark: str) -> bool:
        """Return whether the held text may become this mark."""
        return len(self._held) < len(mark) and mark.startswith(self._held)


def _may_go_on(text: str, reading: Reading | None) -> bool:
    """Return whether the end mark after these arguments may be text of a string, because of their slips."""
    return (reading is None or reading.slips > 0) and _QUOTE.search(text) is not None


def _name_and_parameters(tool: Mapping[str, Any]) -> tuple[str, Any]:
    function = tool["function"]
    return function["name"], function.get("parameters")
