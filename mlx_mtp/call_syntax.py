"""The marks of Gemma's tool calls, and the JSON that single values of their arguments mean."""

import json
import re

from .argument_schema import ArgumentSchema

CALL_START, CALL_END, STRING_MARK = "<|tool_call>", "<tool_call|>", '<|"|>'
BLANKS = " \t\r\n"

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": "boolean", "false": "boolean", "null": "null"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([nrtbf\"'/\\]))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}


def json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def literal_type(text: str) -> str | None:
    """The type in JSON Schema of a number, true, false or null as JSON has them; None for other text."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return _WORDS.get(text)
    is_integer = found[1] is None and found[2] is None
    return "integer" if is_integer else "number"


def bare_value(text: str, schema: ArgumentSchema) -> str:
    """The JSON of a value without quotes. It is a string unless it is a literal of JSON or Python; a number or a truth
    value is one where the schema allows strings instead."""
    literal = _PYTHON_WORDS.get(text, text)
    kind = literal_type(literal)
    is_text = kind is None or (kind != "null" and not schema.allows(kind) and schema.allows("string"))
    return json_string(text) if is_text else literal


def quoted_value(text: str, schema: ArgumentSchema) -> str:
    """The JSON of a value in quotes: a string, unless the schema allows none and the text is what it allows."""
    if schema.allows("string"):
        return json_string(text)
    stripped = text.strip(BLANKS)
    literal = _PYTHON_WORDS.get(stripped, stripped)
    kind = literal_type(literal)
    if kind is not None:
        return literal if schema.allows(kind) else json_string(text)
    for opener, kind in (("{", "object"), ("[", "array")):
        if stripped.startswith(opener) and schema.allows(kind) and is_json(stripped):
            return stripped
    return json_string(text)


def is_json(text: str) -> bool:
    """Whether the text is JSON as RFC 8259 has it."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def unescape(text: str) -> str | None:
    """Text in JSON's or Python's quotes, without the escapes of both; None if it is no text.

    A backslash before anything else is a backslash.
    """

    def character(found: "re.Match[str]") -> str:
        code = found[1] or found[2] or found[3]
        if code is None:
            return _ESCAPED.get(found[4], found[4])
        return chr(int(code, 16)) if int(code, 16) <= 0x10FFFF else found[0]

    try:
        # Two halves of a surrogate pair are one character.
        return _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


def _refuse(name: str) -> None:
    raise ValueError(name)


def beginning_at_end(text: str, *marks: str) -> int:
    """The number of characters at the end of the text that may yet become one of these marks."""
    counts = (count for mark in marks for count in range(1, len(mark)) if text.endswith(mark[:count]))
    return max(counts, default=0)
