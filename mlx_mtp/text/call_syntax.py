"""The marks of Gemma's tool calls, and the JSON that single values of their arguments mean."""

import json
import re

from .argument_schema import ArgumentSchema

CALL_START, CALL_END, STRING_MARK = "<|tool_call>", "<tool_call|>", '<|"|>'
BLANKS = " \t\r\n"

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": "boolean", "false": "boolean", "null": "null"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
# What Python reads besides: a sign, digits in groups, no digits on one side of the point.
_LOOSE_NUMBER = re.compile(r"([+-]?)(0|[1-9][0-9]*(?:_[0-9]+)*|(?=\.[0-9]))(?:\.([0-9]*))?")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([nrtbf\"'/\\]))")
# Python's other escapes; hardly anybody means them, and hardly anybody means what they look like.
_RARE_ESCAPE = re.compile(r"\\(?:[av0-7\n]|N\{)")
_BACKSLASH = re.compile(r"(?s:\\.?)")
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
    if kind is None and not schema.allows("string"):
        return _loose_number(text, schema) or json_string(text)
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
    number = _loose_number(stripped, schema)
    if number is not None:
        return number
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


def _loose_number(text: str, schema: ArgumentSchema) -> str | None:
    """The JSON of a number as Python may write it, where the schema allows it."""
    found = _LOOSE_NUMBER.fullmatch(text)
    if found is None:
        return None
    sign, whole, fraction = found.groups()
    number = ("-" if sign == "-" else "") + (whole.replace("_", "") or "0") + (f".{fraction}" if fraction else "")
    return number if schema.allows(literal_type(number) or "") else None


def unescape(text: str, quote: str) -> str | None:
    """Text in these quotes of JSON or Python, without the escapes of both; None if it is not certain.

    A backslash before anything else shows that nothing was escaped: then each backslash is text. This is not certain
    where some backslashes do escape, a quote or each other.
    """
    sequences = [found.start() for found in _BACKSLASH.finditer(text)]
    unknown = [at for at in sequences if not _ESCAPE.match(text, at)]
    if all(_RARE_ESCAPE.match(text, at) for at in unknown):
        return None if unknown else _without_escapes(text)
    return None if any(text[at + 1 : at + 2] in ("\\", quote[0]) for at in sequences) else text


def python_text(prefix: str, text: str, quote: str) -> str | None:
    """The text of a string of Python with a prefix, such as r; None if it is not certain, or is no text."""
    kinds = prefix.lower()
    if "f" in kinds and ("{" in text or "}" in text):
        return None
    found = text if "r" in kinds else unescape(text, quote)
    return None if found is None or ("b" in kinds and not found.isascii()) else found


def _without_escapes(text: str) -> str | None:
    """Text without the escapes of JSON and Python; None if it has half a surrogate pair."""

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
