"""A tool's JSON Schema as a help in reading: the types a value may have, and the names it may hold.

Nothing is checked here. A schema that says nothing, or that cannot be understood, allows everything.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
# References that lead to each other are followed this far.
_MOST_STEPS = 32


class ArgumentSchema:
    """One value's schema, with references and alternatives resolved. `root` is where references are looked up."""

    def __init__(self, schema: Any = None, root: Any = None) -> None:
        self._root = schema if root is None else root
        self._schema = schema

    @cached_property
    def types(self) -> frozenset[str] | None:
        """The types of JSON Schema that the value may have; None if it may have any."""
        found = [_branch_types(branch) for branch in self._branches]
        known = [types for types in found if types is not None]
        return frozenset().union(*known) if known and len(known) == len(found) else None

    def allows(self, kind: str) -> bool:
        """Whether the value may be of this type."""
        return self.types is None or kind in self.types or (kind == "integer" and "number" in self.types)

    @cached_property
    def names(self) -> dict[str, "ArgumentSchema"]:
        """The schemas of an object's properties; empty if none are declared."""
        found: dict[str, ArgumentSchema] = {}
        for branch in self._branches:
            properties = branch.get("properties")
            if isinstance(properties, Mapping):
                found |= {name: ArgumentSchema(schema, self._root) for name, schema in properties.items()}
        return found

    @cached_property
    def required(self) -> frozenset[str]:
        """The properties that every alternative requires."""
        found = [branch.get("required") for branch in self._branches]
        lists = [frozenset(names) if isinstance(names, list) else frozenset() for names in found]
        return frozenset.intersection(*lists)

    @cached_property
    def items(self) -> "ArgumentSchema":
        """The schema of a list's items."""
        found = [branch["items"] for branch in self._branches if isinstance(branch.get("items"), Mapping)]
        return ArgumentSchema(found[0], self._root) if len(found) == 1 else ANYTHING

    def member(self, name: str) -> "ArgumentSchema":
        """The schema of an object's property."""
        return self.names.get(name, ANYTHING)

    @cached_property
    def _branches(self) -> list[Mapping[str, Any]]:
        return _branches(self._schema, self._root, _MOST_STEPS)


ANYTHING = ArgumentSchema()


def _branches(schema: Any, root: Any, steps: int) -> list[Mapping[str, Any]]:
    """The alternatives of a schema, none of which refers to another."""
    if not isinstance(schema, Mapping) or not steps:
        return [{}]
    rest = {name: value for name, value in schema.items() if name not in ("$ref", "anyOf", "oneOf", "allOf")}
    if "$ref" in schema:
        return _branches(_merge(rest, _lookup(root, schema["$ref"])), root, steps - 1)
    if isinstance(schema.get("allOf"), list):
        for part in schema["allOf"]:
            for branch in _branches(part, root, steps - 1)[:1]:
                rest = _merge(rest, branch)
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list) and schema[keyword]:
            merged = [_merge(rest, branch) for branch in schema[keyword]]
            return [found for branch in merged for found in _branches(branch, root, steps - 1)]
    return [rest]


def _merge(schema: dict[str, Any], other: Any) -> dict[str, Any]:
    """A schema together with one beside it."""
    if not isinstance(other, Mapping):
        return schema
    merged = {**other, **schema}
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(keyword), Mapping) and isinstance(other.get(keyword), Mapping):
            merged[keyword] = {**other[keyword], **schema[keyword]}
    if isinstance(schema.get("required"), list) and isinstance(other.get("required"), list):
        merged["required"] = [*schema["required"], *other["required"]]
    return merged


def _lookup(root: Any, reference: Any) -> Any:
    """What a reference within the schema points at; None if there is nothing."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found


def _branch_types(schema: Mapping[str, Any]) -> frozenset[str] | None:
    named = schema.get("type")
    if named is not None:
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else [None]
        types = {name.lower() if isinstance(name, str) else None for name in names}
        if not types <= _TYPES:
            return None
    elif "const" in schema or isinstance(schema.get("enum"), list):
        types = {_json_type(value) for value in ([schema["const"]] if "const" in schema else schema["enum"])}
    else:
        types = {name for name, keyword in (("object", "properties"), ("array", "items")) if keyword in schema}
        if not types:
            return None
    if schema.get("nullable") is True:
        types = types | {"null"}
    return frozenset(name for name in types if name is not None)


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if value == value // 1 else "number"
    return "string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array"
