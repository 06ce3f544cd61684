"""A grammar that only valid tool calls follow, in the syntax of Gemma 4 (see `tool_calls`)."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .call_syntax import BLANKS, CALL_END, CALL_START, STRING_MARK
from .errors import OptionError

# Special tokens are matched as tokens; spelled out by other tokens they would end a string or begin a call as well.
# Numbers are bounded because a model may never end one.
_COMMON_RULES = rf"""
TEXT: /(?s:.+)/ & ~/(?s:.*)<\|tool_call>(?s:.*)/
STRING: /(?s:.+)/ & ~/(?s:.*)<\|"\|>(?s:.*)/
INTEGER: /-?(0|[1-9][0-9]{{0,15}})/
NUMBER: /-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,15}})?([eE][+-]?[0-9]{{1,2}})?/
KEY: /[^\s:,<{{}}\[\]]([^\t\r\n:,<{{}}\[\]]{{0,62}}[^\s:,<{{}}\[\]])?/
string: {STRING_MARK} STRING? {STRING_MARK}
boolean: "true" | "false"
key: KEY | string
pair: key ":" any
any: string | NUMBER | boolean | "null" | "{{" (pair ("," pair)*)? "}}" | "[" (any ("," any)*)? "]"
"""
_SCALARS = {"string": "string", "integer": "INTEGER", "number": "NUMBER", "boolean": "boolean", "null": '"null"'}
# Keywords that are followed, by type, and those that restrict nothing.
_FOLLOWED = {
    "object": frozenset({"type", "properties", "required", "additionalProperties"}),
    "array": frozenset({"type", "items"}),
    **dict.fromkeys(_SCALARS, frozenset({"type"})),
}
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)
_EXPECTED: dict[type, str] = {Mapping: "an object", list: "a list", str: "a string"}
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def tool_grammar(tools: Sequence[Mapping[str, Any]], choice: str, *, parallel: bool = True) -> str:
    """A grammar for `GenerationOptions.grammar` that holds the answer to valid calls of OpenAI's function tools.

    `choice` is "auto": text, then any number of calls, "required": at least one call and no text, or the name of the
    tool to call once. Without `parallel`, there is one call at most. An object's properties come in alphabetical order,
    as the chat template writes them, and no others do, unless it lists none. A part of a schema that cannot be followed
    is left to the caller to check.

    Raises OptionError for a tool that is malformed, that no arguments can satisfy or, if it is strict, whose schema
    cannot be followed in full, and for a choice of no tool.
    """
    rules = _Rules()
    try:
        calls = _calls(tools, rules)
    except RecursionError:
        raise OptionError("tools: a schema is nested too deep") from None
    if choice in ("auto", "required"):
        if not calls and choice == "required":
            raise OptionError("tools: a call is required, but there are none")
        call = rules.any_of(calls.values()) if calls else ""
        is_required = choice == "required"
        count = ("+" if is_required else "*") if parallel else ("" if is_required else "?")
        start = f"{'' if is_required else 'TEXT? '}{call + count if call else ''}"
    elif choice in calls:
        start = calls[choice]
    else:
        raise OptionError(f"tools: there is no tool {choice!r} to call, expected auto, required, {', '.join(calls)}")
    return f"start: {start}\n{_COMMON_RULES.strip()}\n{rules.text()}"


def _calls(tools: Sequence[Mapping[str, Any]], rules: "_Rules") -> dict[str, str]:
    """The rule of each tool's call, by the tool's name."""
    calls: dict[str, str] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise OptionError(f"tools[{index}] must be of type function and have a function, found {tool!r}")
        name = function.get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise OptionError(f"tools[{index}]: name must be 1 to 64 of a-z, A-Z, 0-9, _, . and -, found {name!r}")
        if name in calls:
            raise OptionError(f"tools[{index}]: there is a tool {name!r} already")
        schema = _Schema(rules, name, is_strict=function.get("strict") is True)
        arguments = schema.arguments(function.get("parameters"))
        calls[name] = rules.add(f'{CALL_START} "call:{name}" {arguments} {CALL_END}')
    return calls


class _Rules:
    """Rules of a grammar, one for each body."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def add(self, body: str) -> str:
        """The name of the rule with this body."""
        return self._names.setdefault(body, f"rule_{len(self._names)}")

    def any_of(self, bodies: Iterable[str]) -> str:
        return self.add(" | ".join(dict.fromkeys(bodies)))

    def text(self) -> str:
        return "".join(f"{name}: {body}\n" for body, name in self._names.items())


class _Schema:
    """Makes rules of the JSON Schema of one tool's parameters."""

    def __init__(self, rules: _Rules, tool: str, *, is_strict: bool) -> None:
        self._rules = rules
        self._tool = tool
        self._is_strict = is_strict

    def arguments(self, parameters: Any) -> str:
        """What a call's arguments may be: always an object, an empty one if no parameters are declared."""
        if parameters is None:
            return '"{" "}"'
        schema = self._read(parameters, Mapping, "parameters")
        if "type" in schema and "object" not in self._types(schema):
            raise self._error(f"type must be object, found {schema['type']!r}")
        return self._value({**schema, "type": "object"})

    def _value(self, schema: Any) -> str:
        """What a value may be that satisfies the schema."""
        if schema is False:
            raise self._error("no value satisfies the schema false")
        if schema is True:
            return "any"
        self._read(schema, Mapping, "a schema")
        if "const" in schema or "enum" in schema:
            return self._literals(schema)
        if self._can_follow_any_of(schema):
            shared = {name: schema[name] for name in ("type",) if name in schema}
            return self._rules.any_of([self._value(_merge(shared, branch)) for branch in schema["anyOf"]])
        types = self._types(schema)
        if not types or not set(types) <= _FOLLOWED.keys():
            self._leave(schema, frozenset())
            return "any"
        self._leave(schema, frozenset().union(*(_FOLLOWED[name] for name in types)))
        return self._rules.any_of([self._typed(name, schema) for name in types])

    def _typed(self, name: str, schema: Mapping[str, Any]) -> str:
        if name == "object":
            return self._object(schema)
        if name != "array":
            return _SCALARS[name]
        items = schema.get("items", True)
        if isinstance(items, list):
            # Of older drafts: a schema for each place.
            self._leave({"items": items}, frozenset())
            items = True
        return _list_of("[", self._value(items), "]")

    def _object(self, schema: Mapping[str, Any]) -> str:
        others = schema.get("additionalProperties", True)
        required = self._names(schema.get("required", []), "required")
        if "properties" not in schema and not required:
            return '"{" "}"' if others is False else _list_of("{", f'key ":" {self._value(others)}', "}")
        listed = self._read(schema.get("properties", {}), Mapping, "properties")
        properties = dict.fromkeys(required, others) | dict(listed)
        # What the object may begin with, and the rule of what may follow, at each property from the last to the first.
        beginnings: list[str] = []
        rest = ""
        # The template's order leaves case aside.
        for name in sorted(properties, key=lambda name: (name.lower(), name), reverse=True):
            if properties[name] is False and name not in required:
                continue
            pair = self._rules.add(f'{self._key(name)} ":" {self._value(properties[name])}')
            beginnings = [f"{pair} {rest}", *([] if name in required else beginnings)]
            rest = self._rules.add(f'"," {pair} {rest}' if name in required else f'("," {pair})? {rest}')
        if not beginnings:
            return '"{" "}"'
        return f'"{{" {self._rules.any_of(beginnings)}{"" if required else "?"} "}}"'

    def _can_follow_any_of(self, schema: Mapping[str, Any]) -> bool:
        """Whether the branches, with the type beside them, say all: else they are left, and the rest is followed."""
        if "anyOf" not in schema:
            return False
        branches = self._read(schema["anyOf"], list, "anyOf")
        named = schema.get("type")
        types = [branch["type"] for branch in branches if isinstance(branch, Mapping) and "type" in branch]
        has_one_type = named is None or all(found == named for found in types)
        return bool(branches) and has_one_type and schema.keys() <= _ANNOTATIONS | {"anyOf", "type"}

    def _literals(self, schema: Mapping[str, Any]) -> str:
        keyword = "const" if "const" in schema else "enum"
        types = set(self._types(schema))
        is_known = types <= _FOLLOWED.keys()
        self._leave(schema, frozenset({keyword, "type"} if is_known else {keyword}))
        values = [schema["const"]] if keyword == "const" else self._read(schema["enum"], list, "enum")
        kept = [value for value in values if not types or not is_known or _json_types(value) & types]
        if not kept:
            raise self._error(f"no value of {keyword} is of the type beside it")
        return self._rules.any_of([self._literal(value) for value in kept])

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return self._quoted(value)
        if isinstance(value, Mapping):
            names = sorted(value, key=lambda name: (name.lower(), name))
            return _sequence("{", [f'{self._key(name)} ":" {self._literal(value[name])}' for name in names], "}")
        if isinstance(value, list):
            return _sequence("[", [self._literal(item) for item in value], "]")
        try:
            return _text(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise self._error(f"{value!r} is not JSON") from None

    def _key(self, name: str) -> str:
        """A property's name, bare where that is read back as the same name."""
        is_bare = name == name.strip(BLANKS) and not name.startswith(('"', "'"))
        if not name or not is_bare or any(mark in name for mark in (*":{}[]", CALL_END, STRING_MARK)):
            return self._quoted(name)
        return _text(name)

    def _quoted(self, text: str) -> str:
        if STRING_MARK in text:
            raise self._error(f"{text!r} holds the mark that ends a string")
        return f"{STRING_MARK} {_text(text)} {STRING_MARK}" if text else f"{STRING_MARK} {STRING_MARK}"

    def _types(self, schema: Mapping[str, Any]) -> list[str]:
        """The types a value may have, as far as the schema says."""
        named = schema.get("type")
        if named is None:
            return [name for name, keyword in (("object", "properties"), ("array", "items")) if keyword in schema]
        return self._names([named] if isinstance(named, str) else named, "type")

    def _leave(self, schema: Mapping[str, Any], followed: frozenset[str]) -> None:
        """Leave what is not followed to the caller. Raises OptionError if the tool is strict."""
        left = [name for name in schema if name not in followed | _ANNOTATIONS]
        if left and self._is_strict:
            raise self._error(f"it is strict, but {', '.join(left)} cannot be followed")

    def _read(self, value: Any, kind: type, what: str) -> Any:
        if not isinstance(value, kind):
            raise self._error(f"{what} must be {_EXPECTED[kind]}, found {value!r}")
        return value

    def _names(self, value: Any, what: str) -> list[str]:
        names: list[str] = self._read(value, list, what)
        return [self._read(name, str, f"a name in {what}") for name in names]

    def _error(self, message: str) -> OptionError:
        return OptionError(f"tools: parameters of {self._tool}: {message}")


def _merge(shared: Mapping[str, Any], branch: Any) -> Any:
    """A branch of anyOf together with what is beside it."""
    if isinstance(branch, Mapping):
        return {**shared, **branch}
    return shared if branch is True and shared else branch


def _json_types(value: Any) -> set[str]:
    """The types of JSON Schema that a value has."""
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == value // 1 else {"number"}
    return {"string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array"}


def _text(text: str) -> str:
    """What matches just this text: strings of Lark have JSON's escapes."""
    return json.dumps(text)


def _sequence(opener: str, items: Iterable[str], closer: str) -> str:
    return " ".join((_text(opener), ' "," '.join(items), _text(closer)))


def _list_of(opener: str, item: str, closer: str) -> str:
    return f'"{opener}" ({item} ("," {item})*)? "{closer}"'
