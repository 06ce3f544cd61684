"""A reader of JSON Schema: it resolves references and merges combined schemas into flat schemas.

A flat schema has no `$ref`, `allOf`, `anyOf`, `oneOf`, `const` or `nullable`. Its `pattern` and `format` are lists, and
a value must satisfy every item of these lists.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from mlx_mtp.errors import OptionError

Flat = dict[str, Any]

TYPES = ("object", "array", "string", "number", "integer", "null", "boolean")
NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Keywords that restrict values of one type.
BY_TYPE: dict[str, tuple[str, ...]] = {
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties"),
        *("maxProperties", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"),
    ),
    "array": (
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains"),
        *("minContains", "maxContains", "unevaluatedItems"),
    ),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": NUMERIC,
    "integer": NUMERIC,
}
COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_ANY_TYPE = ("type", "enum", "const", "nullable", "not", "if", "then", "else", "$dynamicRef", "$recursiveRef")
# The keywords that can restrict a value. All other keywords, for example title and default, restrict nothing.
RESTRICTING = frozenset(name for names in (*BY_TYPE.values(), COMBINING, _ANY_TYPE) for name in names)
# The values for which a keyword restricts nothing.
_TRIVIAL: dict[str, tuple[Any, ...]] = {
    "nullable": (False,),
    "uniqueItems": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "minProperties": (0,),
    "minLength": (0,),
}
_LARGER = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
_SMALLER = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"})
_NUMBER = int | float
_VALUE_TYPES: dict[str, Any] = {
    **dict.fromkeys(("properties", "patternProperties"), Mapping),
    **dict.fromkeys(("type", "required", "enum", "prefixItems", "allOf", "anyOf", "oneOf"), list),
    **dict.fromkeys(("pattern", "format"), str),
    **dict.fromkeys((*NUMERIC, "minLength", "maxLength", "minItems", "maxItems"), _NUMBER),
}
_EXPECTED: dict[Any, str] = {Mapping: "an object", list: "a list", str: "a string", _NUMBER: "a number"}
_MOST_ALTERNATIVES = 500
# The largest depth of a comparison of two alternatives.
_MOST_LEVELS = 3


class NotFollowedError(Exception):
    """An error for a keyword that flat schemas cannot express. The keyword is the only argument."""


class CircleError(NotFollowedError):
    """An error for a reference that leads only to itself."""


def restricting(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a schema that restrict something, with their values."""
    return _without_flags(
        {
            name: value
            for name, value in schema.items()
            if name in RESTRICTING and not any(value is same or value == same for same in _TRIVIAL.get(name, ()))
        }
    )


def canonical(value: Any) -> str:
    """Return a text that is equal for equal JSON values. In JSON Schema, 1 equals 1.0 but not true."""
    return json.dumps(_with_integers(value), sort_keys=True)


def _with_integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(name): _with_integers(item) for name, item in value.items()}
    return [_with_integers(item) for item in value] if isinstance(value, list) else value


def json_types(value: Any) -> set[str]:
    """Return the JSON Schema types of a value."""
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == value // 1 else {"number"}
    return {"string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array"}


class LeftOut:
    """The keywords of one schema that are not enforced, as `PLACE: KEYWORD`, each only once.

    Error messages begin with `owner`. `place` is the name of the root of the schema.
    """

    def __init__(self, owner: str, place: str, *, is_strict: bool) -> None:
        self.owner = owner
        self.keywords: dict[str, None] = {}
        self._place = place
        self._is_strict = is_strict

    def add(self, names: Iterable[str], path: str) -> None:
        """Add the keywords at `path` that are not enforced.

        Raises OptionError if there are any and the schema is strict.
        """
        found = list(names)
        if found and self._is_strict:
            at = f", at {path.removeprefix('.')}" if path else ""
            raise OptionError(f"{self.owner}: it is strict, but {', '.join(found)} cannot be followed{at}")
        self.keywords |= dict.fromkeys(f"{self._place}{path}: {name}" for name in found)


class Document:
    """A whole schema, in which references are resolved. Error messages begin with `owner`."""

    def __init__(self, root: Any, owner: str) -> None:
        self._root = root
        self._owner = owner

    def error(self, message: str) -> OptionError:
        """Return an error whose message begins with the owner of the schema."""
        return OptionError(f"{self._owner}: {message}")

    def read(self, schema: Any) -> dict[str, Any]:
        """Return the keywords of a schema that restrict something, with `type` as a list.

        Raises OptionError if a value has the wrong type.
        """
        kept = restricting(self._expect(schema, Mapping, "a schema"))
        if isinstance(kept.get("type"), str):
            kept["type"] = [kept["type"]]
        for name in kept.keys() & _VALUE_TYPES.keys():
            self._expect(kept[name], _VALUE_TYPES[name], name)
        for name in ("type", "required"):
            for item in kept.get(name, []):
                self._expect(item, str, f"a name in {name}")
        return kept

    def _expect(self, value: Any, kind: Any, what: str) -> Any:
        if not isinstance(value, kind) or (kind is _NUMBER and isinstance(value, bool)):
            raise self.error(f"{what} must be {_EXPECTED[kind]}, found {value!r}")
        return value

    def resolve(self, reference: Any) -> Any:
        """Return the schema that a local reference points to. A reference to another reference is followed.

        Raises NotFollowedError if the reference is not local or points to nothing, CircleError if it leads back to
        itself.
        """
        seen = set()
        while True:
            if not isinstance(reference, str) or not reference.startswith("#"):
                raise NotFollowedError("$ref")
            if reference in seen:
                raise CircleError("$ref")
            seen.add(reference)
            found = self._find(reference)
            if not isinstance(found, Mapping) or restricting(found).keys() != {"$ref"}:
                return found
            reference = found["$ref"]

    def _find(self, reference: str) -> Any:
        found = self._root
        parts = unquote(reference[1:]).split("/")
        try:
            if parts[0]:
                raise KeyError(parts[0])
            for part in parts[1:]:
                name = part.replace("~1", "/").replace("~0", "~")
                found = found[int(name) if isinstance(found, list) else name]
        except (KeyError, IndexError, ValueError, TypeError):
            raise NotFollowedError("$ref") from None
        return found

    def flatten(self, schema: Any, seen: tuple[str, ...] = (), level: int = 0) -> list[Flat]:
        """Split a schema into flat alternatives: a value that satisfies the schema satisfies one of them.

        `seen` holds the references that led here, and `level` is the depth of the comparison.

        Raises NotFollowedError if a keyword cannot be expressed, or if a value may satisfy several schemas of `oneOf`.
        Raises OptionError if the schema is malformed.
        """
        if isinstance(schema, bool):
            return [{}] if schema else []
        kept = self.read(schema)
        found = _own(kept)
        if "$ref" in kept:
            if kept["$ref"] in seen:
                return []
            target = self.resolve(kept["$ref"])
            found = _both(found, self.flatten(target, (*seen, kept["$ref"]), level), "$ref")
        for branch in kept.get("allOf", []):
            found = _both(found, self.flatten(branch, seen, level), "allOf")
        for name in ("anyOf", "oneOf"):
            if name in kept:
                branches = [self.flatten(branch, seen, level) for branch in kept[name]]
                if name == "oneOf" and not self._are_all_disjoint(branches, level):
                    raise NotFollowedError("oneOf")
                found = _both(found, [flat for branch in branches for flat in branch], name)
        return [*found, {"type": ["null"]}] if kept.get("nullable") is True else found

    def are_exclusive(self, branches: Iterable[Any], level: int = 0) -> bool:
        """Return whether no value satisfies two of the schemas, as far as their types and constants show."""
        try:
            return self._are_all_disjoint([self.flatten(branch, (), level) for branch in branches], level)
        except NotFollowedError:
            return False

    def _are_all_disjoint(self, branches: list[list[Flat]], level: int) -> bool:
        return all(
            self._are_disjoint(one, other, level) for a, b in combinations(branches, 2) for one in a for other in b
        )

    def _are_disjoint(self, one: Flat, other: Flat, level: int) -> bool:
        shared = _value_types(one) & _value_types(other)
        if not shared or ("enum" in one and "enum" in other and not _common(one["enum"], other["enum"])):
            return True
        if shared != {"object"} or level == _MOST_LEVELS:
            return False
        return self._differ(one, other, level) or self._differ(other, one, level)

    def _differ(self, one: Flat, other: Flat, level: int) -> bool:
        """Return whether `one` requires a property that `other` forbids or gives disjoint values."""
        listed, others = one.get("properties", {}), other.get("properties", {})
        for name in one.get("required", []):
            if name not in others:
                if other.get("additionalProperties") is False and "patternProperties" not in other:
                    return True
            elif name in listed and self.are_exclusive([listed[name], others[name]], level + 1):
                return True
        return False


def _without_flags(kept: dict[str, Any]) -> dict[str, Any]:
    """Replace a boolean `exclusiveMinimum` or `exclusiveMaximum` by the bound itself.

    In older drafts and OpenAPI, the boolean tells whether the bound in `minimum` or `maximum` is exclusive.
    """
    for name, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(kept.get(name), bool):
            is_exclusive = kept.pop(name)
            if is_exclusive and inclusive in kept:
                kept[name] = kept.pop(inclusive)
    return kept


def _own(kept: Mapping[str, Any]) -> list[Flat]:
    """Return a flat schema of the schema's own keywords, without combining keywords. Empty if they contradict."""
    own = {name: value for name, value in kept.items() if name not in (*COMBINING, "nullable", "const")}
    own |= {name: [own[name]] for name in ("pattern", "format") if name in own}
    return [own] if "const" not in kept else _both([own], [{"enum": [kept["const"]]}], "const")


def _both(left: list[Flat], right: list[Flat], keyword: str) -> list[Flat]:
    """Merge each flat schema on the left with each flat schema on the right. Drop merges that no value satisfies.

    Raises NotFollowedError with `keyword` if a merge is not possible or there are too many alternatives.
    """
    if len(left) * len(right) > _MOST_ALTERNATIVES:
        raise NotFollowedError(keyword)
    try:
        merged = [_merge(one, other) for one in left for other in right]
    except NotFollowedError:
        raise NotFollowedError(keyword) from None
    return [flat for flat in merged if flat is not None]


def _merge(one: Flat, other: Flat) -> Flat | None:
    """Merge two flat schemas into one that requires both. Return None if no value can satisfy both."""
    merged = {**one, **other}
    for name in one.keys() & other.keys():
        if name not in ("properties", "additionalProperties"):
            merged[name] = _merge_values(name, one[name], other[name])
    if "prefixItems" in merged and "items" in merged and ("prefixItems" in one) != ("prefixItems" in other):
        raise NotFollowedError("prefixItems")
    # The merged object has the properties of both schemas. If only one schema lists a property, the property must also
    # satisfy the `additionalProperties` of the other schema.
    pairs = ((one, other), (other, one))
    listed = {name: None for schema, _ in pairs for name in schema.get("properties", {})}
    if listed or "properties" in merged:
        merged["properties"] = {
            name: _merge_schemas(*(_property(schema, name) for schema, _ in pairs)) for name in listed
        }
    if "additionalProperties" in one and "additionalProperties" in other:
        merged["additionalProperties"] = _merge_schemas(one["additionalProperties"], other["additionalProperties"])
    return None if merged.get("type") == [] or merged.get("enum") == [] else merged


def _property(schema: Flat, name: str) -> Any:
    listed = schema.get("properties", {})
    return listed[name] if name in listed else schema.get("additionalProperties", True)


def _merge_values(name: str, one: Any, other: Any) -> Any:
    """Merge the values of one keyword of two schemas."""
    if one == other and canonical(one) == canonical(other):
        return one
    if name in _LARGER or name in _SMALLER:
        return max(one, other) if name in _LARGER else min(one, other)
    if name in ("pattern", "format", "required"):
        return [*one, *(item for item in other if item not in one)]
    if name == "type":
        return _common_types(one, other)
    if name == "enum":
        return _common(one, other)
    if name == "items":
        return _merge_schemas(one, other)
    if name == "uniqueItems":
        return True
    raise NotFollowedError(name)


def _merge_schemas(one: Any, other: Any) -> Any:
    if one is True or one == {} or one == other:
        return other
    if other is True or other == {}:
        return one
    return False if one is False or other is False else {"allOf": [one, other]}


def _common(one: list[Any], other: list[Any]) -> list[Any]:
    texts = {canonical(value) for value in other}
    return [value for value in one if canonical(value) in texts]


def _common_types(one: list[str], other: list[str]) -> list[str]:
    both = [name for name in one if name in other or (name == "integer" and "number" in other)]
    return both + [name for name in other if name == "integer" and "number" in one and name not in both]


def _value_types(schema: Flat) -> set[str]:
    """Return the types that a value may have, with "number" split into the disjoint types "integer" and "fraction"."""
    types = set(schema.get("type", TYPES))
    if "number" in types:
        types = types - {"number"} | {"integer", "fraction"}
    if "enum" in schema:
        found = [json_types(value) for value in schema["enum"]]
        types &= {"fraction" if kinds == {"number"} else next(iter(kinds - {"number"})) for kinds in found}
    return types
