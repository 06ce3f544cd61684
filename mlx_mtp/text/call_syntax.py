"""Marks of Gemma's tool calls, and conversion of single argument values to JSON."""

import json
import re

from .argument_schema import ArgumentSchema

CALL_START, CALL_END, STRING_MARK = "<|tool_call>", "<tool_call|>", '<|"|>'
BLANKS = " \t\r\n"
# The text of a call ends at one of these marks.
END = re.compile(rf"{re.escape(CALL_END)}|{re.escape(CALL_START)}")
_MARK = f"(?:{re.escape(STRING_MARK)})?"
# The pattern is bounded, so that a long text is not searched again and again.
_GAP = r"[ \t\r\n]{0,256}"
_NAME = rf"{_GAP}{_MARK}([^\s{{}}<>()]{{1,256}})"
# This text must follow `<|tool_call>`, or a call in the same block. The second pattern matches each beginning of it.
HEAD = re.compile(rf"[ \t\r\n,;]{{0,256}}call:{_NAME}{_MARK}{_GAP}(?=[{{(]|{END.pattern}|\Z)")
HEAD_BEGINNING = re.compile(rf"[ \t\r\n,;]{{0,256}}(?:c|ca|cal|call|call:(?:{_NAME}{_MARK}{_GAP}|{_GAP}{_MARK}))?")
# This begins another call in the same block, without a mark.
NEXT_CALL = re.compile(r"[ \t\r\n,;]*(?=call:[ \t\r\n]*[^\s{}<>()]+[ \t\r\n]*[{(])")

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": "boolean", "false": "boolean", "null": "null"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
# Python also reads a plus sign, digits in groups, and a point without digits on one side.
_LOOSE_NUMBER = re.compile(r"([+-]?)(0|[1-9][0-9]*(?:_[0-9]+)*|(?=\.[0-9]))(?:\.([0-9]*))?")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([nrtbf\"'/\\]))")
# These are the other escapes of Python. A model rarely means them as escapes, and rarely as plain text.
_RARE_ESCAPE = re.compile(r"\\(?:[av0-7\n]|N\{)")
_BACKSLASH = re.compile(r"(?s:\\.?)")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}


def json_string(text: str) -> str:
    """Return the text as a JSON string, in quotes. Characters outside ASCII stay unescaped."""
    return json.dumps(text, ensure_ascii=False)


def literal_type(text: str) -> str | None:
    """Return the JSON Schema type of a JSON number, true, false or null; None for other text."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return _WORDS.get(text)
    is_integer = found[1] is None and found[2] is None
    return "integer" if is_integer else "number"


def bare_value(text: str, schema: ArgumentSchema) -> str:
    """Return the JSON of a value without quotes.

    The value is a string unless it is a literal of JSON or Python. A number or a boolean also becomes a string if the
    schema allows strings but not its type.
    """
    literal = _PYTHON_WORDS.get(text, text)
    kind = literal_type(literal)
    if kind is None and not schema.allows("string"):
        return _loose_number(text, schema) or json_string(text)
    is_text = kind is None or (kind != "null" and not schema.allows(kind) and schema.allows("string"))
    return json_string(text) if is_text else literal


def quoted_value(text: str, schema: ArgumentSchema) -> str:
    """Return the JSON of a value in quotes.

    The value is a string, unless the schema allows no strings but allows the value that the text represents.
    """
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
    """Return whether the text is JSON according to RFC 8259."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _loose_number(text: str, schema: ArgumentSchema) -> str | None:
    """Return the JSON of a number in Python's notation; None if it is no number or the schema forbids it."""
    found = _LOOSE_NUMBER.fullmatch(text)
    if found is None:
        return None
    sign, whole, fraction = found.groups()
    number = ("-" if sign == "-" else "") + (whole.replace("_", "") or "0") + (f".{fraction}" if fraction else "")
    return number if schema.allows(literal_type(number) or "") else None


def unescape(text: str, quote: str) -> str | None:
    """Return the text between quotes of JSON or Python without its escapes; None if it is not certain.

    A backslash that begins no escape shows that the text has no escapes. Each backslash is then text. This is not
    certain if a backslash in the text precedes a quote or another backslash.
    """
    sequences = [found.start() for found in _BACKSLASH.finditer(text)]
    unknown = [at for at in sequences if not _ESCAPE.match(text, at)]
    if all(_RARE_ESCAPE.match(text, at) for at in unknown):
        return None if unknown else _without_escapes(text)
    return None if any(text[at + 1 : at + 2] in ("\\", quote[0]) for at in sequences) else text


def python_text(prefix: str, text: str, quote: str) -> str | None:
    """Return the text of a Python string with a prefix such as r; None if it is not certain or not text."""
    kinds = prefix.lower()
    if "f" in kinds and ("{" in text or "}" in text):
        return None
    found = text if "r" in kinds else unescape(text, quote)
    return None if found is None or ("b" in kinds and not found.isascii()) else found


def _without_escapes(text: str) -> str | None:
    """Return the text without the escapes of JSON and Python; None if it has half a surrogate pair."""

    def character(found: "re.Match[str]") -> str:
        code = found[1] or found[2] or found[3]
        if code is None:
            return _ESCAPED.get(found[4], found[4])
        return chr(int(code, 16)) if int(code, 16) <= 0x10FFFF else found[0]

    try:
        # UTF-16 joins the two halves of a surrogate pair to one character.
        return _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


def _refuse(name: str) -> None:
    raise ValueError(name)


def beginning_at_end(text: str, *marks: str) -> int:
    """Return the number of characters at the end of the text that may become one of these marks."""
    counts = (count for mark in marks for count in range(1, len(mark)) if text.endswith(mark[:count]))
    return max(counts, default=0)
