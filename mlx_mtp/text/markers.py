"""Markers in the input of a chat template, and the texts that replace them in the rendered text."""

import json
import re
from typing import Any

# Each marker begins with this character. The character is repeated until no input contains the mark.
_MARK = "\ue000"


class Markers:
    """Markers that occur in none of the inputs.

    Each marker in the rendered text is therefore at a place where the template wrote it.
    """

    def __init__(self, *inputs: Any) -> None:
        everything = json.dumps(inputs, ensure_ascii=False, default=str, skipkeys=True)
        self.mark = _MARK
        while self.mark in everything:
            self.mark += _MARK
        # Each part has the text that a template writes before a marker, the text that it writes after the marker, and
        # the text that replaces all three.
        self._parts: list[tuple[str, str, str]] = []

    def add(self, before: str, after: str, text: str) -> str:
        """Add a marker and return it.

        `text` replaces the marker, with the texts that the template writes `before` and `after` it.
        """
        self._parts.append((before, after, text))
        return f"{self.mark}{len(self._parts) - 1};"

    def replace(self, text: str) -> str | None:
        """Return the rendered text with every marker replaced.

        Return None if a marker does not occur exactly once, between its text before and its text after.
        """
        pieces, end, numbers = [], 0, []
        for found in re.finditer(rf"{self.mark}(\d+);", text):
            number = int(found[1])
            if number >= len(self._parts):
                return None
            before, after, part = self._parts[number]
            start = found.start() - len(before)
            if start < end or not text.startswith(before, start) or not text.startswith(after, found.end()):
                return None
            pieces += [text[end:start], part]
            end = found.end() + len(after)
            numbers.append(number)
        pieces.append(text[end:])
        replaced = "".join(pieces)
        return replaced if sorted(numbers) == list(range(len(self._parts))) and self.mark not in replaced else None
