"""Schemas of answers from clients: unsupported keywords are left out and named, or refused if strict."""

import json
from typing import Any

import pytest

import mlx_mtp
from mlx_mtp.grammars.answer_schema import answer_schema
from mlx_mtp.grammars.compiler import compile_grammar

KINDS = {
    "$defs": {
        name: {"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"]} for name in ("a", "b")
    }
}


def in_object(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": schema}, **more}


# Each tuple holds a schema, the part that is followed, and the parts that are left out.
LEFT_OUT: list[tuple[Any, Any, tuple[str, ...]]] = [
    (in_object({"type": "array", "uniqueItems": True}), in_object({"type": "array"}), (".x: uniqueItems",)),
    (
        in_object({"type": "array", "items": {"type": "string", "pattern": "(?=a)", "maxLength": 3}}),
        in_object({"type": "array", "items": {"type": "string", "maxLength": 3}}),
        (".x[]: pattern",),
    ),
    (in_object({"type": "string", "format": "binary"}), in_object({"type": "string"}), (".x: format",)),
    (
        in_object(
            {"additionalProperties": {"type": "string", "not": {"const": ""}}, "propertyNames": {"pattern": "a"}}
        ),
        in_object({"additionalProperties": {"type": "string"}}),
        (".x.*: not", ".x: propertyNames"),
    ),
    (
        {"anyOf": [{"type": "string"}, {"type": "array", "contains": {}}]},
        {"anyOf": [{"type": "string"}, {"type": "array"}]},
        (".anyOf[1]: contains",),
    ),
    (
        {"$ref": "#/$defs/s", "$defs": {"s": {"type": "array", "items": {"$ref": "#/$defs/s"}, "uniqueItems": True}}},
        {"$ref": "#/$defs/s", "$defs": {"s": {"type": "array", "items": {"$ref": "#/$defs/s"}}}},
        (".$defs.s: uniqueItems",),
    ),
    (
        {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
        {"anyOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
        (": oneOf",),
    ),
    (
        in_object({"properties": {"a": {}, "b": {}}, "minProperties": 1, "maxProperties": 2}),
        in_object({"properties": {"a": {}, "b": {}}}),
        (".x: minProperties", ".x: maxProperties"),
    ),
    (
        in_object({"allOf": [{"$ref": "#/$defs/o"}, {"minProperties": 1}]}, **{"$defs": {"o": in_object({})}}),
        in_object({"allOf": [{"$ref": "#/$defs/o"}, {}]}, **{"$defs": {"o": in_object({})}}),
        (".x.allOf[1]: minProperties",),
    ),
    # These schemas are followed in full.
    (in_object({"type": "string", "format": "email"}), in_object({"type": "string", "format": "email"}), ()),
    (
        in_object({"type": "array", "uniqueItems": False, "propertyNames": {"type": "string"}}),
        in_object({"type": "array"}),
        (),
    ),
    (
        in_object({"type": "string", "nullable": True}),
        in_object({"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (),
    ),
    (
        {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "discriminator": {"propertyName": "kind"}, **KINDS},
        {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "discriminator": {"propertyName": "kind"}, **KINDS},
        (),
    ),
]


@pytest.mark.parametrize(("schema", "expected", "left"), LEFT_OUT, ids=lambda value: str(value)[:60])
def test_what_cannot_be_followed(schema: Any, expected: Any, left: tuple[str, ...]) -> None:
    before = json.dumps(schema)
    found, not_enforced = answer_schema(schema, "response_format", is_strict=False)
    assert (found, not_enforced) == (expected, tuple(f"response_format{one}" for one in left))
    assert compile_grammar(json_schema=found)
    assert json.dumps(schema) == before
    if left:
        message = f"response_format: it is strict, but .*{left[0].split(': ')[1]}.* cannot be followed"
        with pytest.raises(mlx_mtp.OptionError, match=message):
            answer_schema(schema, "response_format", is_strict=True)
    else:
        assert answer_schema(schema, "response_format", is_strict=True) == (expected, ())


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objct"}, "response_format: the schema cannot be followed: Invalid type: objct"),
        (
            in_object({"$ref": "file:///etc/passwd"}),
            "response_format: the schema cannot be followed: Resource 'file:///etc/passwd'",
        ),
        (in_object({"oneOf": 3}), "response_format: oneOf must be a list, found 3"),
        (in_object({"oneOf": [3]}), "response_format: a schema must be an object, found 3"),
    ],
)
def test_malformed_schemas_are_refused_strict_or_not(schema: Any, message: str) -> None:
    for is_strict in (False, True):
        with pytest.raises(mlx_mtp.OptionError, match=message):
            answer_schema(schema, "response_format", is_strict=is_strict)


def test_deep_schemas_are_refused() -> None:
    schema: Any = {}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(mlx_mtp.OptionError, match="nested too deep"):
        answer_schema(schema, "response_format", is_strict=False)
