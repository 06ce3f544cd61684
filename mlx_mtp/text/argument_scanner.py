"""Scanner of the characters of tool call arguments, with a limit on the steps of a reading."""

import re
from collections.abc import Iterator

from .call_syntax import STRING_MARK, quoted_value, unescape
from .reading_state import Output, QuotedText, State

# Arguments that take more steps are not read. A search through STEP_LENGTH characters is one step.
MOST_STEPS = 20_000
STEP_LENGTH = 2_000
_STEP_PLACES = 8
SEPARATOR = re.compile(r"[ \t\r\n]*([:=])(?![=]|//)")
KEY = re.compile(r"[\w$@./-]+")
_BLANK = re.compile(r"[ \t\r\n]*")
_NEXT_ITEM = re.compile(r",[ \t\r\n]*(?=<\|\"\|>|[\"'{\[])")
# This may follow a value in an object, in place of the closing bracket.
NEXT_KEY = re.compile(r",[ \t\r\n]*([\w$@./-]+)[ \t\r\n]*[:=](?![=]|//)")


class ArgumentScanner:
    """Text of one call's arguments, and the number of steps that are left for its reading.

    `is_ended` tells that the end mark of a call follows the text.
    """

    def __init__(self, text: str, is_ended: bool) -> None:
        self.text = text
        self.is_ended = is_ended
        # Arguments in parentheses are a call in Python.
        self.is_python = text.startswith("(")
        self.steps_left = MOST_STEPS

    def skip(self, at: int) -> int:
        """Return the offset after the blanks at `at`."""
        found = _BLANK.match(self.text, at)
        return at if found is None else found.end()

    def is_at_closer(self, at: int) -> bool:
        """Return whether a closing bracket or the marked end of the call is here.

        At the end of a text without this mark, the model would have continued.
        """
        return self.text[at] in "}])" if at < len(self.text) else self.is_ended

    def find(self, quote: str, at: int) -> int | None:
        """Return the offset of the next unescaped quote; None if it is missing or a string mark precedes it."""
        if quote == STRING_MARK:
            end = self.text.find(quote, at)
            self.steps_left -= ((len(self.text) if end < 0 else end) - at) // STEP_LENGTH
            return None if end < 0 else end
        self.steps_left -= 1
        pattern = re.compile(rf"(?s:\\.)|{re.escape(STRING_MARK)}|{quote}")
        for found in pattern.finditer(self.text, at):
            if found[0] == STRING_MARK:
                return None
            if found[0] == quote:
                return found.start()
        return None

    def ends(self, state: State, limit: int) -> Iterator[tuple[int, int]]:
        """Yield each place before `limit` where unclosed text may end, and the number of known keys before it."""
        frame = state.frame
        assert frame is not None
        self.steps_left -= (limit - state.start) // STEP_LENGTH
        keys = NEXT_KEY.finditer(self.text, state.start, limit)
        places = [(found.start(), frame.is_known(found[1])) for found in keys]
        if frame.is_in_list:
            most = min(len(self.text), limit + len(STRING_MARK))
            items = _NEXT_ITEM.finditer(self.text, state.start, most)
            places += [(item.start(), False) for item in items if item.end() <= limit]
        if limit == len(self.text):
            places.append((limit, False))
        self.steps_left -= len(places) // _STEP_PLACES
        swallowed = 0
        for place, is_known in sorted(places):
            for end in self._before_closers(state.start, place):
                if end < len(self.text) or self.is_ended:
                    yield end, swallowed
            swallowed += is_known

    def _before_closers(self, start: int, at: int) -> Iterator[int]:
        """Yield this offset, and the offset of each closing bracket in the row of brackets before it."""
        yield at
        while at > start and self.text[at - 1] in "}]) \t\r\n":
            at -= 1
            if self.text[at] in "}])":
                yield at

    def swallowed(self, state: State, start: int, end: int) -> int:
        """Return the number of known keys in this text, which a text without an end mark would swallow."""
        assert state.frame is not None
        found = NEXT_KEY.finditer(self.text, start, end)
        return sum(state.frame.is_known(match[1]) for match in found)

    def json(self, text: QuotedText) -> str | None:
        """Return the JSON of a string; None if the meaning of its escapes is not certain."""
        found: str | None = self.text[text.start : text.end]
        assert found is not None
        if text.quote == STRING_MARK:
            found = found.replace(STRING_MARK, '"')
        elif text.quote:
            found = unescape(found, text.quote)
        return None if found is None else quoted_value(found, text.schema)

    def render(self, out: Output | None) -> str:
        """Return the JSON of an output."""
        parts: list[str] = []
        while out is not None:
            part = out.part if isinstance(out.part, str) else self.json(out.part)
            parts.append("null" if part is None else part)
            out = out.before
        return "".join(reversed(parts))
