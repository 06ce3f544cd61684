"""Gemma's syntax of tool calls for the tests: written, cut into pieces, and read back."""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from mlx_mtp.tool_calls import ToolCallParser

QUOTE = '<|"|>'
Call = tuple[str, str]

Call = tuple[str, str]
Tool = dict[str, Any]


def parse(pieces: Iterable[str], *, is_cut: bool = True) -> tuple[str, list[Call]]:
    """The content, and name and arguments of each call, of an answer in pieces; then comes its end, if `is_cut`."""
    parser = ToolCallParser()
    content, calls = "", list[Call]()
    for text, is_last in [*((piece, False) for piece in pieces), *([("", True)] if is_cut else [])]:
        more, deltas = parser.add(text, is_last=is_last)
        content += more
        for index, name, arguments in deltas:
            if name is not None:
                assert index == len(calls)
                calls.append((name, ""))
            assert index == len(calls) - 1
            calls[index] = (calls[index][0], calls[index][1] + arguments)
    return content, calls


def render(value: Any, blank: str = "") -> str:
    """A value in Gemma's syntax, with blanks between its tokens."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        pairs = (f"{render_key(key)}{blank}:{blank}{render(item, blank)}{blank}" for key, item in value.items())
        return f"{{{blank}{f',{blank}'.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{blank}{f',{blank}'.join(render(item, blank) + blank for item in value)}]"
    return json.dumps(value)


def render_key(key: str) -> str:
    is_odd = not key or key != key.strip(" \t\r\n") or key.startswith(("}", QUOTE))
    return render(key) if is_odd or ":" in key or "<tool_call|>" in key else key


def render_call(name: str, arguments: dict[str, Any], blank: str = "") -> str:
    return f"<|tool_call>{blank}call:{blank}{name}{blank}{render(arguments, blank)}{blank}<tool_call|>"


# The characters of the syntax, and some that take several bytes or an escape.
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
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]
