"""Tool declarations that a model can use, with schemas in the few keywords that Gemma's templates write.

A template writes a parameter's type, description, properties, items and required names. It also writes whether the
parameter is nullable, and the enum of a string. It loses every other keyword of JSON Schema. It writes nonsense for a
type that is a list or is missing.

This module converts `$ref`, `allOf`, `anyOf`, `oneOf`, `const`, lists of types and an `enum` without a type. The result
is a type with a description that tells the rest.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .call_syntax import STRING_MARK
from .markers import Markers

Schema = dict[str, Any]

# A template writes these keywords.
_WRITTEN = ("type", "description", "nullable", "enum", "properties", "required", "items")
# The older templates mistake parameters with these names for keywords, and omit them.
_TAKEN_FOR_KEYWORDS = ("description", "nullable", "properties", "required", "type")
# These are the types of JSON Schema except null. If a parameter may have several, the first of them is named.
_TYPES = ("string", "object", "array", "number", "integer", "boolean")
# This limits the schemas that are written for one tool. A schema that refers to itself in many ways is cut there.
_MOST_SCHEMAS = 500


def usable_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools, in OpenAI's format, with parameters that a template can write.

    A tool without parameters, or in another format, stays unchanged.
    """
    return [_usable_tool(tool) for tool in tools]


def _usable_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(parameters, Mapping) or not parameters:
        return dict(tool)
    # The type is always an object: a template closes the brace of the parameters after their type.
    found = {**_Reader(parameters).read(parameters), "type": "object"}
    return {**tool, "function": {**function, "parameters": found}}


def marked_tools(tools: Sequence[Mapping[str, Any]], markers: Markers) -> list[dict[str, Any]]:
    """Return tools from `usable_tools` with markers where a published template writes parameters wrong.

    The older templates omit a parameter with the name of a keyword. They misplace a comma where an object or an array
    has no description. All templates write an array of arrays as data.
    """
    return [_marked_tool(tool, markers) for tool in tools]


def _marked_tool(tool: Mapping[str, Any], markers: Markers) -> dict[str, Any]:
    function = tool.get("function")
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(parameters, Mapping) or not parameters:
        return dict(tool)
    return {**tool, "function": {**function, "parameters": _with_marked_parts(parameters, markers)}}


def _with_marked_parts(schema: Mapping[str, Any], markers: Markers) -> Schema:
    found = dict(schema)
    if "properties" in found:
        found["properties"] = {
            _marked_name(name, markers): _marked_property(part, markers) for name, part in found["properties"].items()
        }
    if "items" in found:
        found["items"] = _marked_items(found["items"], markers)
    return found


def _marked_name(name: str, markers: Markers) -> str:
    # A blank precedes the marker: templates sort names, and no character of a name sorts before a blank.
    return name + " " + markers.add(" ", ":{", ":{") if name in _TAKEN_FOR_KEYWORDS else name


def _marked_property(schema: Mapping[str, Any], markers: Markers) -> Schema:
    found = _with_marked_parts(schema, markers)
    if found["type"] in ("object", "array") and not found.get("description") and not found.get("nullable"):
        found["description"] = markers.add(f"description:{STRING_MARK}", f"{STRING_MARK},", "")
    return found


def _marked_items(schema: Mapping[str, Any], markers: Markers) -> Schema:
    """Return the schema of an array's items, with markers.

    The items of an array in an array become a property, which a template writes correctly. A second property marks
    their end.
    """
    if "items" not in schema:
        return _with_marked_parts(schema, markers)
    items = "a" + markers.add("properties:{a", ":{", "items:{")
    end = markers.add(f",b:{{description:{STRING_MARK}", f"{STRING_MARK},type:{STRING_MARK}STRING{STRING_MARK}}}}}", "")
    inner = _marked_property(schema["items"], markers)
    properties = {items: inner, "b": {"description": end, "type": "string"}}
    return {name: part for name, part in schema.items() if name != "items"} | {"properties": properties}


class _Reader:
    """Reader of the parts of one schema. References point into `root`."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._count = 0

    def read(self, schema: Any, followed: frozenset[str] = frozenset()) -> Schema:
        """Return a schema in the keywords that templates write. `followed` are the references that led to it."""
        self._count += 1
        if not isinstance(schema, Mapping) or self._count > _MOST_SCHEMAS:
            return {"type": "string"}
        flat, followed = self._flatten(schema, followed)
        types = _types(flat)
        found: Schema = {name: flat[name] for name in ("description", "nullable") if flat.get(name)}
        found["type"] = types[0]
        notes = [f"{' or '.join(types)}."] if len(types) > 1 else []
        if types[0] == "object" and isinstance(flat.get("properties"), Mapping):
            found["properties"] = {name: self.read(part, followed) for name, part in flat["properties"].items()}
            found["required"] = [name for name in flat.get("required") or [] if name in found["properties"]]
        if types[0] == "array" and isinstance(flat.get("items"), Mapping):
            found["items"] = self.read(flat["items"], followed)
        notes += _read_enum(flat, found)
        if notes:
            found["description"] = " ".join([*filter(None, [found.get("description")]), *notes])
        return {name: found[name] for name in _WRITTEN if name in found}

    def _flatten(self, schema: Mapping[str, Any], followed: frozenset[str]) -> tuple[Schema, frozenset[str]]:
        """Merge a schema with its references, `allOf`, `anyOf` and `oneOf`. Also return the followed references."""
        flat = _sound(schema)
        parts: list[Any] = flat.pop("allOf", None) or []
        if isinstance(reference := flat.pop("$ref", None), str):
            parts = [*parts, {"type": "object"} if reference in followed else self._lookup(reference)]
            followed |= {reference}
        for part in filter(_is_schema, parts):
            known, followed = self._flatten(part, followed)
            flat = _all_of(flat, known)
        branches = [part for name in ("anyOf", "oneOf") for part in flat.pop(name, None) or [] if _is_schema(part)]
        if branches:
            choices = []
            for branch in branches:
                choice, followed = self._flatten(branch, followed)
                choices.append(choice)
            flat = _all_of(flat, _any_of(choices))
        return flat, followed

    def _lookup(self, reference: str) -> Any:
        """Return the value that a reference such as `#/$defs/Name` points to; None if there is none."""
        found: Any = self._root if reference.startswith("#") else None
        for name in filter(None, reference[1:].split("/")):
            found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return found


# These keywords are read, with the type of their values. `required` is a list of names. `type` may be a list of names.
_VALUE_TYPES: dict[str, Any] = {
    **dict.fromkeys(("description", "$ref"), str),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "enum", "required"), list),
    "properties": Mapping,
    "type": str | list,
    "nullable": bool,
}


def _sound(schema: Mapping[str, Any]) -> Schema:
    """Return the schema without the keywords whose values make no sense."""
    sound = {name: value for name, value in schema.items() if isinstance(value, _VALUE_TYPES.get(name, object))}
    for name in ("required", "type"):
        if isinstance(sound.get(name), list):
            sound[name] = [item for item in sound[name] if isinstance(item, str)]
    return sound


def _is_schema(part: Any) -> bool:
    return isinstance(part, Mapping)


def _all_of(schema: Schema, part: Schema) -> Schema:
    """Merge two schemas that apply together. The description and the type of `schema` have priority."""
    joined = {**part, **schema}
    for name in ("properties", "required"):
        if name in part and name in schema:
            joined[name] = {**part[name], **schema[name]} if name == "properties" else [*part[name], *schema[name]]
    return joined


def _any_of(choices: Sequence[Schema]) -> Schema:
    """Merge choices to one schema: all types, properties and values, and the names that every choice requires."""
    kept = [choice for choice in choices if choice.get("type") != "null"]
    nullable = {"nullable": True} if len(kept) < len(choices) or any(c.get("nullable") for c in kept) else {}
    if len(kept) <= 1:
        return {**kept[0], **nullable} if kept else {"type": "null", **nullable}
    joined: Schema = {"type": list(dict.fromkeys(name for choice in kept for name in _types(choice))), **nullable}
    properties = [choice["properties"] for choice in kept if isinstance(choice.get("properties"), Mapping)]
    if properties:
        names = dict.fromkeys(name for one in properties for name in one)
        joined["properties"] = {name: {"anyOf": [one[name] for one in properties if name in one]} for name in names}
        required = [choice.get("required") or [] for choice in kept]
        joined["required"] = [name for name in required[0] if all(name in names for names in required)]
    values = [value for choice in kept for value in _values(choice)]
    if all(_values(choice) for choice in kept):
        joined["enum"] = values
    items = [choice["items"] for choice in kept if "items" in choice]
    return {**joined, "items": items[0]} if items else joined


def _types(schema: Schema) -> list[str]:
    """Return the types except null that a schema names or that its other keywords imply, at least one."""
    named = schema.get("type")
    types = [named] if isinstance(named, str) else list(named) if isinstance(named, list) else []
    if not types:
        types = [_type_of(value) for value in _values(schema)]
    if not types:
        types = ["object" if "properties" in schema else "array" if "items" in schema else "string"]
    return [name for name in _TYPES if name in types] or ["string"]


def _values(schema: Schema) -> list[Any]:
    """Return the only values that a schema allows; empty if it allows others."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else []


def _read_enum(schema: Schema, found: Schema) -> list[str]:
    """Put the values that a schema allows into its written form.

    Return a note of the values that no template writes.
    """
    values = _values(schema)
    if None in values or "null" in (schema.get("type") or ()):
        found["nullable"] = True
    values = [value for value in values if value is not None]
    if found["type"] == "string" and values and all(isinstance(value, str) for value in values):
        found["enum"] = list(dict.fromkeys(values))
        return []
    return [f"One of {', '.join(json.dumps(value, ensure_ascii=False) for value in values)}."] if values else []


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
    return names.get(type(value), "string")
