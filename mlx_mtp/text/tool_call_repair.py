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

from .argument_scanner import KEY, SEPARATOR, ArgumentScanner
from .argument_schema import ArgumentSchema
from .call_syntax import NEXT_CALL, STRING_MARK, bare_value, json_string, literal_type, unescape
from .reading_state import Frame, Output, State, Steps
from .string_reader import StringReader, mismatch

# With more missing or extra commas and braces, any text could be read in some way.
_MOST_FAULTS = 2
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_QUOTES = ('"""', "'''", '"', "'")
_SPACED_KEY = re.compile(r"[\w$@./-]+(?: +[\w$@./-]+)+")
_LITERAL = re.compile(r"(?:[A-Za-z]+|[+-]?[0-9.][0-9._eE+-]*)(?=[ \t\r\n]*(?:[,}\])]|\Z))")
_PYTHON_STRING = re.compile("(?i:(br?|fr?|rb?|rf|u)(\"\"\"|'''|\"|'))")


class Reading(NamedTuple):
    """Arguments as JSON, the offset of their end in the text, and the number of slips in them."""

    arguments: str
    end: int
    slips: int


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
        self._scanner = ArgumentScanner(text, is_ended)
        self._strings = StringReader(self._scanner)
        self._root = Frame(_CLOSERS[text[0]], schema, None)

    def read(self) -> Reading | None:
        """Return the only reading with the fewest slips; None if there is no single certain one."""
        ticks = count()
        waiting = [(0, next(ticks), State("key", 1, self._root, Output("{", None)))]
        best: Reading | None = None
        is_doubtful = False
        while self._scanner.steps_left > 0:
            if not waiting or (best is not None and waiting[0][0] > best.slips):
                return None if is_doubtful else best
            self._scanner.steps_left -= 1
            slips, _, state = heapq.heappop(waiting)
            if state.step == "end":
                found = Reading(self._scanner.render(state.out), state.at, slips)
                if best is not None and (found.arguments, found.end) != (best.arguments, best.end):
                    return None
                is_doubtful = state.is_doubtful and (best is None or is_doubtful)
                best = found
                continue
            for more, following in self._follow(state):
                if following.faults <= _MOST_FAULTS:
                    heapq.heappush(waiting, (slips + more, next(ticks), following))
        return None

    def _follow(self, state: State) -> Steps:
        steps = {"key": self._key, "value": self._value, "string": self._strings.string, "bare": self._strings.bare}
        return steps.get(state.step, self._after)(state)

    def _key(self, state: State) -> Steps:
        at = self._scanner.skip(state.at)
        frame = state.frame
        assert frame is not None
        if self._scanner.is_at_closer(at):
            # The text after a value closes the object.
            yield self._end_of_members(state, frame, at)
        elif at == len(self._text):
            return
        elif self._text[at] in ",;":
            yield from self._comma(state, frame, at)
        elif self._text[at] == "{" and frame.parent is None and frame.is_empty:
            # This brace is extra.
            yield 1, state._replace(at=at + 1, faults=state.faults + 1)
        else:
            for slips, name, end in self._names(at, frame):
                separator = SEPARATOR.match(self._text, end)
                assert separator is not None
                slips += separator[1] == "=" and not (self._scanner.is_python and frame.parent is None)
                out = Output(("" if frame.is_empty else ",") + json_string(name) + ":", state.out)
                inner = frame._replace(given=frame.given | {name}, is_empty=False)
                schema = frame.schema.member(name)
                following = state.to("value", separator.end(), inner, out)._replace(schema=schema)
                # If a name has two values, it is not known which value is meant.
                yield slips + 2 * (name in frame.given), following.doubted(name in frame.given)

    def _end_of_members(self, state: State, frame: Frame, at: int) -> tuple[int, State]:
        """Return the state before a closing bracket. A comma before the bracket is a slip."""
        return int(state.note == ","), state.to("after", at, frame, state.out)

    def _comma(self, state: State, frame: Frame, at: int) -> Steps:
        """Skip an extra comma, or close an empty object or list whose closing bracket is missing."""
        yield 1, state._replace(at=at + 1, faults=state.faults + 1)
        if frame.is_empty and frame.parent is not None:
            yield 1 + frame.missing, self._pop(state, frame, at, 1)

    def _names(self, at: int, frame: Frame) -> Iterator[tuple[int, str, int]]:
        """Yield the slips, the name and the end of each key that may be here, with a separator after it."""
        for quote in (STRING_MARK, '"', "'"):
            if self._text.startswith(quote, at):
                start = at + len(quote)
                end = self._scanner.find(quote, start)
                name = None if end is None else self._text[start:end]
                if name is not None and quote != STRING_MARK:
                    name = unescape(name, quote)
                if end is not None and name is not None and SEPARATOR.match(self._text, end + len(quote)):
                    yield frame.slips_of(name), name, end + len(quote)
                return
        for name in frame.schema.names:
            end = at + len(name)
            is_odd = not KEY.fullmatch(name)
            if is_odd and name and self._text.startswith(name, at) and SEPARATOR.match(self._text, end):
                yield frame.slips_of(name), name, end
                return
        for pattern in (KEY, _SPACED_KEY):
            found = pattern.match(self._text, at)
            if found and SEPARATOR.match(self._text, found.end()):
                is_odd = pattern is _SPACED_KEY
                yield frame.slips_of(found[0]) + is_odd, found[0], found.end()
                return

    def _value(self, state: State) -> Steps:
        at = self._scanner.skip(state.at)
        frame = state.frame
        assert frame is not None
        if at == len(self._text):
            return
        prefixed = _PYTHON_STRING.match(self._text, at)
        if self._text.startswith(STRING_MARK, at):
            yield from self._strings.open_mark(state, at + len(STRING_MARK))
            if at > state.at:
                yield 0, state._replace(step="bare", start=state.at)
        elif prefixed is not None:
            yield from self._strings.python_string(state, prefixed)
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

    def _structure(self, state: State, frame: Frame, at: int) -> Steps:
        """Read an object or a list, or text if the schema wants a string in its place."""
        opener = self._text[at]
        is_allowed = state.schema.allows("object" if opener == "{" else "array")
        wants_text = not is_allowed and state.schema.allows("string")
        inner = Frame(_CLOSERS[opener], state.schema, frame)
        step = "key" if opener == "{" else "item"
        yield int(not is_allowed), state.to(step, at + 1, inner, Output(opener, state.out)).doubted(wants_text)
        yield from self._text_at(state.doubted(not wants_text), at)

    def _text_at(self, state: State, at: int) -> Steps:
        """Read text without quotes."""
        yield 0, state._replace(step="bare", at=at, start=at)
        if at > state.at:
            # Blanks may belong to the text.
            yield 0, state._replace(step="bare", start=state.at)

    def _literal(self, state: State, text: str, end: int) -> Steps:
        found = bare_value(text, state.schema)
        if found.startswith('"') and literal_type({"True": "true", "False": "false"}.get(text, text)) is None:
            return
        yield mismatch(found, state.schema), state.after_value(end, Output(found, state.out))

    def _item(self, state: State) -> Steps:
        at = self._scanner.skip(state.at)
        frame = state.frame
        assert frame is not None
        if self._scanner.is_at_closer(at):
            yield self._end_of_members(state, frame, at)
        elif at < len(self._text) and self._text[at] == ",":
            yield from self._comma(state, frame, at)
        out = state.out if frame.is_empty else Output(",", state.out)
        inner = frame._replace(is_empty=False)
        yield 0, state.to("value", state.at, inner, out)._replace(schema=frame.schema.items)

    def _after(self, state: State) -> Steps:
        if state.step == "item":
            yield from self._item(state)
            return
        at = self._scanner.skip(state.at)
        frame = state.frame
        if frame is None:
            yield from self._after_all(state, at)
        elif at == len(self._text):
            yield 1 + frame.missing, self._pop(state, frame, at, 1)
        elif self._text[at] in "}])":
            yield from self._closer(state, frame, at)
        else:
            yield from self._next(state, frame, at)

    def _after_all(self, state: State, at: int) -> Steps:
        found = NEXT_CALL.match(self._text, at)
        if at == len(self._text) or found:
            end = at if found is None else found.end()
            yield 0, state._replace(step="end", at=end)
        elif self._text[at] in "}])":
            yield 1, state._replace(at=at + 1, faults=state.faults + 1)

    def _closer(self, state: State, frame: Frame, at: int) -> Steps:
        if self._text[at] == frame.closer:
            yield frame.missing, self._pop(state, frame, at + 1)
        elif frame.parent is not None:
            yield 1 + frame.missing, self._pop(state, frame, at, 1)
        # This bracket is extra.
        yield 1, state.to("after", at + 1, frame, state.out, 1)

    def _next(self, state: State, frame: Frame, at: int) -> Steps:
        step = "item" if frame.is_list else "key"
        if self._text[at] == ",":
            yield 0, state._replace(step=step, at=at + 1, note=",")
            if frame.parent is not None:
                # The closing bracket of the object or list is missing.
                yield 1 + frame.missing, self._pop(state, frame, at, 1)
        elif self._text.startswith(("{", "[", STRING_MARK, '"', "'"), at) if frame.is_list else state.note == "closed":
            # The comma is missing.
            yield 1, state.to(step, at, frame, state.out).doubted(self._scanner.is_python)

    def _pop(self, state: State, frame: Frame, at: int, faults: int = 0) -> State:
        closer = "]" if frame.is_list else "}"
        return state.to("after", at, frame.parent, Output(closer, state.out), faults)._replace(note="closed")
