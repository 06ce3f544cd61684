"""Gemma's syntax of tool calls for tests: write it, cut it into pieces and parse it."""

import json
import random
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from hypothesis import strategies as st

from mlx_mtp.text.tool_call_parser import ToolCallParser

QUOTE = '<|"|>'
Call = tuple[str, str]
Tool = dict[str, Any]
End = Literal["stop", "length"] | None


def tool(name: str, **properties: Any) -> Tool:
    """Return a function tool in OpenAI's form, with these properties as parameters."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def parse(pieces: Iterable[str], *, tools: Sequence[Tool] = (), end: End = "stop") -> tuple[str, list[Call]]:
    """Parse an answer in pieces. Return its content, and the name and arguments of each call.

    `end` is the finish reason. If it is None, the answer is not complete yet.
    """
    parser = ToolCallParser(tools)
    content, calls = "", list[Call]()
    for text, is_last in [*((piece, False) for piece in pieces), *([("", True)] if end else [])]:
        more, deltas = parser.add(text, is_last=is_last, is_cut=is_last and end == "length")
        content += more
        for index, name, arguments in deltas:
            if name is not None:
                assert index == len(calls)
                calls.append((name, ""))
            assert index == len(calls) - 1
            calls[index] = (calls[index][0], calls[index][1] + arguments)
    return content, calls


def render(value: Any, blank: str = "") -> str:
    """Write a value in Gemma's syntax, with `blank` between its tokens."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        pairs = (f"{render_key(key)}{blank}:{blank}{render(item, blank)}{blank}" for key, item in value.items())
        return f"{{{blank}{f',{blank}'.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{blank}{f',{blank}'.join(render(item, blank) + blank for item in value)}]"
    return json.dumps(value)


def render_key(key: str) -> str:
    """Write a key. It stands between marks unless it is one name or several names separated by blanks."""
    return key if re.fullmatch(r"[\w.-]+( [\w.-]+)*", key) else render(key)


def render_call(name: str, arguments: dict[str, Any], blank: str = "") -> str:
    """Write a call in Gemma's syntax, with `blank` between its tokens."""
    return f"<|tool_call>{blank}call:{blank}{name}{blank}{render(arguments, blank)}{blank}<tool_call|>"


class Writer:
    """Writes values in the syntaxes that models mix: Gemma's, JSON's and Python's. Each value has a random syntax."""

    def __init__(self, choices: random.Random, styles: Sequence[str]) -> None:
        self._choices = choices
        self._styles = styles

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Write a call in braces. The style "call" writes it in parentheses, as in Python, if all names allow this."""
        if "call" in self._styles and all(re.fullmatch("[a-z_]+", key) for key in arguments):
            pairs = ", ".join(f"{key}={self.value(value)}" for key, value in arguments.items())
            return f"<|tool_call>call:{name}({pairs})<tool_call|>"
        return f"<|tool_call>call:{name}{self.value(arguments)}<tool_call|>"

    def value(self, value: Any) -> str:
        """Write a value. Each of its parts has a random syntax."""
        blank = self._choices.choice(["", " ", "\n  "])
        if isinstance(value, dict):
            pairs = (f"{self._key(key)}:{blank}{self.value(item)}" for key, item in value.items())
            return "{" + f",{blank}".join(pairs) + "}"
        if isinstance(value, list):
            return "[" + f",{blank}".join(self.value(item) for item in value) + "]"
        return self._scalar(value)

    def _key(self, key: str) -> str:
        is_plain = re.fullmatch(r"\w+", key) is not None
        return key if is_plain and self._style() != "json" else self._scalar(key)

    def _scalar(self, value: Any) -> str:
        style = self._style()
        if style in ("python", "call"):
            return repr(value)
        if style == "json":
            return json.dumps(value, ensure_ascii=self._choices.choice([True, False]))
        return render(value)

    def _style(self) -> str:
        return self._choices.choice(self._styles)


# The characters of the syntax, and characters that need several bytes or an escape.
TEXTS = st.text(st.sampled_from('<|">{}[]:,\\\n\t -_.tolc1é日😀\x00\x7f\u2028'), max_size=12) | st.text(max_size=8)
STRINGS = TEXTS.filter(lambda text: QUOTE not in text)
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.tuples(st.from_regex(r"[a-zA-Z0-9_.-]{1,12}", fullmatch=True), st.dictionaries(STRINGS, VALUES, max_size=3))
CONTENTS = TEXTS.filter(lambda text: "<|tool_call>" not in text)


def cut(text: str, places: list[int]) -> list[str]:
    """Cut a text into pieces at these places, modulo its length + 1."""
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]
