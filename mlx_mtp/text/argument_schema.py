"""JSON Schema of a tool's parameters as an aid to read arguments: allowed types and property names.

This module validates nothing. A schema that is empty or not understood allows every value.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
# This limit ends the resolution of references that lead to each other.
_MOST_STEPS = 32


class ArgumentSchema:
    """Schema of one value, with references and alternatives resolved.

    `root` is the schema in which references are looked up.
    """

    def __init__(self, schema: Any = None, root: Any = None) -> None:
        self._root = schema if root is None else root
        self._schema = schema

    @cached_property
    def types(self) -> frozenset[str] | None:
        """JSON Schema types that the value may have; None if it may have any type."""
        found = [_branch_types(branch) for branch in self._branches]
        known = [types for types in found if types is not None]
        return frozenset().union(*known) if known and len(known) == len(found) else None

    def allows(self, kind: str) -> bool:
        """Return whether the value may have the type `kind`."""
        return self.types is None or kind in self.types or (kind == "integer" and "number" in self.types)

    @cached_property
    def names(self) -> dict[str, "ArgumentSchema"]:
        """Schemas of an object's properties by name; empty if none are declared."""
        found: dict[str, ArgumentSchema] = {}
        for branch in self._branches:
            properties = branch.get("properties")
            if isinstance(properties, Mapping):
                found |= {name: ArgumentSchema(schema, self._root) for name, schema in properties.items()}
        return found

    @cached_property
    def required(self) -> frozenset[str]:
        """Names of the properties that every alternative requires."""
        found = [branch.get("required") for branch in self._branches]
        lists = [frozenset(names) if isinstance(names, list) else frozenset() for names in found]
        return frozenset.intersection(*lists)

    @cached_property
    def items(self) -> "ArgumentSchema":
        """Schema of a list's items; ANYTHING unless exactly one alternative declares it."""
        found = [branch["items"] for branch in self._branches if isinstance(branch.get("items"), Mapping)]
        return ArgumentSchema(found[0], self._root) if len(found) == 1 else ANYTHING

    def member(self, name: str) -> "ArgumentSchema":
        """Return the schema of an object's property; ANYTHING if it is not declared."""
        return self.names.get(name, ANYTHING)

    @cached_property
    def _branches(self) -> list[Mapping[str, Any]]:
        return _branches(self._schema, self._root, _MOST_STEPS)


ANYTHING = ArgumentSchema()


def _branches(schema: Any, root: Any, steps: int) -> list[Mapping[str, Any]]:
    """Return the alternatives of a schema. No alternative refers to another schema."""
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
    """Merge two schemas that apply together. `schema` has priority where both have a keyword."""
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
    """Return the value that a reference within the schema points to; None if there is none."""
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
