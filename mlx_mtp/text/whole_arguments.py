"""Reading of tool call arguments as a whole: the search for the end of a call, and the arguments before it."""

import logging
import re

from .argument_schema import ArgumentSchema
from .call_syntax import BLANKS, CALL_END, CALL_START, END, STRING_MARK, is_json
from .tool_call_repair import Reading, read_arguments

logger = logging.getLogger(__name__)

# This opens a list around the arguments. The list is not a part of the arguments.
_LIST_OF_ONE = re.compile(r"\[[ \t\r\n]*(?=\{)")
# The strings of one call may hold this number of end marks.
_MOST_ENDS = 8
_QUOTE = re.compile(rf"{re.escape(STRING_MARK)}|[\"']")


class WholeArguments:
    """Arguments of one call that are read as a whole, when the end of the call is found.

    `text` is the text so far, and `emitted` is the JSON that is emitted for its first `emitted_length` characters.
    """

    def __init__(self, name: str, schema: ArgumentSchema, text: str, emitted: str, emitted_length: int) -> None:
        # This is the text after the call, None while its end is not found.
        self.rest: str | None = None
        # True if another call follows in the same block.
        self.is_block_open = False
        self.is_readable = True
        self._name = name
        self._schema = schema
        self._texts = [text]
        self._length = len(text)
        # This is the end of the text, in which the end of the call is searched.
        self._held = text
        self._emitted = emitted
        self._emitted_length = emitted_length
        # The call may have ended at this offset, at an end mark that may be within a string. The reading has the
        # arguments before it. `_ends` is the number of these end marks.
        self._best_end: tuple[int, Reading | None] | None = None
        self._ends = 0

    def add(self, text: str) -> str:
        """Add text and search for the end of the call. Return the rest of the JSON if the end is found."""
        self._held += text
        self._texts.append(text)
        self._length += len(text)
        while (found := END.search(self._held)) is not None:
            rest = self._end_at(found)
            if rest is not None:
                return rest
        self._held = self._held[-len(CALL_END) :]
        return ""

    def _end_at(self, found: re.Match[str]) -> str | None:
        """Return the rest of the JSON if the call ends at a mark, or at a mark before it.

        An end mark that seems to be within a string may not be the end.
        """
        text = "".join(self._texts)
        at = self._length - len(self._held) + found.start()
        first = self._best_end
        is_next_call = found[0] == CALL_START and first is not None and not text[first[0] + len(CALL_END) : at].strip()
        reading = None if is_next_call else self._read(text[:at], is_ended=True)
        is_better = reading is not None and (first is None or first[1] is None or reading.slips < first[1].slips)
        best = (at, reading) if first is None or is_better else first
        if found[0] == CALL_START or self._ends == _MOST_ENDS or not _may_go_on(text[:at], best[1]):
            return self._conclude(*best)
        self._best_end = best
        self._ends += 1
        self._held = self._held[found.end() :]
        return None

    def finish(self) -> str:
        """Return the rest of the JSON of a call that the model did not end before it stopped."""
        text = "".join(self._texts)
        if self._best_end is not None:
            return self._conclude(*self._best_end)
        if not text:
            self.rest = ""
            return "{}"
        return self._conclude(len(text), self._read(text, is_ended=False))

    def cut(self) -> str:
        """Return the rest of the JSON, or of the text, of a call that the model had no room to finish."""
        if self._best_end is None:
            return "".join(self._texts)[self._emitted_length :]
        json = self._conclude(*self._best_end)
        self.rest = ""
        return json

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
        reading = read_arguments(text, self._schema, is_ended=is_ended)
        if reading is not None and bracket is not None:
            reading = reading._replace(end=reading.end + bracket.end(), slips=reading.slips + 1)
        return reading if reading and reading.arguments.startswith(self._emitted) else None

    def _conclude(self, at: int, reading: Reading | None) -> str:
        """Return the rest of the reading up to the offset `at`, or the rest of the text if it is not readable."""
        text = "".join(self._texts)
        if reading is not None:
            logger.info("a call of %s is read with %d slips in its syntax", self._name, reading.slips)
            json = reading.arguments[len(self._emitted) :]
            self.is_block_open = reading.end < at
            at = reading.end
        else:
            logger.warning("a call of %s cannot be read: its arguments are passed on as they are", self._name)
            json = text[self._emitted_length : at]
            if is_json(self._emitted + json):
                # Arguments that could not be read with certainty must not look like JSON.
                json += CALL_END
            self.is_readable = False
        self.rest = text[at:].removeprefix(CALL_END)
        return json


def _may_go_on(text: str, reading: Reading | None) -> bool:
    """Return whether the end mark after these arguments may be text of a string, because of their slips."""
    return (reading is None or reading.slips > 0) and _QUOTE.search(text) is not None
