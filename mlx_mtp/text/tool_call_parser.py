"""Tool calls as Gemma 4 writes them, read from the answer as it comes.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3,o:{},l:[true,null]}<tool_call|>`: bare keys, strings between
marks of their own and without escapes. Arguments that are written otherwise are read by `tool_call_repair`.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .argument_schema import ANYTHING, ArgumentSchema
from .call_syntax import BLANKS, CALL_END, CALL_START, STRING_MARK, beginning_at_end, is_json, json_string, literal_type
from .tool_call_repair import NEXT_CALL, Reading, read_arguments

logger = logging.getLogger(__name__)

# What must follow `<|tool_call>`, or a call in the same block, and every beginning of it.
_END = re.compile(rf"{re.escape(CALL_END)}|{re.escape(CALL_START)}")
_MARK = f"(?:{re.escape(STRING_MARK)})?"
# Bounded, so that a long text is not looked through again and again.
_GAP = r"[ \t\r\n]{0,256}"
_NAME = rf"{_GAP}{_MARK}([^\s{{}}<>()]{{1,256}})"
_HEAD = re.compile(rf"[ \t\r\n,;]{{0,256}}call:{_NAME}{_MARK}{_GAP}(?=[{{(]|{_END.pattern}|\Z)")
_HEAD_BEGINNING = re.compile(rf"[ \t\r\n,;]{{0,256}}(?:c|ca|cal|call|call:(?:{_NAME}{_MARK}{_GAP}|{_GAP}{_MARK}))?")
_QUOTED_NAME = re.compile(r"([\"'`])([\w.:-]+)\1")
# Arguments in a list, which is none of them.
_LIST_OF_ONE = re.compile(r"\[[ \t\r\n]*(?=\{)")
# So many marks of an end may be within the strings of one call.
_MOST_ENDS = 8
_QUOTE = re.compile(rf"{re.escape(STRING_MARK)}|[\"']")
# Where a bare key ends.
# Longer keys and literals are left to the end of the call, so that they are not looked through again and again.
_LONGEST_NAME = 512
_LITERAL = re.compile(r"(?:[a-z]{1,5}|[0-9.eE+-]*)[ \t\r\n]*")
_KEY_END = re.compile(f":|{re.escape(CALL_END)}")
# A key behind which the value before is over, whatever follows.
_PLAIN_KEY = re.compile(r"[\w$@./-]+")
# A key that is one without the schema. Other ones may begin with a comma too many, or be something else.
_READABLE_KEY = re.compile(r"[\w$@./-]+(?: +[\w$@./-]+)*")
# What may yet turn out not to belong to a string, if its mark is missing: braces, the next key, the end of the call.
# All of it is bounded, so that a long text is not looked through again and again.
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
    """What became known of one call.

    `index` is that of the call within the answer; `name` is in its first delta only; `arguments` is to be appended to
    the call's arguments, the text of a JSON object.
    """

    index: int  # type: ignore[assignment]  # A tuple has a method of this name, which nothing here needs.
    name: str | None
    arguments: str


class ToolCallParser:
    """Separates the calls from the content of one answer, which comes in pieces cut anywhere.

    `tools` are those of the request, as OpenAI has them: their schemas help to read what is written badly. Arguments
    are emitted as they come, as far as their meaning is certain; from the first odd thing on, they are held back until
    the call ends, and read as a whole. Nothing is lost: a call without `call:NAME` is content, and arguments that
    cannot be read for certain go on as the model wrote them, so that they are no JSON. Both are warned of. The
    arguments of a call that the end of the text cuts off are incomplete.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._schemas = {name: ArgumentSchema(schema) for name, schema in map(_name_and_parameters, tools)}
        self._held = ""
        self._calls = 0
        self._call: _Arguments | None = None
        # Whether a call is over and its block is not.
        self._in_block = False
        self._unreadable = 0

    @property
    def unreadable(self) -> int:
        """How many calls had arguments that could not be read, and were passed on as they were written."""
        return self._unreadable

    def add(self, text: str, *, is_last: bool = False, is_cut: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """The content and the parts of calls that this text makes known; after the last one, nothing is held back.

        `is_cut` says of the last text that the model had not finished: a call that is open is not finished for it.
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
        """What comes before the next call."""
        start = self._held.find(CALL_START)
        if start < 0:
            start = len(self._held) - (0 if is_last else beginning_at_end(self._held, CALL_START))
        taken, self._held = self._held[:start], self._held[start:]
        return taken

    def _take_head(self, content: list[str], is_last: bool, is_cut: bool) -> str | None:
        """The name of the call that is begun here; None if it is not known yet, or if there is no call.

        What only looks like a call is added to the content.
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
                    # The model had no room to name the tool.
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
        """Begin a call; gives the tool's name, without a namespace before it: names of tools have no colon."""
        name, rest = self._name(written)
        self._held = rest + self._held
        self._call = _Arguments(name, self._schemas.get(name, ANYTHING))
        self._calls += 1
        return name

    def _name(self, written: str) -> tuple[str, str]:
        """The tool's name, and what is written behind it and belongs to the arguments."""
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
    """An object or a list that is open: what closes it, its schema, and the names that are given."""

    closer: str
    schema: ArgumentSchema
    given: set[str]


class _Arguments:
    """Makes JSON of one call's arguments, from the brace on, as they come.

    As long as they are in Gemma's own syntax, the steps here read them. What they make is pending until it is certain:
    when the next key or string begins, or the call ends. What is not in this syntax breaks off the steps, and all of
    the arguments are read again when the call has ended.
    """

    def __init__(self, name: str, schema: ArgumentSchema) -> None:
        self._name = name
        self._held = ""
        # All of the text so far, and how much of it is emitted as what.
        self._texts: list[str] = []
        self._length = 0
        self._emitted_length = 0
        self._emitted: list[str] = []
        self._pending: list[str] = []
        self._output: list[str] = []
        # Whether nothing more is certain before the call ends.
        self._is_doubtful = False
        self._open: list[_Open] = []
        # Whether the rest of the string that is open may not belong to it.
        self._is_loose = False
        # The last character of its text before the held one.
        self._before = ""
        self._schema = self._root = schema
        self._is_over = False
        # Where the call may have ended, by the mark of an end that may be within a string, with the arguments up to
        # there; and how many such marks there are.
        self._best_end: tuple[int, Reading | None] | None = None
        self._ends = 0
        self.is_block_open = False
        self.is_readable = True
        # A step takes what it can from the held text; False if it needs more.
        self._step: Callable[[], bool] = self._begin

    def add(self, text: str, *, is_last: bool, is_cut: bool) -> tuple[str, str | None]:
        """JSON to append, and the text after the call, None as long as the call goes on."""
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
        """The bare name of a tool is a call without arguments."""
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
        """A key between marks, with its colon."""
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
        """The key of a value: what is before it is over, if it is a key that can be expected."""
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
        """Take what is there of a string, and close it at its mark.

        As long as its mark may be missing, what looks like the end of the arguments, or like the next of them, is not
        certain.
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
        """How much of a string's text, up to its mark, belongs to it whatever follows."""
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
        """All of the call is there, so that one without its end does no harm to the next."""
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

    # Steps back

    def _break(self) -> bool:
        """Give up these steps: all of the arguments is looked through for the end of the call."""
        self._pending = []
        self._is_loose = False
        self._held = "".join(self._texts)
        self._step = self._wait
        return True

    def _wait(self) -> bool:
        """Look for the end of the call; one that seems to be within a string may not be it."""
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
        """The model stopped before it ended the call."""
        text = "".join(self._texts)
        if self._best_end is not None:
            self._conclude(*self._best_end)
        elif not text:
            self._output.append("{}")
            self._is_over = True
        else:
            self._conclude(len(text), self._read(text, is_ended=False))

    def _cut(self) -> None:
        """The model had no room to finish the call."""
        if self._best_end is not None:
            self._conclude(*self._best_end)
        elif self._step == self._end:
            # The arguments are there, and maybe the beginning of another call.
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
        """The arguments in this text, if they are certain and begin with what is emitted."""
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
        """Emit the rest of what was read up to this place, or the rest of the text if it is not readable."""
        text, emitted = "".join(self._texts), "".join(self._emitted)
        if reading is not None:
            logger.info("a call of %s is read with %d slips in its syntax", self._name, reading.slips)
            self._output.append(reading.arguments[len(emitted) :])
            self.is_block_open = reading.end < at
            at = reading.end
        else:
            logger.warning("a call of %s cannot be read: its arguments are passed on as they are", self._name)
            rest = text[self._emitted_length : at]
            # What nobody could read for certain must not look as if it were.
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
        """Take text of a string."""
        text = self._held[:length]
        self._before = text[-1:] or self._before
        self._take(text, json_string(text)[1:-1], self._step)

    def _take(self, mark: str, json: str, step: Callable[[], bool]) -> bool:
        """Take this from the held text, for which the JSON is pending."""
        self._held = self._held[len(mark) :]
        self._pending.append(json)
        self._step = step
        return True

    def _flush(self) -> None:
        """Emit what is pending: it is certain."""
        if not self._is_doubtful:
            self._output += self._pending
            self._emitted += self._pending
            self._pending = []
            self._emitted_length = self._length - len(self._held)

    def _skip_blanks(self) -> None:
        self._held = self._held.lstrip(BLANKS)

    def _awaits(self, mark: str) -> bool:
        """Whether the held text may yet become this mark."""
        return len(self._held) < len(mark) and mark.startswith(self._held)


def _may_go_on(text: str, reading: Reading | None) -> bool:
    """Whether the mark of an end behind these arguments may be text of a string, as they are read with slips."""
    return (reading is None or reading.slips > 0) and _QUOTE.search(text) is not None


def _name_and_parameters(tool: Mapping[str, Any]) -> tuple[str, Any]:
    function = tool["function"]
    return function["name"], function.get("parameters")
