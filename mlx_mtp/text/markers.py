"""Markers in what a chat template gets, and the texts that take their places in what it renders."""

import json
import re
from typing import Any

# Begins a marker. More of it is taken if an input holds it.
_MARK = "\ue000"


class Markers:
    """Markers that occur in none of these inputs, so each one in the rendered text is where the template put it."""

    def __init__(self, *inputs: Any) -> None:
        everything = json.dumps(inputs, ensure_ascii=False, default=str, skipkeys=True)
        self.mark = _MARK
        while self.mark in everything:
            self.mark += _MARK
        # What a template writes before and after each marker, and the text for all three.
        self._parts: list[tuple[str, str, str]] = []

    def add(self, before: str, after: str, text: str) -> str:
        """A new marker, which stands for this text, and for what the template writes before and after it."""
        self._parts.append((before, after, text))
        return f"{self.mark}{len(self._parts) - 1};"

    def replace(self, text: str) -> str | None:
        """The rendered text with every marker replaced; None if one is not there once, between what it stands for."""
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
