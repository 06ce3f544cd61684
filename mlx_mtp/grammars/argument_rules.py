"""Grammar rules for the arguments of a tool call, made from a JSON Schema, in the syntax of Gemma 4."""

import json
import math
from collections.abc import Mapping
from typing import Any

from mlx_mtp.errors import OptionError

from .lark_rules import Rules, list_of, times
from .leaf_rules import LeafRules, applies
from .schemas import BY_TYPE, COMBINING, NUMERIC, TYPES, Document, Flat, LeftOut, NotFollowedError, canonical

# The keywords that the rules follow, by type.
_FOLLOWED = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems"}),
    "string": frozenset(BY_TYPE["string"]),
    "number": frozenset(NUMERIC),
    "integer": frozenset(NUMERIC),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}


class ArgumentRules:
    """The rules for the JSON Schema of one tool's parameters. Keywords that they cannot follow go to `left_out`."""

    def __init__(self, rules: Rules, parameters: Any, left_out: LeftOut) -> None:
        self._rules = rules
        self._parameters = parameters
        self._left_out = left_out
        self._document = Document(parameters, left_out.owner)
        self._leaves = LeafRules(rules, self._document, left_out)
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
        removed = [keyword] if keyword in kept else [name for name in COMBINING if name in kept]
        if not removed:
            raise self._error(f"no value satisfies {json.dumps(kept)}")
        self._left_out.add([keyword] if keyword else removed, path)
        for name in removed:
            del kept[name]
        return []

    def _flat(self, schema: Flat, path: str) -> str:
        """Return the rule of a value that satisfies a flat schema."""
        if "enum" in schema:
            return self._leaves.literals(schema, path)
        types = _types(schema)
        if not types or not set(types) <= set(TYPES):
            self._left_out.add(schema, path)
            return "any"
        followed = frozenset({"type"}).union(*(_FOLLOWED[name] for name in types))
        schema = _with_named_properties(schema)
        self._left_out.add([name for name in schema if name not in followed and applies(name, types)], path)
        return self._rules.any_of([self._typed(name, schema, path) for name in types])

    def _typed(self, name: str, schema: Flat, path: str) -> str:
        if name == "object":
            return self._object(schema, path)
        if name == "array":
            return self._array(schema, path)
        if name == "string":
            return self._leaves.string(schema, path)
        if name in ("number", "integer"):
            return self._leaves.number(name, schema, path)
        return "boolean" if name == "boolean" else '"null"'

    def _object(self, schema: Flat, path: str) -> str:
        others = schema.get("additionalProperties", True)
        if "patternProperties" in schema:
            others = {"anyOf": [*schema["patternProperties"].values(), *([] if others is False else [others])]}
        required = schema.get("required", [])
        if "properties" not in schema and not required:
            if others is False:
                return '"{" "}"'
            return list_of("{", f'key ":" {self._value(others, f"{path}.*")}', "}")
        properties = dict.fromkeys(required, others) | schema.get("properties", {})
        # The loop goes from the last property to the first. `beginnings` are the possible beginnings of the object, and
        # `rest` is the rule of the properties that may follow.
        beginnings: list[str] = []
        rest = ""
        # The order of the chat template ignores case.
        for name in sorted(properties, key=lambda name: (name.lower(), name), reverse=True):
            if properties[name] is False and name not in required:
                continue
            pair = self._rules.add(f'{self._leaves.key(name)} ":" {self._value(properties[name], f"{path}.{name}")}')
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
            rest = f'("," {item}){times(least - count, None if most is None else most - count)}'
        for place, rule in reversed(list(enumerate(first, 2))):
            rest = self._rules.add(f'"," {rule} {rest}' if place <= least else f'("," {rule} {rest})?')
        return f'"[" ({beginning} {rest}){"" if least else "?"} "]"'

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


def _with_named_properties(schema: Flat) -> Flat:
    """Turn a map with listed keys (`propertyNames` with `enum`) into an object with these properties."""
    names = schema.get("propertyNames")
    listed = names.get("enum") if isinstance(names, Mapping) and names.keys() <= {"type", "enum"} else None
    if "properties" in schema or not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return schema
    kept = {keyword: value for keyword, value in schema.items() if keyword != "propertyNames"}
    return {**kept, "properties": dict.fromkeys(listed, schema.get("additionalProperties", True))}
