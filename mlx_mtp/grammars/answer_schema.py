"""Adaptation of a client's JSON Schema for answers to the keywords that llguidance can enforce."""

from collections.abc import Callable, Mapping
from typing import Any

from mlx_mtp.errors import OptionError
from mlx_mtp.grammars.compiler import schema_problem

from .schemas import COMBINING, RESTRICTING, CircleError, Document, LeftOut, NotFollowedError, restricting

# Keywords whose values are one schema, a list of schemas, or schemas by name.
_ONE = frozenset(
    {"items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
# Keywords that are never left out. If one of these cannot be followed, the whole schema is rejected.
_KEPT = frozenset({"type", "enum", "const", "properties", "required", "items", "anyOf", "$ref"})


def answer_schema(
    schema: Mapping[str, Any], field: str, *, is_strict: bool
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Adapt a client's schema for `GenerationOptions.json_schema`.

    Return the adapted schema, and the keywords that it leaves out, as `PLACE: KEYWORD`. `field` is the name of the
    request field with the schema, for messages.

    Raises OptionError if the schema is malformed, or is strict and cannot be followed in full.
    """
    left_out = LeftOut(field, field, is_strict=is_strict)
    try:
        document = Document(schema, left_out.owner)
        _check_root(schema, document)
        found = _rebuild(schema, lambda part, path: _plain(part, path, document, left_out), "")
        if schema_problem(found) is not None:
            found = _rebuild(found, lambda part, path: _followed(part, path, left_out), "")
        problem = schema_problem(found)
        if problem is not None:
            found, problem = _without_one(found, problem, left_out)
    except RecursionError:
        raise OptionError(f"{field}: the schema is nested too deep") from None
    if problem is not None:
        raise OptionError(f"{field}: the schema cannot be followed: {problem}")
    return found, tuple(left_out.keywords)


Change = Callable[[dict[str, Any], str], dict[str, Any]]


def _rebuild(schema: Any, change: Change, path: str) -> Any:
    """Apply `change` to each part of a schema, from the innermost part to the whole. Return the new schema."""
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, Mapping):
            middle = "" if name == "properties" else f".{name}"
            value = {key: _rebuild(part, change, f"{path}{middle}.{key}") for key, part in value.items()}
        elif name in _LIST and isinstance(value, list):
            value = [_rebuild(part, change, f"{path}.{name}[{index}]") for index, part in enumerate(value)]
        elif name in _ONE:
            ending = {"items": "[]", "additionalProperties": ".*"}.get(name, f".{name}")
            value = _rebuild(value, change, path + ending)
        found[name] = value
    return change(found, path)


def _check_root(schema: Mapping[str, Any], document: Document) -> None:
    """Check that some value satisfies the schema. Raises OptionError if no value does.

    The check does not look into objects and lists.
    """
    try:
        alternatives = document.flatten(schema)
    except CircleError:
        alternatives = []
    except NotFollowedError:
        return
    if not alternatives:
        raise document.error("no value satisfies the schema")


def _check_reference(reference: Any, document: Document) -> None:
    """Check a reference. Raises OptionError if it leads only to itself."""
    try:
        document.resolve(reference)
    except CircleError:
        raise document.error(f"$ref {reference!r} leads to nothing but itself") from None
    except NotFollowedError:
        return


def _plain(schema: dict[str, Any], path: str, document: Document, left_out: LeftOut) -> dict[str, Any]:
    """Replace `oneOf` and `nullable` by keywords that llguidance follows.

    llguidance does not treat `oneOf` as exclusive, and it ignores `nullable`. Keywords that restrict nothing are
    dropped.
    """
    document.read(schema)
    if "$ref" in schema:
        _check_reference(schema["$ref"], document)
    kept = restricting(schema)
    found = {name: kept.get(name, value) for name, value in schema.items() if name in kept or name not in RESTRICTING}
    if "oneOf" in found:
        if not document.are_exclusive(found["oneOf"]):
            left_out.add(["oneOf"], path)
        branches = {"anyOf": found.pop("oneOf")}
        found = (
            {**found, **branches} if "anyOf" not in found else {**found, "allOf": [*found.get("allOf", []), branches]}
        )
    if found.pop("nullable", None) is True:
        # The definitions stay at the root, because references point to them there.
        outer: dict[str, Any] = {name: found.pop(name) for name in ("$defs", "definitions") if name in found}
        found = {"anyOf": [found, {"type": "null"}], **outer}
    return found


def _followed(schema: dict[str, Any], path: str, left_out: LeftOut) -> dict[str, Any]:
    """Remove the keywords that llguidance rejects.

    Each keyword is tried together with the keywords that are already kept.
    """
    kept = {name: value for name, value in schema.items() if name in _KEPT or name not in RESTRICTING}
    if schema_problem(_alone(schema)) is None or schema_problem(_alone(kept)) is not None:
        return schema
    for name in [name for name in schema if name not in kept]:
        if schema_problem(_alone({**kept, name: schema[name]})) is None:
            kept[name] = schema[name]
    left_out.add([name for name in schema if name not in kept], path)
    return {name: value for name, value in schema.items() if name in kept}


def _without_one(schema: Any, problem: str, left_out: LeftOut) -> tuple[Any, str | None]:
    """Try to solve the problem by the removal of one keyword from the whole schema.

    This is for a keyword that llguidance rejects only together with the schema that a reference points to. Return the
    new schema and None, or the old schema and the problem if no keyword solves it.
    """
    for name in sorted(RESTRICTING - _KEPT, key=lambda name: (name in COMBINING, name)):
        found, places = _without(schema, name)
        if places and schema_problem(found) is None:
            for path in places:
                left_out.add([name], path)
            return found, None
    return schema, problem


def _without(schema: Any, name: str) -> tuple[Any, list[str]]:
    """Remove a keyword from a schema. Return the new schema and the places of the keyword."""
    places: list[str] = []

    def change(part: dict[str, Any], path: str) -> dict[str, Any]:
        if name in part:
            places.append(path)
        return {keyword: value for keyword, value in part.items() if keyword != name}

    return _rebuild(schema, change, ""), places


def _alone(schema: Any) -> Any:
    """Return a schema without its references, in which the parts of an object or list may be any value."""
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("properties", "patternProperties") and isinstance(value, Mapping):
            found[name] = dict.fromkeys(value, True)
        elif name in ("allOf", "anyOf") and isinstance(value, list):
            found[name] = [_alone(part) for part in value]
        elif name == "prefixItems" and isinstance(value, list):
            found[name] = [True] * len(value)
        elif name in ("items", "additionalProperties"):
            found[name] = value is not False
        elif name not in ("$ref", "$defs", "definitions"):
            found[name] = value
    return found
