"""Reader of tool call arguments that are not in Gemma's own syntax.

The quotes, the words and the call form of JSON and Python are read without a penalty. The reader also tolerates slips:
a missing or extra mark, comma or brace, string marks in place of quotes, and text without quotes. The reading with the
fewest slips is the result. If two readings share the fewest slips, there is no result, because a wrong command could
follow from it.
"""

import heapq
import re
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from .argument_schema import ANYTHING, ArgumentSchema
from .call_syntax import BLANKS, STRING_MARK, bare_value, json_string, literal_type, python_text, quoted_value, unescape

# Arguments that take more steps are not read. A search through _STEP_LENGTH characters is one step.
_MOST_STEPS = 20_000
_STEP_LENGTH = 2_000
# One step is also this number of characters with escapes, or this number of places where text may end.
_ESCAPED_STEP_LENGTH = 200
_STEP_PLACES = 8
# With more missing or extra commas and braces, any text could be read in some way.
_MOST_FAULTS = 2
_LONGEST_KEY = 64
# This number of marks in a row, or more, has no meaning.
_MOST_MARKS = 4
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_QUOTES = ('"""', "'''", '"', "'")
_BLANK = re.compile(r"[ \t\r\n]*")
_SEPARATOR = re.compile(r"[ \t\r\n]*([:=])(?![=]|//)")
_KEY = re.compile(r"[\w$@./-]+")
_SPACED_KEY = re.compile(r"[\w$@./-]+(?: +[\w$@./-]+)+")
_LITERAL = re.compile(r"(?:[A-Za-z]+|[+-]?[0-9.][0-9._eE+-]*)(?=[ \t\r\n]*(?:[,}\])]|\Z))")
_PYTHON_STRING = re.compile("(?i:(br?|fr?|rb?|rf|u)(\"\"\"|'''|\"|'))")
# This text follows a quote that ends its string. A string with quotes inside does not continue with it.
_AFTER_QUOTE = re.compile(r"[ \t\r\n]*(?:[,:}\]+\"'`]|\Z)")
# This may follow a value in an object, in place of the closing bracket.
_NEXT_KEY = re.compile(r",[ \t\r\n]*([\w$@./-]+)[ \t\r\n]*[:=](?![=]|//)")
# This is the next key, possibly in quotes, after text that may end before a brace.
_SECOND_KEY = re.compile(r"[ \t\r\n}\])]*,[ \t\r\n]*(?:<\|\"\|>|[\"'])?([\w$@./-]*)")
_OPENS_VALUE = re.compile(r",[ \t\r\n]*[\w$@./-]{1,64}[ \t\r\n]*[:=][ \t\r\n]*\Z")
# The last comma is an extra comma, or the first character of a text whose mark is missing.
_SPARE_COMMA = re.compile(r"[\[,][ \t\r\n]*,[ \t\r\n]*\Z")
_NOT_IN_PYTHON_WORDS = re.compile(r"[()\[\]{}\"'`+*%=]")
_NEXT_ITEM = re.compile(r",[ \t\r\n]*(?=<\|\"\|>|[\"'{\[])")
_INNER_BLANK = re.compile(r"[^ \t\r\n][ \t\r\n]+[^ \t\r\n]")
_PLAIN = re.compile(r"[^,{}\[\]()\"]*")
NEXT_CALL = re.compile(r"[ \t\r\n,;]*(?=call:[ \t\r\n]*[^\s{}<>()]+[ \t\r\n]*[{(])")


class Reading(NamedTuple):
    """Arguments as JSON, the offset of their end in the text, and the number of slips in them."""

    arguments: str
    end: int
    slips: int


class _Frame(NamedTuple):
    """Open object or list: its closing bracket, its schema, its parent, and the names that are given so far."""

    closer: str
    schema: ArgumentSchema
    parent: "_Frame | None"
    given: frozenset[str] = frozenset()
    is_empty: bool = True

    @property
    def is_list(self) -> bool:
        """True for a list, false for an object or a call in parentheses."""
        return self.closer == "]"


class _Text(NamedTuple):
    """String within the arguments, with its quote, which is empty if it has no quotes."""

    start: int
    end: int
    quote: str
    schema: ArgumentSchema


class _Output(NamedTuple):
    """JSON so far, as a linked list that starts with its last part."""

    part: "str | _Text"
    before: "_Output | None"


class _State(NamedTuple):
    """State of a reading.

    `step` tells the expected element: a key, a value, the end of a string, or the text after a value. `note` tells the
    element before it: "," before a key or an item, the quote of an open string, or "closed" after a value that cannot
    continue.
    """

    step: str
    at: int
    frame: _Frame | None
    out: _Output | None
    note: str = ""
    schema: ArgumentSchema = ANYTHING
    # These are the offset where the string begins, and the number of quotes inside it.
    start: int = 0
    quotes: int = 0
    # This is the number of missing or extra commas and braces in the whole reading.
    faults: int = 0
    # True if a part of the reading is not certain. If this is the best reading, there is no result.
    is_doubtful: bool = False

    def to(self, step: str, at: int, frame: _Frame | None, out: _Output | None, faults: int = 0) -> "_State":
        """Return the next state, with `faults` more faults."""
        return _State(step, at, frame, out, faults=self.faults + faults, is_doubtful=self.is_doubtful)

    def doubted(self, is_doubtful: bool = True) -> "_State":
        """Return this state, with one more doubt if `is_doubtful`."""
        return self._replace(is_doubtful=self.is_doubtful or is_doubtful)


_Steps = Iterator[tuple[int, _State]]


def read_arguments(text: str, schema: ArgumentSchema, *, is_ended: bool) -> Reading | None:
    """Read the arguments of one call, from the opening brace or parenthesis on.

    `is_ended` tells that the end mark of a call follows the text. Otherwise, the model just stopped. Return None if the
    reading is not certain.
    """
    return _Reader(text, schema, is_ended).read()


class _Reader:
    """Search for the reading with the fewest slips."""

    def __init__(self, text: str, schema: ArgumentSchema, is_ended: bool) -> None:
        self._text = text
        self._is_ended = is_ended
        self._is_python = text.startswith("(")
        self._steps_left = _MOST_STEPS
        self._root = _Frame(_CLOSERS[text[0]], schema, None)

    def read(self) -> Reading | None:
        """Return the only reading with the fewest slips; None if there is no single certain one."""
        ticks = count()
        waiting = [(0, next(ticks), _State("key", 1, self._root, _Output("{", None)))]
        best: Reading | None = None
        is_doubtful = False
        while self._steps_left > 0:
            if not waiting or (best is not None and waiting[0][0] > best.slips):
                return None if is_doubtful else best
            self._steps_left -= 1
            slips, _, state = heapq.heappop(waiting)
            if state.step == "end":
                found = Reading(self._render(state.out), state.at, slips)
                if best is not None and (found.arguments, found.end) != (best.arguments, best.end):
                    return None
                is_doubtful = state.is_doubtful and (best is None or is_doubtful)
                best = found
                continue
            for more, following in self._follow(state):
                if following.faults <= _MOST_FAULTS:
                    heapq.heappush(waiting, (slips + more, next(ticks), following))
        return None

    def _follow(self, state: _State) -> _Steps:
        steps = {"key": self._key, "value": self._value, "string": self._string, "bare": self._bare}
        return steps.get(state.step, self._after)(state)

    # Keys

    def _key(self, state: _State) -> _Steps:
        at = self._skip(state.at)
        frame = state.frame
        assert frame is not None
        if self._is_at_closer(at):
            # The text after a value closes the object.
            is_trailing = state.note == ","
            yield int(is_trailing), state.to("after", at, frame, state.out)
        elif at == len(self._text):
            return
        elif self._text[at] in ",;":
            yield from self._comma(state, frame, at)
        elif self._text[at] == "{" and frame.parent is None and frame.is_empty:
            # This brace is extra.
            yield 1, state._replace(at=at + 1, faults=state.faults + 1)
        else:
            for slips, name, end in self._names(at, frame):
                separator = _SEPARATOR.match(self._text, end)
                assert separator is not None
                slips += separator[1] == "=" and not (self._is_python and frame.parent is None)
                out = _Output(("" if frame.is_empty else ",") + json_string(name) + ":", state.out)
                inner = frame._replace(given=frame.given | {name}, is_empty=False)
                schema = frame.schema.member(name)
                following = state.to("value", separator.end(), inner, out)._replace(schema=schema)
                # If a name has two values, it is not known which value is meant.
                yield slips + 2 * (name in frame.given), following.doubted(name in frame.given)

    def _comma(self, state: _State, frame: _Frame, at: int) -> _Steps:
        """Skip an extra comma, or close an empty object or list whose closing bracket is missing."""
        yield 1, state._replace(at=at + 1, faults=state.faults + 1)
        if frame.is_empty and frame.parent is not None:
            yield 1 + self._missing(frame), self._pop(state, frame, at, 1)

    def _names(self, at: int, frame: _Frame) -> Iterator[tuple[int, str, int]]:
        """Yield the slips, the name and the end of each key that may be here, with a separator after it."""
        for quote in (STRING_MARK, '"', "'"):
            if self._text.startswith(quote, at):
                start = at + len(quote)
                end = self._find(quote, start)
                name = None if end is None else self._text[start:end]
                if name is not None and quote != STRING_MARK:
                    name = unescape(name, quote)
                if end is not None and name is not None and _SEPARATOR.match(self._text, end + len(quote)):
                    yield self._slips_of(name, frame), name, end + len(quote)
                return
        for name in frame.schema.names:
            end = at + len(name)
            is_odd = not _KEY.fullmatch(name)
            if is_odd and name and self._text.startswith(name, at) and _SEPARATOR.match(self._text, end):
                yield self._slips_of(name, frame), name, end
                return
        for pattern in (_KEY, _SPACED_KEY):
            found = pattern.match(self._text, at)
            if found and _SEPARATOR.match(self._text, found.end()):
                is_odd = pattern is _SPACED_KEY
                yield self._slips_of(found[0], frame) + is_odd, found[0], found.end()
                return

    def _slips_of(self, name: str, frame: _Frame) -> int:
        return int(bool(frame.schema.names) and name not in frame.schema.names)

    # Values

    def _value(self, state: _State) -> _Steps:
        at = self._skip(state.at)
        frame = state.frame
        assert frame is not None
        if at == len(self._text):
            return
        prefixed = _PYTHON_STRING.match(self._text, at)
        if self._text.startswith(STRING_MARK, at):
            yield from self._open_mark(state, at + len(STRING_MARK))
            if at > state.at:
                yield 0, state._replace(step="bare", start=state.at)
        elif prefixed is not None:
            yield from self._python_string(state, prefixed)
        elif self._text[at] in "\"'`":
            for quote in _QUOTES:
                if self._text.startswith(quote, at):
                    start = at + len(quote)
                    yield 0, state._replace(step="string", at=start, start=start, note=quote)
            yield from self._text_at(state.doubted(), at)
        elif self._text[at] in "{[":
            yield from self._structure(state, frame, at)
        else:
            literal = _LITERAL.match(self._text, at)
            if literal is not None:
                yield from self._literal(state, literal[0], literal.end())
            yield from self._text_at(state, at)

    def _structure(self, state: _State, frame: _Frame, at: int) -> _Steps:
        """Read an object or a list, or text if the schema wants a string in its place."""
        opener = self._text[at]
        is_allowed = state.schema.allows("object" if opener == "{" else "array")
        wants_text = not is_allowed and state.schema.allows("string")
        inner = _Frame(_CLOSERS[opener], state.schema, frame)
        step = "key" if opener == "{" else "item"
        yield int(not is_allowed), state.to(step, at + 1, inner, _Output(opener, state.out)).doubted(wants_text)
        yield from self._text_at(state.doubted(not wants_text), at)

    def _text_at(self, state: _State, at: int) -> _Steps:
        """Read text without quotes."""
        yield 0, state._replace(step="bare", at=at, start=at)
        if at > state.at:
            # Blanks may belong to the text.
            yield 0, state._replace(step="bare", start=state.at)

    def _python_string(self, state: _State, opening: "re.Match[str]") -> _Steps:
        """Read a Python string with a prefix such as r. Nothing else begins like it."""
        start, quote = opening.end(), opening[2]
        end = self._find(quote, start)
        text = None if end is None else python_text(opening[1], self._text[start:end], quote)
        if end is not None and text is not None:
            value = quoted_value(text, state.schema)
            after = end + len(quote)
            yield self._mismatch(value, state.schema), self._after_value(state, after, _Output(value, state.out))

    def _open_mark(self, state: _State, start: int) -> _Steps:
        string = state._replace(step="string", at=start, start=start, note=STRING_MARK)
        yield 0, string
        after = start + len(STRING_MARK)
        if self._text.startswith(STRING_MARK * 2, start):
            # This is an empty string with one extra mark, or a string that holds one quote.
            for end in (start, after):
                yield from self._closed(string, end, after + len(STRING_MARK), 1)
        elif self._text.startswith(STRING_MARK, start):
            yield from self._close_doubled(string, after)

    def _close_doubled(self, string: _State, start: int) -> _Steps:
        """Close a string between marks if its first mark is doubled, and perhaps also its last mark."""
        end = self._find(STRING_MARK, start)
        if end is None or end == start:
            return
        after = end + len(STRING_MARK)
        yield from self._closed(string._replace(start=start), end, after, 1)
        if self._text.startswith(STRING_MARK, after):
            yield from self._closed(string._replace(start=start), end, after + len(STRING_MARK), 1)

    def _literal(self, state: _State, text: str, end: int) -> _Steps:
        found = bare_value(text, state.schema)
        if found.startswith('"') and literal_type({"True": "true", "False": "false"}.get(text, text)) is None:
            return
        yield self._mismatch(found, state.schema), self._after_value(state, end, _Output(found, state.out))

    def _mismatch(self, value: str, schema: ArgumentSchema) -> int:
        kind = "string" if value.startswith('"') else literal_type(value)
        return int(kind is not None and not schema.allows(kind))

    def _after_value(self, state: _State, at: int, out: _Output, note: str = "") -> _State:
        return state.to("after", at, state.frame, out)._replace(note=note)

    # Strings

    def _string(self, state: _State) -> _Steps:
        """Close a string at its next quote or at a later quote, or read it as not closed."""
        quote, text = state.note, self._text
        end = self._find(quote, state.at)
        if quote == STRING_MARK and not state.quotes:
            yield from self._unclosed(state, len(text) if end is None else end)
        if end is None:
            return
        if not self._is_certain(state, end):
            yield 0, self._after_value(state.doubted(), end + len(quote), _Output("null", state.out))
            return
        after = end + len(quote)
        if self._has_clear_edges(state, end):
            yield from self._closed(state, end, after, 2 * (state.quotes % 2))
        if quote == STRING_MARK and not state.quotes and text.startswith(quote, after) and end > state.start:
            yield from self._closed(state, end, after + len(quote), 1)
        # Quotes inside a string come in pairs. Each pair is one slip, which counts at the second quote.
        slips = state.quotes % 2 + self._looks_closed(state, after)
        following = state._replace(at=after, quotes=state.quotes + 1)
        yield slips, following.doubted(not self._may_go_on(state, after))

    def _is_certain(self, state: _State, end: int) -> bool:
        """Return whether the escapes of a string up to `end` have one clear meaning.

        If they have not, more text would give them another meaning.
        """
        if state.note == STRING_MARK or self._text.find("\\", state.start, end) < 0:
            return True
        self._steps_left -= (end - state.start) // _ESCAPED_STEP_LENGTH
        return unescape(self._text[state.start : end], state.note) is not None

    def _may_go_on(self, state: _State, after: int) -> bool:
        """Return whether a string may continue after one of its quotes."""
        if state.note != STRING_MARK:
            return not self._is_python and _AFTER_QUOTE.match(self._text, after) is None
        # The string ends here if the next key is given already, for example the key of this string.
        found = _NEXT_KEY.match(self._text, after)
        return found is None or state.frame is None or state.frame.is_list or found[1] not in state.frame.given

    def _closed(self, state: _State, end: int, after: int, slips: int = 0) -> _Steps:
        """Yield the state after a string that ends at `end`. The text after the string begins at `after`."""
        found = _Text(state.start, end, state.note, state.schema)
        has_escapes = state.note != STRING_MARK and self._text.find("\\", state.start, end) >= 0
        if has_escapes or not state.schema.allows("string"):
            value = self._json(found)
            if value is None:
                return
            slips += self._mismatch(value, state.schema)
        yield slips, self._after_value(state, after, _Output(found, state.out), "closed")

    def _has_clear_edges(self, state: _State, end: int) -> bool:
        """Return whether marks at the edges of a string clearly belong to its text.

        The meaning of two marks at an edge is not known. One mark at each edge only doubles the string's own marks.
        """
        mark, text = STRING_MARK, self._text
        if state.note != mark or not state.quotes:
            return True
        first = last = 0
        while first < _MOST_MARKS and text.startswith(mark, state.start + first * len(mark), end):
            first += 1
        while last < _MOST_MARKS and text.endswith(mark, state.start, end - last * len(mark)):
            last += 1
        is_doubled = state.quotes == 2 and first == last == 1
        is_all = first * len(mark) == end - state.start
        if is_all and first == 2 and state.frame and state.frame.is_list:
            return True
        return not is_doubled and not is_all and {first, last} <= {0, 1, 3}

    def _looks_closed(self, state: _State, after: int) -> int:
        """Return 1 if the next key of the object follows a mark, so that the string hardly continues; else 0."""
        frame = state.frame
        if state.note != STRING_MARK or frame is None or frame.is_list:
            return 0
        at = self._skip(after)
        found = _KEY.match(self._text, at)
        separator = found and _SEPARATOR.match(self._text, found.end())
        if not found or not separator or found[0] in frame.given:
            return 0
        if frame.schema.names:
            return int(found[0] in frame.schema.names)
        return int(self._text.startswith(STRING_MARK, self._skip(separator.end())))

    def _unclosed(self, state: _State, limit: int) -> _Steps:
        """Close a string without an end mark before the next key, or before the closing brackets."""
        for end, slips in self._ends(state, limit):
            yield from self._closed(state, end, end, 1 + slips)
            if self._text[end - 1] in "\"'" and end > state.start:
                # The quote may stand for the mark.
                yield from self._closed(state, end - 1, end, 1 + slips)

    def _bare(self, state: _State) -> _Steps:
        """Read text without a start mark. The text ends at a mark, or has no marks."""
        mark = self._find(STRING_MARK, state.at)
        if mark is not None:
            after = mark + len(STRING_MARK)
            swallowed = self._swallowed(state, state.at, mark)
            opens_value = _OPENS_VALUE.search(self._text[max(state.start, mark - 2 * _LONGEST_KEY) : mark])
            spare_comma = _SPARE_COMMA.search(self._text[max(0, state.start - _LONGEST_KEY) : state.start])
            if state.quotes % 2 == 0:
                closed = state._replace(note=STRING_MARK).doubted(bool(opens_value or spare_comma))
                yield from self._closed(closed, mark, after, 1 + swallowed)
            yield state.quotes % 2 + swallowed, state._replace(at=after, quotes=state.quotes + 1)
        if not state.quotes and self._text[state.start] not in "{[(\"'`)]}, \t\r\n":
            yield from self._words(state, len(self._text) if mark is None else mark)

    def _words(self, state: _State, limit: int) -> _Steps:
        """Read text without marks. It may hold commas and braces only if the schema wants a string."""
        assert state.frame is not None
        ends = [self._text.find(mark, state.start, limit) for mark in (",", state.frame.closer)]
        simple = min((end for end in ends if end >= 0), default=-1)
        if simple > state.start and '"' not in self._text[state.start : simple]:
            yield from self._word(state, simple, 1)
        wants_text = state.schema.types is not None and state.schema.allows("string") and not state.frame.is_list
        for end, slips in self._ends(state, limit):
            if self._steps_left <= 0:
                return
            if end != simple and end > state.start:
                is_plain = _PLAIN.fullmatch(self._text, state.start, end) is not None
                if wants_text or is_plain:
                    yield from self._word(state, end, 2 - is_plain + slips)

    def _is_split(self, state: _State, end: int) -> bool:
        """Return whether text with blanks would end at a comma that no known key follows."""
        assert state.frame is not None
        following = _SECOND_KEY.match(self._text, end)
        if following is None or state.frame.is_list or self._is_known(following[1], state.frame):
            return False
        return _INNER_BLANK.search(self._text, state.start, end) is not None

    def _word(self, state: _State, end: int, slips: int) -> _Steps:
        self._steps_left -= (end - state.start) // _STEP_LENGTH
        text = self._text[state.start : end].rstrip(BLANKS)
        value = bare_value(text, state.schema)
        if value.startswith('"'):
            is_expression = self._is_python and _NOT_IN_PYTHON_WORDS.search(text) is not None
            is_wanted = state.schema.allows("string")
            following = self._after_value(state, end, _Output(value, state.out))
            yield (
                slips + (not is_wanted),
                following.doubted(is_expression or not is_wanted or self._is_split(state, end)),
            )

    def _ends(self, state: _State, limit: int) -> Iterator[tuple[int, int]]:
        """Yield each place before `limit` where unclosed text may end, and the number of known keys before it."""
        assert state.frame is not None
        self._steps_left -= (limit - state.start) // _STEP_LENGTH
        places = [(found.start(), self._is_known(found[1], state.frame)) for found in self._next_keys(state, limit)]
        if self._is_in_list(state.frame):
            most = min(len(self._text), limit + len(STRING_MARK))
            items = _NEXT_ITEM.finditer(self._text, state.start, most)
            places += [(item.start(), False) for item in items if item.end() <= limit]
        if limit == len(self._text):
            places.append((limit, False))
        self._steps_left -= len(places) // _STEP_PLACES
        swallowed = 0
        for place, is_known in sorted(places):
            for end in self._before_closers(state.start, place):
                if end < len(self._text) or self._is_ended:
                    yield end, swallowed
            swallowed += is_known

    def _next_keys(self, state: _State, limit: int) -> "Iterator[re.Match[str]]":
        return _NEXT_KEY.finditer(self._text, state.start, limit)

    def _before_closers(self, start: int, at: int) -> Iterator[int]:
        """Yield this offset, and the offset of each closing bracket in the row of brackets before it."""
        yield at
        while at > start and self._text[at - 1] in "}]) \t\r\n":
            at -= 1
            if self._text[at] in "}])":
                yield at

    def _swallowed(self, state: _State, start: int, end: int) -> int:
        assert state.frame is not None
        found = _NEXT_KEY.finditer(self._text, start, end)
        return sum(self._is_known(match[1], state.frame) for match in found)

    def _is_in_list(self, frame: _Frame) -> bool:
        outer: _Frame | None = frame
        while outer is not None and not outer.is_list:
            outer = outer.parent
        return outer is not None

    def _is_known(self, name: str, frame: _Frame) -> bool:
        """Return whether an open object has a property of this name that is not given yet."""
        outer: _Frame | None = frame
        while outer is not None:
            if name in outer.schema.names and name not in outer.given:
                return True
            outer = outer.parent
        return False

    # What follows a value

    def _item(self, state: _State) -> _Steps:
        at = self._skip(state.at)
        frame = state.frame
        assert frame is not None
        if self._is_at_closer(at):
            is_trailing = state.note == ","
            yield int(is_trailing), state.to("after", at, frame, state.out)
        elif at < len(self._text) and self._text[at] == ",":
            yield from self._comma(state, frame, at)
        out = state.out if frame.is_empty else _Output(",", state.out)
        inner = frame._replace(is_empty=False)
        yield 0, state.to("value", state.at, inner, out)._replace(schema=frame.schema.items)

    def _after(self, state: _State) -> _Steps:
        if state.step == "item":
            yield from self._item(state)
            return
        at = self._skip(state.at)
        frame = state.frame
        if frame is None:
            yield from self._after_all(state, at)
        elif at == len(self._text):
            yield 1 + self._missing(frame), self._pop(state, frame, at, 1)
        elif self._text[at] in "}])":
            yield from self._closer(state, frame, at)
        else:
            yield from self._next(state, frame, at)

    def _after_all(self, state: _State, at: int) -> _Steps:
        found = NEXT_CALL.match(self._text, at)
        if at == len(self._text) or found:
            end = at if found is None else found.end()
            yield 0, state._replace(step="end", at=end)
        elif self._text[at] in "}])":
            yield 1, state._replace(at=at + 1, faults=state.faults + 1)

    def _closer(self, state: _State, frame: _Frame, at: int) -> _Steps:
        if self._text[at] == frame.closer:
            yield self._missing(frame), self._pop(state, frame, at + 1)
        elif frame.parent is not None:
            yield 1 + self._missing(frame), self._pop(state, frame, at, 1)
        # This bracket is extra.
        yield 1, state.to("after", at + 1, frame, state.out, 1)

    def _next(self, state: _State, frame: _Frame, at: int) -> _Steps:
        step = "item" if frame.is_list else "key"
        if self._text[at] == ",":
            yield 0, state._replace(step=step, at=at + 1, note=",")
            if frame.parent is not None:
                # The closing bracket of the object or list is missing.
                yield 1 + self._missing(frame), self._pop(state, frame, at, 1)
        elif self._text.startswith(("{", "[", STRING_MARK, '"', "'"), at) if frame.is_list else state.note == "closed":
            # The comma is missing.
            yield 1, state.to(step, at, frame, state.out).doubted(self._is_python)

    def _pop(self, state: _State, frame: _Frame, at: int, faults: int = 0) -> _State:
        closer = "]" if frame.is_list else "}"
        return state.to("after", at, frame.parent, _Output(closer, state.out), faults)._replace(note="closed")

    def _missing(self, frame: _Frame) -> int:
        """Return the number of required properties that are not given."""
        return 0 if frame.is_list else len(frame.schema.required - frame.given)

    # Text

    def _is_at_closer(self, at: int) -> bool:
        """Return whether a closing bracket or the marked end of the call is here.

        At the end of a text without this mark, the model would have continued.
        """
        return self._text[at] in "}])" if at < len(self._text) else self._is_ended

    def _skip(self, at: int) -> int:
        found = _BLANK.match(self._text, at)
        return at if found is None else found.end()

    def _find(self, quote: str, at: int) -> int | None:
        """Return the offset of the next unescaped quote; None if it is missing or a string mark precedes it."""
        if quote == STRING_MARK:
            end = self._text.find(quote, at)
            self._steps_left -= ((len(self._text) if end < 0 else end) - at) // _STEP_LENGTH
            return None if end < 0 else end
        self._steps_left -= 1
        pattern = re.compile(rf"(?s:\\.)|{re.escape(STRING_MARK)}|{quote}")
        for found in pattern.finditer(self._text, at):
            if found[0] == STRING_MARK:
                return None
            if found[0] == quote:
                return found.start()
        return None

    def _json(self, text: _Text) -> str | None:
        found: str | None = self._text[text.start : text.end]
        assert found is not None
        if text.quote == STRING_MARK:
            found = found.replace(STRING_MARK, '"')
        elif text.quote:
            found = unescape(found, text.quote)
        return None if found is None else quoted_value(found, text.schema)

    def _render(self, out: _Output | None) -> str:
        parts: list[str] = []
        while out is not None:
            part = out.part if isinstance(out.part, str) else self._json(out.part)
            parts.append("null" if part is None else part)
            out = out.before
        return "".join(reversed(parts))
