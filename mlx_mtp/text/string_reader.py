"""Reader of strings in tool call arguments: between marks or quotes, or without them."""

import re

from .argument_scanner import KEY, NEXT_KEY, SEPARATOR, STEP_LENGTH, ArgumentScanner
from .argument_schema import ArgumentSchema
from .call_syntax import BLANKS, STRING_MARK, bare_value, literal_type, python_text, quoted_value, unescape
from .reading_state import Output, QuotedText, State, Steps

# One step is also this number of characters with escapes.
_ESCAPED_STEP_LENGTH = 200
_LONGEST_KEY = 64
# This number of marks in a row, or more, has no meaning.
_MOST_MARKS = 4
# This text follows a quote that ends its string. A string with quotes inside does not continue with it.
_AFTER_QUOTE = re.compile(r"[ \t\r\n]*(?:[,:}\]+\"'`]|\Z)")
# This is the next key, possibly in quotes, after text that may end before a brace.
_SECOND_KEY = re.compile(r"[ \t\r\n}\])]*,[ \t\r\n]*(?:<\|\"\|>|[\"'])?([\w$@./-]*)")
_OPENS_VALUE = re.compile(r",[ \t\r\n]*[\w$@./-]{1,64}[ \t\r\n]*[:=][ \t\r\n]*\Z")
# The last comma is an extra comma, or the first character of a text whose mark is missing.
_SPARE_COMMA = re.compile(r"[\[,][ \t\r\n]*,[ \t\r\n]*\Z")
_NOT_IN_PYTHON_WORDS = re.compile(r"[()\[\]{}\"'`+*%=]")
_INNER_BLANK = re.compile(r"[^ \t\r\n][ \t\r\n]+[^ \t\r\n]")
_PLAIN = re.compile(r"[^,{}\[\]()\"]*")


class StringReader:
    """Reader of strings. Each method yields the states that may follow a state, with their slips."""

    def __init__(self, scanner: ArgumentScanner) -> None:
        self._scanner = scanner
        self._text = scanner.text

    def python_string(self, state: State, opening: "re.Match[str]") -> Steps:
        """Read a Python string with a prefix such as r. Nothing else begins like it."""
        start, quote = opening.end(), opening[2]
        end = self._scanner.find(quote, start)
        text = None if end is None else python_text(opening[1], self._text[start:end], quote)
        if end is not None and text is not None:
            value = quoted_value(text, state.schema)
            after = end + len(quote)
            yield mismatch(value, state.schema), state.after_value(after, Output(value, state.out))

    def open_mark(self, state: State, start: int) -> Steps:
        """Open a string after its start mark, which may be doubled."""
        string = state._replace(step="string", at=start, start=start, note=STRING_MARK)
        yield 0, string
        after = start + len(STRING_MARK)
        if self._text.startswith(STRING_MARK * 2, start):
            # This is an empty string with one extra mark, or a string that holds one quote.
            for end in (start, after):
                yield from self._closed(string, end, after + len(STRING_MARK), 1)
        elif self._text.startswith(STRING_MARK, start):
            yield from self._close_doubled(string, after)

    def _close_doubled(self, string: State, start: int) -> Steps:
        """Close a string between marks if its first mark is doubled, and perhaps also its last mark."""
        end = self._scanner.find(STRING_MARK, start)
        if end is None or end == start:
            return
        after = end + len(STRING_MARK)
        yield from self._closed(string._replace(start=start), end, after, 1)
        if self._text.startswith(STRING_MARK, after):
            yield from self._closed(string._replace(start=start), end, after + len(STRING_MARK), 1)

    def string(self, state: State) -> Steps:
        """Close a string at its next quote or at a later quote, or read it as not closed."""
        quote, text = state.note, self._text
        end = self._scanner.find(quote, state.at)
        if quote == STRING_MARK and not state.quotes:
            yield from self._unclosed(state, len(text) if end is None else end)
        if end is None:
            return
        if not self._is_certain(state, end):
            yield 0, state.doubted().after_value(end + len(quote), Output("null", state.out))
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

    def _is_certain(self, state: State, end: int) -> bool:
        """Return whether the escapes of a string up to `end` have one clear meaning.

        If they have not, more text would give them another meaning.
        """
        if state.note == STRING_MARK or self._text.find("\\", state.start, end) < 0:
            return True
        self._scanner.steps_left -= (end - state.start) // _ESCAPED_STEP_LENGTH
        return unescape(self._text[state.start : end], state.note) is not None

    def _may_go_on(self, state: State, after: int) -> bool:
        """Return whether a string may continue after one of its quotes."""
        if state.note != STRING_MARK:
            return not self._scanner.is_python and _AFTER_QUOTE.match(self._text, after) is None
        # The string ends here if the next key is given already, for example the key of this string.
        found = NEXT_KEY.match(self._text, after)
        return found is None or state.frame is None or state.frame.is_list or found[1] not in state.frame.given

    def _closed(self, state: State, end: int, after: int, slips: int = 0) -> Steps:
        """Yield the state after a string that ends at `end`. The text after the string begins at `after`."""
        found = QuotedText(state.start, end, state.note, state.schema)
        has_escapes = state.note != STRING_MARK and self._text.find("\\", state.start, end) >= 0
        if has_escapes or not state.schema.allows("string"):
            value = self._scanner.json(found)
            if value is None:
                return
            slips += mismatch(value, state.schema)
        yield slips, state.after_value(after, Output(found, state.out), "closed")

    def _has_clear_edges(self, state: State, end: int) -> bool:
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

    def _looks_closed(self, state: State, after: int) -> int:
        """Return 1 if the next key of the object follows a mark, so that the string hardly continues; else 0."""
        frame = state.frame
        if state.note != STRING_MARK or frame is None or frame.is_list:
            return 0
        at = self._scanner.skip(after)
        found = KEY.match(self._text, at)
        separator = found and SEPARATOR.match(self._text, found.end())
        if not found or not separator or found[0] in frame.given:
            return 0
        if frame.schema.names:
            return int(found[0] in frame.schema.names)
        return int(self._text.startswith(STRING_MARK, self._scanner.skip(separator.end())))

    def _unclosed(self, state: State, limit: int) -> Steps:
        """Close a string without an end mark before the next key, or before the closing brackets."""
        for end, slips in self._scanner.ends(state, limit):
            yield from self._closed(state, end, end, 1 + slips)
            if self._text[end - 1] in "\"'" and end > state.start:
                # The quote may stand for the mark.
                yield from self._closed(state, end - 1, end, 1 + slips)

    def bare(self, state: State) -> Steps:
        """Read text without a start mark. The text ends at a mark, or has no marks."""
        mark = self._scanner.find(STRING_MARK, state.at)
        if mark is not None:
            after = mark + len(STRING_MARK)
            swallowed = self._scanner.swallowed(state, state.at, mark)
            opens_value = _OPENS_VALUE.search(self._text[max(state.start, mark - 2 * _LONGEST_KEY) : mark])
            spare_comma = _SPARE_COMMA.search(self._text[max(0, state.start - _LONGEST_KEY) : state.start])
            if state.quotes % 2 == 0:
                closed = state._replace(note=STRING_MARK).doubted(bool(opens_value or spare_comma))
                yield from self._closed(closed, mark, after, 1 + swallowed)
            yield state.quotes % 2 + swallowed, state._replace(at=after, quotes=state.quotes + 1)
        if not state.quotes and self._text[state.start] not in "{[(\"'`)]}, \t\r\n":
            yield from self._words(state, len(self._text) if mark is None else mark)

    def _words(self, state: State, limit: int) -> Steps:
        """Read text without marks. It may hold commas and braces only if the schema wants a string."""
        assert state.frame is not None
        ends = [self._text.find(mark, state.start, limit) for mark in (",", state.frame.closer)]
        simple = min((end for end in ends if end >= 0), default=-1)
        if simple > state.start and '"' not in self._text[state.start : simple]:
            yield from self._word(state, simple, 1)
        wants_text = state.schema.types is not None and state.schema.allows("string") and not state.frame.is_list
        for end, slips in self._scanner.ends(state, limit):
            if self._scanner.steps_left <= 0:
                return
            if end != simple and end > state.start:
                is_plain = _PLAIN.fullmatch(self._text, state.start, end) is not None
                if wants_text or is_plain:
                    yield from self._word(state, end, 2 - is_plain + slips)

    def _is_split(self, state: State, end: int) -> bool:
        """Return whether text with blanks would end at a comma that no known key follows."""
        assert state.frame is not None
        following = _SECOND_KEY.match(self._text, end)
        if following is None or state.frame.is_list or state.frame.is_known(following[1]):
            return False
        return _INNER_BLANK.search(self._text, state.start, end) is not None

    def _word(self, state: State, end: int, slips: int) -> Steps:
        self._scanner.steps_left -= (end - state.start) // STEP_LENGTH
        text = self._text[state.start : end].rstrip(BLANKS)
        value = bare_value(text, state.schema)
        if value.startswith('"'):
            is_expression = self._scanner.is_python and _NOT_IN_PYTHON_WORDS.search(text) is not None
            is_wanted = state.schema.allows("string")
            following = state.after_value(end, Output(value, state.out))
            yield (
                slips + (not is_wanted),
                following.doubted(is_expression or not is_wanted or self._is_split(state, end)),
            )


def mismatch(value: str, schema: ArgumentSchema) -> int:
    """Return 1 if the schema does not allow the type of a JSON value, else 0. Objects and lists do not count."""
    kind = "string" if value.startswith('"') else literal_type(value)
    return int(kind is not None and not schema.allows(kind))
