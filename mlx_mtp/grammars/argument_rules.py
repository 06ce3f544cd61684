"""Grammar rules for the arguments of a tool call, made from a JSON Schema, in the syntax of Gemma 4."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_mtp.decoding.constraints import lark_problem, schema_problem
from mlx_mtp.errors import OptionError
from mlx_mtp.text.call_syntax import STRING_MARK

from .schemas import BY_TYPE, COMBINING, NUMERIC, Document, Flat, LeftOut, NotFollowedError, canonical, json_types
from .string_rules import format_terminal, length_terminal, search_terminal

_BARE_KEY = re.compile(r"[\w.-]+( [\w.-]+)*")
# The grammar matches special tokens as tokens. But a mark that other tokens spell out also ends a string, or begins a
# call. So the text of a string must not contain the string mark.
_NO_MARK = r'~/(?s:.*)<\|"\|>(?s:.*)/'
# The length of numbers has a limit, because without it a model may never end a number.
COMMON_RULES = rf"""
STRING: /(?s:.+)/ & {_NO_MARK}
INTEGER: /-?(0|[1-9][0-9]{{0,15}})/
NUMBER: /-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,15}})?([eE][+-]?[0-9]{{1,2}})?/
KEY: /[^\s:,<{{}}\[\]]([^\t\r\n:,<{{}}\[\]]{{0,62}}[^\s:,<{{}}\[\]])?/
string: {STRING_MARK} STRING? {STRING_MARK}
boolean: "true" | "false"
key: KEY | string
pair: key ":" any
any: string | NUMBER | boolean | "null" | "{{" (pair ("," pair)*)? "}}" | "[" (any ("," any)*)? "]"
""".strip()
# The largest absolute value of a number with bounds, and its smallest step.
_LARGEST = 10**16
_STEP = 1e-10
# The keywords that the rules follow, by type. JSON Schema has no other types than these keys.
_FOLLOWED = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems"}),
    "string": frozenset(BY_TYPE["string"]),
    "number": frozenset(NUMERIC),
    "integer": frozenset(NUMERIC),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}


class Rules:
    """The rules of a grammar. Equal bodies share one rule."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._reserved: dict[str, str] = {}

    def add(self, body: str) -> str:
        """Add a rule with this body, if it is new. Return its name."""
        return self._names.setdefault(body, f"rule_{len(self._names)}")

    def terminal(self, body: str) -> str:
        """Add a terminal with this body, if it is new. Return its name."""
        return self._names.setdefault(body, f"TERMINAL_{len(self._names)}")

    def reserve(self) -> str:
        """Reserve the name of a rule that is defined later, so that its body can refer to itself."""
        name = f"named_{len(self._reserved)}"
        self._reserved[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        """Set the body of a reserved rule."""
        self._reserved[name] = body

    def any_of(self, bodies: Iterable[str]) -> str:
        """Add a rule that matches any of the bodies. Return its name."""
        return self.add(" | ".join(dict.fromkeys(bodies)))

    def text(self) -> str:
        """Return all rules as the text of a Lark grammar."""
        pairs = [*self._reserved.items(), *((name, body) for body, name in self._names.items())]
        return "".join(f"{name}: {body}\n" for name, body in pairs)


class ArgumentRules:
    """The rules for the JSON Schema of one tool's parameters. Keywords that they cannot follow go to `left_out`."""

    def __init__(self, rules: Rules, parameters: Any, left_out: LeftOut) -> None:
        self._rules = rules
        self._parameters = parameters
        self._left_out = left_out
        self._document = Document(parameters, left_out.owner)
        # The names of the rules for schemas that may contain themselves, by the canonical text of the schema.
        self._named: dict[str, str] = {}

    def arguments(self) -> str:
        """Return the rule of a call's arguments: an object, which is empty if the tool declares no parameters.

        Raises OptionError if the parameters are malformed, or if no value satisfies their schema.
        """
        if self._parameters is None:
            return '"{" "}"'
        if not isinstance(self._parameters, Mapping):
            raise self._error(f"parameters must be an object, found {self._parameters!r}")
        schema = self._document.read(self._parameters)
        if "object" not in schema.get("type", ["object"]):
            raise self._error(f"type must be object, found {self._parameters['type']!r}")
        return self._value({**schema, "type": ["object"]}, "")

    def _value(self, schema: Any, path: str) -> str:
        """Return the rule of a value that satisfies the schema. `path` is its place in the arguments."""
        if schema is False:
            raise self._error("no value satisfies the schema false")
        if schema is True:
            return "any"
        kept = self._document.read(schema)
        if kept.keys() == {"anyOf"} and kept["anyOf"]:
            return self._rules.any_of([self._value(branch, path) for branch in kept["anyOf"]])
        if kept.keys() == {"oneOf"} and kept["oneOf"] and self._document.are_exclusive(kept["oneOf"]):
            return self._value({"anyOf": kept["oneOf"]}, path)
        if kept.keys() == {"allOf"} and len(kept["allOf"]) == 1:
            return self._value(kept["allOf"][0], path)
        if "$ref" not in kept and "allOf" not in kept:
            return self._joined(kept, path)
        key = canonical(kept)
        if key not in self._named:
            self._named[key] = name = self._rules.reserve()
            self._rules.define(name, self._referred(kept, path))
        return self._named[key]

    def _referred(self, kept: Mapping[str, Any], path: str) -> str:
        if kept.keys() == {"$ref"}:
            try:
                return self._value(self._document.resolve(kept["$ref"]), path)
            except NotFollowedError:
                pass
        return self._joined(kept, path)

    def _joined(self, kept: Mapping[str, Any], path: str) -> str:
        """Return the rule of a value that satisfies a schema and the schemas that it combines."""
        kept = dict(kept)
        if "oneOf" in kept and not self._document.are_exclusive(kept["oneOf"]):
            self._left_out.add(["oneOf"], path)
            kept["allOf"] = [*kept.get("allOf", []), {"anyOf": kept.pop("oneOf")}]
        while not (flats := self._flatten(kept, path)):
            pass
        return self._rules.any_of([self._flat(flat, path) for flat in flats])

    def _flatten(self, kept: dict[str, Any], path: str) -> list[Flat]:
        """Return the flat alternatives of a schema.

        If a keyword cannot be followed, remove it from `kept` and return no alternatives.
        """
        keyword = None
        try:
            if flats := self._document.flatten(kept):
                return flats
        except NotFollowedError as error:
            keyword = str(error)
        left = [keyword] if keyword in kept else [name for name in COMBINING if name in kept]
        if not left:
            raise self._error(f"no value satisfies {json.dumps(kept)}")
        self._left_out.add([keyword] if keyword else left, path)
        for name in left:
            del kept[name]
        return []

    def _flat(self, schema: Flat, path: str) -> str:
        """Return the rule of a value that satisfies a flat schema."""
        if "enum" in schema:
            return self._literals(schema, path)
        types = _types(schema)
        if not types or not set(types) <= _FOLLOWED.keys():
            self._left_out.add(schema, path)
            return "any"
        followed = frozenset({"type"}).union(*(_FOLLOWED[name] for name in types))
        schema = _with_named_properties(schema)
        self._left_out.add([name for name in schema if name not in followed and _applies(name, types)], path)
        return self._rules.any_of([self._typed(name, schema, path) for name in types])

    def _typed(self, name: str, schema: Flat, path: str) -> str:
        if name == "object":
            return self._object(schema, path)
        if name == "array":
            return self._array(schema, path)
        if name == "string":
            return self._string(schema, path)
        if name in ("number", "integer"):
            return self._number(name, schema, path)
        return "boolean" if name == "boolean" else '"null"'

    def _object(self, schema: Flat, path: str) -> str:
        others = schema.get("additionalProperties", True)
        if "patternProperties" in schema:
            others = {"anyOf": [*schema["patternProperties"].values(), *([] if others is False else [others])]}
        required = schema.get("required", [])
        if "properties" not in schema and not required:
            if others is False:
                return '"{" "}"'
            return _list_of("{", f'key ":" {self._value(others, f"{path}.*")}', "}")
        properties = dict.fromkeys(required, others) | schema.get("properties", {})
        # The loop goes from the last property to the first. `beginnings` are the possible beginnings of the object, and
        # `rest` is the rule of the properties that may follow.
        beginnings: list[str] = []
        rest = ""
        # The order of the chat template ignores case.
        for name in sorted(properties, key=lambda name: (name.lower(), name), reverse=True):
            if properties[name] is False and name not in required:
                continue
            pair = self._rules.add(f'{self._key(name)} ":" {self._value(properties[name], f"{path}.{name}")}')
            beginnings = [f"{pair} {rest}", *([] if name in required else beginnings)]
            rest = self._rules.add(f'"," {pair} {rest}' if name in required else f'("," {pair})? {rest}')
        if not beginnings:
            return '"{" "}"'
        return f'"{{" {self._rules.any_of(beginnings)}{"" if required else "?"} "}}"'

    def _array(self, schema: Flat, path: str) -> str:
        items, first = schema.get("items", True), schema.get("prefixItems", [])
        if isinstance(items, list):
            # In older drafts of JSON Schema, `items` may hold one schema for each place.
            items, first = schema.get("additionalItems", True), items
        least = math.ceil(schema.get("minItems", 0))
        most = math.floor(schema["maxItems"]) if "maxItems" in schema else None
        if items is False:
            most = len(first) if most is None else min(most, len(first))
        if most is not None and least > most:
            raise self._error(f"no list has at least {least} and at most {most} items")
        first = [self._value(item, f"{path}[{index}]") for index, item in enumerate(first[:most])]
        item = "" if len(first) == most else self._value(items, f"{path}[]")
        if most == 0:
            return '"[" "]"'
        beginning = first.pop(0) if first else item
        count = len(first) + 1
        rest = ""
        if item and most != count:
            rest = f'("," {item}){_count(least - count, None if most is None else most - count)}'
        for place, rule in reversed(list(enumerate(first, 2))):
            rest = self._rules.add(f'"," {rule} {rest}' if place <= least else f'("," {rule} {rest})?')
        return f'"[" ({beginning} {rest}){"" if least else "?"} "]"'

    def _string(self, schema: Flat, path: str) -> str:
        parts = []
        if "minLength" in schema or "maxLength" in schema:
            least = max(0, math.ceil(schema.get("minLength", 0)))
            most = math.floor(schema["maxLength"]) if "maxLength" in schema else None
            if most is not None and least > most:
                raise self._error(f"no string has at least {least} and at most {most} characters")
            parts.append(length_terminal(least, most))
        for pattern in schema.get("pattern", []):
            terminal = search_terminal(pattern)
            if lark_problem(f"start: PATTERN\nPATTERN: {terminal}") is None:
                parts.append(terminal)
            else:
                self._left_out.add(["pattern"], path)
        for name in schema.get("format", []):
            if (format_ := format_terminal(name)) is not None:
                parts.append(format_)
            else:
                self._left_out.add(["format"], path)
        if not parts:
            return "string"
        terminal = self._rules.terminal(" & ".join([*parts, _NO_MARK]))
        return f"{STRING_MARK} {terminal} {STRING_MARK}"

    def _number(self, name: str, schema: Flat, path: str) -> str:
        bounds = {keyword: schema[keyword] for keyword in NUMERIC if keyword in schema}
        if not bounds:
            return name.upper()
        # A bound beyond the largest number has no effect.
        kept = {
            keyword: bound
            for keyword, bound in bounds.items()
            if keyword == "multipleOf" or bound * (-1 if "inimum" in keyword else 1) < _LARGEST
        }
        if name == "integer" and not kept:
            return "INTEGER"
        wanted = {"x-guidance": {"whitespace_flexible": False}, "type": name, **kept}
        if name == "number":
            wanted.setdefault("multipleOf", _STEP)
        if max(kept.get("minimum", 0), kept.get("exclusiveMinimum", 0)) < _LARGEST:
            wanted.setdefault("maximum", _LARGEST - 1)
        if min(kept.get("maximum", 0), kept.get("exclusiveMaximum", 0)) > -_LARGEST:
            wanted.setdefault("minimum", 1 - _LARGEST)
        problem = schema_problem(wanted)
        if problem is None:
            return self._rules.add(f"%json {json.dumps(wanted)}")
        if problem.startswith("Unsatisfiable"):
            raise self._error(f"no {name} satisfies {json.dumps(bounds)}")
        self._left_out.add(bounds, path)
        return name.upper()

    def _literals(self, schema: Flat, path: str) -> str:
        types = schema.get("type", [])
        is_known = set(types) <= _FOLLOWED.keys()
        kept = [value for value in schema["enum"] if not types or not is_known or json_types(value) & set(types)]
        if not kept:
            raise self._error("no value of enum is of the type beside it")
        # With listed values, `format` needs no check: the author of the schema chose them.
        followed = {"enum", "format", "type"} if is_known else {"enum", "format"}
        found = {name for value in kept for name in json_types(value)}
        self._left_out.add([name for name in schema if name not in followed and _applies(name, found)], path)
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
        """Return the terminal of a property's name. It is without quotes if no reader can misread the bare name."""
        return _text(name) if _BARE_KEY.fullmatch(name) else self._quoted(name)

    def _quoted(self, text: str) -> str:
        if STRING_MARK in text:
            raise self._error(f"{text!r} holds the mark that ends a string")
        return f"{STRING_MARK} {_text(text)} {STRING_MARK}" if text else f"{STRING_MARK} {STRING_MARK}"

    def _error(self, message: str) -> OptionError:
        return self._document.error(message)


def _types(schema: Flat) -> list[str]:
    """Return the types that the schema names.

    Without `type`, these are the types that the other keywords belong to.
    """
    if "type" in schema:
        named: list[str] = schema["type"]
        return named
    return [name for name in ("object", "array", "string", "number") if schema.keys() & set(BY_TYPE[name])]


def _applies(keyword: str, types: Iterable[str]) -> bool:
    """Return whether a keyword can restrict values of these types."""
    is_for_types = any(keyword in keywords for keywords in BY_TYPE.values())
    return not is_for_types or any(keyword in BY_TYPE.get(name, ()) for name in types)


def _with_named_properties(schema: Flat) -> Flat:
    """Turn a map with listed keys (`propertyNames` with `enum`) into an object with these properties."""
    names = schema.get("propertyNames")
    listed = names.get("enum") if isinstance(names, Mapping) and names.keys() <= {"type", "enum"} else None
    if "properties" in schema or not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return schema
    kept = {keyword: value for keyword, value in schema.items() if keyword != "propertyNames"}
    return {**kept, "properties": dict.fromkeys(listed, schema.get("additionalProperties", True))}


def _text(text: str) -> str:
    """Return a Lark string that matches exactly this text. Lark strings use JSON's escapes."""
    return json.dumps(text)


def _sequence(opener: str, items: Iterable[str], closer: str) -> str:
    return " ".join((_text(opener), ' "," '.join(items), _text(closer)))


def _list_of(opener: str, item: str, closer: str) -> str:
    return f'"{opener}" ({item} ("," {item})*)? "{closer}"'


def _count(least: int, most: int | None) -> str:
    least = max(0, least)
    return ("*" if least == 0 else f"{{{least},}}") if most is None else f"{{{least},{most}}}"
