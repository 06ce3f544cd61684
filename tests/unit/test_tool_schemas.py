"""The grammar of tool calls enforces all schema keywords that OpenAI's strict mode allows."""

import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tool_syntax import QUOTE, render_call

import mlx_mtp
from mlx_mtp.grammars.string_rules import format_terminal, search_terminal
from mlx_mtp.grammars.tool_call_grammar import tool_grammar

IsAllowed = Callable[[str, str], bool]


def tool(parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}


def in_order(value: Any) -> Any:
    """Return the value with its properties in the order of the chat template."""
    if isinstance(value, dict):
        return {name: in_order(value[name]) for name in sorted(value, key=lambda name: (name.lower(), name))}
    return [in_order(item) for item in value] if isinstance(value, list) else value


def closed(required: list[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    """Return an object schema with exactly these properties. `required` names the required properties (None: all)."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


TREE = closed(["name"], name={"type": "string"}, children={"type": "array", "items": {"$ref": "#/$defs/Tree"}})
LIST = {"anyOf": [closed(head={"type": "integer"}, tail={"$ref": "#/$defs/list"}), {"type": "null"}]}
CAT, DOG = (
    closed(kind={"const": "cat"}, lives={"type": "integer"}),
    closed(kind={"enum": ["dog"]}, age={"type": "integer"}),
)
SAFE = 2**53 - 1

# Each tuple has parameters of a strict tool, arguments that it allows, and arguments that it does not allow.
STRICT: list[tuple[str, dict[str, Any], list[Any], list[Any]]] = [
    (
        "recursion",
        {**closed(tree={"$ref": "#/$defs/Tree"}), "$defs": {"Tree": TREE}},
        [{"tree": {"name": "a"}}, {"tree": {"children": [{"name": "b"}, {"children": [], "name": "c"}], "name": "a"}}],
        [{"tree": {"children": [{"children": []}], "name": "a"}}, {"tree": {"children": [1], "name": "a"}}, {}],
    ),
    (
        "the root",
        closed(["n"], n={"type": "integer"}, next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        [{"n": 1}, {"n": 1, "next": None}, {"n": 1, "next": {"n": 2, "next": {"n": 3}}}],
        [{"n": 1, "next": {}}, {"n": 1, "next": {"n": "a"}}],
    ),
    (
        "definitions, names with slashes, a reference to a reference",
        {
            **closed(x={"$ref": "#/definitions/a~1b%20c"}, y={"$ref": "#/properties/x"}),
            "definitions": {"a/b c": {"$ref": "#/definitions/list"}, "list": {"type": "boolean"}},
        },
        [{"x": True, "y": False}],
        [{"x": 1, "y": True}, {"x": True, "y": None}],
    ),
    (
        "a linked list",
        {**closed(x={"$ref": "#/$defs/list", "description": "of numbers"}), "$defs": {"list": LIST}},
        [{"x": None}, {"x": {"head": 1, "tail": {"head": 2, "tail": None}}}],
        [{"x": {"head": 1}}, {"x": {"head": 1, "tail": {"head": "a", "tail": None}}}],
    ),
    (
        "a reference with a bound beside it",
        {**closed(x={"$ref": "#/$defs/n", "maximum": 5}), "$defs": {"n": {"type": "integer", "minimum": 3}}},
        [{"x": 3}, {"x": 5}],
        [{"x": 2}, {"x": 6}],
    ),
    (
        "integers up to 53 bits",
        closed(n={"type": "integer", "minimum": -SAFE, "maximum": SAFE}),
        [{"n": n} for n in (0, 7, -SAFE, SAFE)],
        [{"n": n} for n in (SAFE + 1, -SAFE - 1, 1.5)],
    ),
    (
        "integers of 64 bits, which have 16 digits at most",
        closed(n={"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "format": "int64"}),
        [{"n": 0}, {"n": -(10**16) + 1}],
        [{"n": 1.5}, {"n": 10**16}],
    ),
    (
        "bounds that are not reached",
        closed(n={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1.5}),
        [{"n": n} for n in (0.01, 1, 1.25, 1.4999)],
        [{"n": n} for n in (0, -1, 1.5, 2)],
    ),
    (
        "bounds that are not reached, as OpenAPI has them",
        closed(n={"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": False}),
        [{"n": 4}, {"n": 5}],
        [{"n": 3}, {"n": 6}],
    ),
    (
        "numbers end, whatever their bounds",
        closed(n={"type": "integer", "minimum": 0}, x={"type": "number", "maximum": 9}),
        [{"n": 10**15, "x": 0.25}, {"n": 0, "x": -1234.0625}],
        [{"n": 10**20, "x": 1}, {"n": -1, "x": 1}, {"n": 1, "x": 0.01234567890123}, {"n": 1, "x": -1e20}],
    ),
    (
        "a reference that holds itself beside others",
        {
            **closed(x={"$ref": "#/$defs/a"}),
            "$defs": {"a": {"type": "string", "anyOf": [{"$ref": "#/$defs/a"}, {"maxLength": 1}]}},
        },
        [{"x": "a"}],
        [{"x": "ab"}, {"x": 1}],
    ),
    ("multiples", closed(n={"type": "integer", "multipleOf": 5}), [{"n": 0}, {"n": 15}, {"n": -5}], [{"n": 7}]),
    ("cents", closed(n={"type": "number", "multipleOf": 0.01}), [{"n": 1}, {"n": 0.25}], [{"n": 0.125}]),
    (
        "lengths of lists",
        closed(x={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, y={"maxItems": 0}),
        [{"x": [1, 2], "y": []}, {"x": [1, 2, 3], "y": []}],
        [{"x": [1], "y": []}, {"x": [1, 2, 3, 4], "y": []}, {"x": [1, 2], "y": [1]}],
    ),
    (
        "tuples",
        closed(
            x={"prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 1, "items": False},
            y={"prefixItems": [{"type": "string"}], "items": {"type": "integer"}, "maxItems": 3},
        ),
        [{"x": ["a"], "y": []}, {"x": ["a", 1], "y": ["a", 1, 2]}],
        [
            {"x": [], "y": []},
            {"x": ["a", "b"], "y": []},
            {"x": ["a", 1, 2], "y": []},
            {"x": ["a"], "y": ["a", 1, 2, 3]},
        ],
    ),
    (
        "lengths of strings, in characters",
        closed(x={"type": "string", "minLength": 2, "maxLength": 4}, y={"maxLength": 1}),
        [{"x": "日本", "y": ""}, {"x": 'a"\\\n', "y": "a"}],
        [{"x": "a", "y": ""}, {"x": "abcde", "y": ""}, {"x": "ab", "y": "ab"}],
    ),
    (
        "a pattern and a length",
        closed(x={"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}),
        [{"x": "a"}, {"x": "abc"}],
        [{"x": ""}, {"x": "abcd"}, {"x": "aB"}, {"x": f"a{QUOTE}"}],
    ),
    ("a null of OpenAPI", closed(x={"type": "string", "nullable": True}), [{"x": "a"}, {"x": None}], [{"x": 1}]),
    (
        "a null beside a reference and an enum",
        {
            **closed(x={"$ref": "#/$defs/a", "nullable": True}, y={"enum": ["b"], "nullable": True}),
            "$defs": {"a": {"const": "a"}},
        },
        [{"x": "a", "y": "b"}, {"x": None, "y": None}],
        [{"x": "b", "y": None}],
    ),
    (
        "all of several",
        closed(
            x={
                "allOf": [
                    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                    {"properties": {"a": {"minimum": 3}, "b": {"type": "string"}}, "required": ["b"]},
                ]
            }
        ),
        [{"x": {"a": 3, "b": ""}}],
        [{"x": {"a": 3}}, {"x": {"b": ""}}, {"x": {"a": 2, "b": ""}}],
    ),
    (
        "properties that another part does not allow",
        closed(
            x={
                "allOf": [closed(["a"], a={}, b={"type": "integer"}), {"properties": {"b": {"minimum": 1}, "c": {}}}],
            }
        ),
        [{"x": {"a": 1}}, {"x": {"a": 1, "b": 1}}],
        [{"x": {"a": 1, "b": 0}}, {"x": {"a": 1, "c": 1}}],
    ),
    (
        "numbers of all of several",
        closed(
            x={
                "type": ["number", "string"],
                "allOf": [{"type": ["integer", "null"]}, {"minimum": 1}, {"minimum": 4}],
            }
        ),
        [{"x": 4}],
        [{"x": 3}, {"x": 4.5}, {"x": "a"}],
    ),
    (
        "constants of all of several",
        closed(x={"enum": [1, 2, True], "allOf": [{"enum": [1.0, 2, 3]}, {"const": 1}]}),
        [{"x": 1}],
        [{"x": 2}, {"x": True}],
    ),
    (
        "one of exclusive objects",
        {
            **closed(
                x={
                    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                    "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat"}},
                }
            ),
            "$defs": {"Cat": CAT, "Dog": DOG},
        },
        [{"x": {"kind": "cat", "lives": 9}}, {"x": {"age": 2, "kind": "dog"}}],
        [{"x": {"kind": "dog", "lives": 9}}, {"x": {"kind": "cow"}}],
    ),
    (
        "one of exclusive objects that hold themselves",
        {
            **closed(x={"$ref": "#/$defs/node"}),
            "$defs": {
                "node": {
                    "oneOf": [
                        closed(child={"$ref": "#/$defs/node"}, kind={"const": "inner"}),
                        closed(kind={"const": "leaf"}, other={"$ref": "#/$defs/node"}),
                        {"type": "null"},
                    ]
                }
            },
        },
        [{"x": {"child": {"kind": "leaf", "other": None}, "kind": "inner"}}],
        [{"x": {"child": None, "kind": "leaf"}}],
    ),
    (
        "one of exclusive types",
        closed(
            x={
                "oneOf": [
                    {"type": "string", "maxLength": 1},
                    {"type": ["null", "integer"]},
                    closed(a={}),
                    closed(b={}),
                ],
            }
        ),
        [{"x": "a"}, {"x": None}, {"x": {"a": 1}}, {"x": {"b": 1}}],
        [{"x": "ab"}, {"x": 1.5}, {"x": {}}],
    ),
    (
        "maps",
        closed(x={"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}}),
        [{"x": {}}, {"x": {"any": 1, "thing": 2}}],
        [{"x": {"a": 0}}],
    ),
    (
        "maps of named keys",
        closed(
            x={"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
            y={"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}},
        ),
        [{"x": {"any": 1}, "y": {}}, {"x": {}, "y": {"a": 1, "b": 2}}],
        [{"x": {}, "y": {"c": 1}}, {"x": {}, "y": {"a": "b"}}],
    ),
    (
        "keywords that restrict nothing",
        closed(
            x={"type": "array", "uniqueItems": False, "minItems": 0, "title": "X", "x-order": 3},
            y={"type": "boolean", "minimum": 3, "pattern": "a"},
        ),
        [{"x": [1, 1], "y": True}],
        [{"x": [], "y": 4}],
    ),
]


@pytest.mark.parametrize(
    ("parameters", "allowed", "forbidden"), [case[1:] for case in STRICT], ids=[case[0] for case in STRICT]
)
def test_strict_tools(is_allowed: IsAllowed, parameters: Any, allowed: list[Any], forbidden: list[Any]) -> None:
    grammar = tool_grammar([tool(parameters, strict=True)], "f")
    assert grammar.not_enforced == ()
    assert [value for value in allowed if not is_allowed(grammar.text, render_call("f", value))] == []
    assert [value for value in forbidden if is_allowed(grammar.text, render_call("f", value))] == []


PATTERNS: list[tuple[str, list[str], list[str]]] = [
    ("b", ["b", "abc", "a\nb\n"], ["", "ac"]),
    ("^b", ["b", "bc"], ["ab"]),
    ("b$", ["b", "ab"], ["bc"]),
    ("^b$|c", ["b", "ac"], ["ab", ""]),
    ("^(?:a|b)c$", ["ac", "bc"], ["c", "aac"]),
    ("^$", [""], ["a"]),
    (r"^\d{2,3}/[\w\-/]+$", ["12/a-_/"], ["1/a", "12/é", "٣٣/a"]),
    (r"^[^\d\s]+$", ["aé"], ["a1", "a "]),
    (r"^[[&~\]]\/\"\'\<$", ["[/\"'<", "&/\"'<", "]/\"'<"], ["a/\"'<"]),
    (r"^[\D]\W[\W]$", ["a-é"], ["1-é", "a_é"]),
    (r"^(?!\.)(?!.*\.\.)[a-z.]+(?<!x)?@", [], []),
    (r"^(?!\.)(?!.*\.\.)[a-z.]+@b$", ["a.b@b"], [".a@b", "a..b@b", "a@b.c"]),
    (r"^(?=.*[0-9])(?=.{4,}$)[a-z0-9]*$", ["abc1"], ["abcd", "ab1"]),
    (r"^[\b]$", ["\b"], ["b"]),
    (r"^\u0041\x42\.$", ["AB."], ["AB", "ABc"]),
]


@pytest.mark.parametrize(("pattern", "allowed", "forbidden"), PATTERNS, ids=[case[0] for case in PATTERNS])
def test_patterns_are_searched_for_as_in_javascript(
    is_allowed: IsAllowed, pattern: str, allowed: list[str], forbidden: list[str]
) -> None:
    if not allowed:
        with pytest.raises(mlx_mtp.OptionError, match="pattern cannot be followed, at x"):
            tool_grammar([tool(closed(x={"type": "string", "pattern": pattern}), strict=True)], "f")
        return
    grammar = f"start: PATTERN\nPATTERN: {search_terminal(pattern)}"
    assert [text for text in allowed if not is_allowed(grammar, text)] == []
    assert [text for text in forbidden if is_allowed(grammar, text)] == []


FORMATS = {
    "date": (
        ["2024-02-29", "2000-02-29", "2023-12-31", "1999-04-30"],
        ["2023-02-29", "1900-02-29", "2023-04-31", "2023-13-01", "23-1-1", "0000-01-01"],
    ),
    "time": (["23:59:59Z", "00:00:00.123+05:30", "12:00:00z"], ["24:00:00Z", "12:00:00", "12:60:00Z", "12:00Z"]),
    "date-time": (
        ["2024-02-29T12:00:00Z", "2024-01-01T00:00:00.5-03:00"],
        ["2024-01-01", "2024-01-01 12:00:00Z", "2024-02-30T12:00:00Z"],
    ),
    "duration": (["P1D", "P1Y2M3DT4H5M6S", "PT20M", "P3W"], ["P", "PT", "P1DT", "1D", "P1W2D"]),
    "hostname": (
        ["example.com", "localhost", "a-b.c1"],
        ["-a.com", "a..b", "a_b", "", "a" * 64, ".".join(["a" * 60] * 5)],
    ),
    "email": (["a.b+c@example.com", "x@localhost"], ["a@", "@b", "a b@c.d", "a..b@c.d", ".a@c.d"]),
    "ipv4": (["0.0.0.0", "255.249.199.99"], ["256.1.1.1", "1.1.1", "01.1.1.1"]),
    "ipv6": (
        [
            "::",
            "::1",
            "1::",
            "1:2:3:4:5:6:7:8",
            "1:2::7:8",
            "fe80::a:b",
            "::ffff:1.2.3.4",
            "1:2:3:4:5:6:1.2.3.4",
            "1:2:3:4:5:6:7::",
        ],
        ["1", "1:2:3:4:5:6:7:8:9", "1::2::3", "12345::", ":::", "1:2:3:4:5:6:7:8::"],
    ),
    "uuid": (
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567e89b12d3a456426614174000", "123e4567-e89b-12d3-a456-42661417400g"],
    ),
    "uri": (["https://example.com/a?b=c#d", "mailto:a@b.c", "urn:x:y"], ["example.com", "http://a b", "://a"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(is_allowed: IsAllowed, name: str) -> None:
    allowed, forbidden = FORMATS[name]
    grammar = f"start: FORMAT\nFORMAT: {format_terminal(name)}"
    assert [text for text in allowed if not is_allowed(grammar, text)] == []
    assert [text for text in forbidden if is_allowed(grammar, text)] == []
    strict = tool_grammar([tool(closed(x={"type": "string", "format": name}), strict=True)], "f").text
    assert is_allowed(strict, render_call("f", {"x": allowed[0]}))
    assert not is_allowed(strict, render_call("f", {"x": forbidden[0]}))


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for schemas with all supported keywords. They can refer to `#/$defs/a` and `#/$defs/b`."""
    small = st.integers(-4, 4)
    bounds = {
        "minimum": small,
        "maximum": small.map(lambda n: n + 4),
        "exclusiveMinimum": small.map(lambda n: n - 4),
        "multipleOf": st.sampled_from([1, 2, 0.5]),
    }
    numbers = st.fixed_dictionaries({"type": st.sampled_from(["integer", "number"])}, optional=bounds)
    texts = st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": st.integers(0, 2),
            "maxLength": st.integers(2, 3),
            "pattern": st.sampled_from(["^a", "b$", "[ab]+", "^(a|b)*$", "^a|b"]),
        },
    )
    constants = st.lists(st.sampled_from([None, True, 0, 1, "a", "", [1], {"a": 1}]), min_size=1, max_size=3)
    leaves: st.SearchStrategy[Any] = st.one_of(
        numbers,
        texts,
        constants.map(lambda values: {"enum": values}),
        st.sampled_from(
            [{"type": "null"}, {"type": ["boolean", "string"]}, {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]
        ),
    )
    if not depth:
        return leaves
    inner = schemas(depth - 1)
    lengths = {"minItems": st.integers(0, 1), "maxItems": st.integers(1, 2)}
    lists = st.fixed_dictionaries({"type": st.just("array"), "items": inner}, optional=lengths)
    objects = st.dictionaries(st.sampled_from(["a", "B", "c d"]), inner, max_size=3).flatmap(
        lambda properties: (
            st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                lambda required: closed(required, **properties)
            )
            if properties
            else st.just(closed([]))
        )
    )
    maps = inner.map(lambda schema: {"type": "object", "additionalProperties": schema})
    several = st.tuples(inner, inner)
    return st.one_of(
        leaves, lists, objects, maps,
        several.map(lambda pair: {"anyOf": list(pair)}),
        several.map(lambda pair: {"allOf": [pair[0], {"anyOf": [*pair]}]}),
    )  # fmt: skip


PLAIN = st.none() | st.booleans() | st.integers(-5, 9) | st.sampled_from([0.5, 1.5, -2.25]) | st.text("ab", max_size=4)
PLAIN_VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "B", "c d"]), inner, max_size=3),
    max_leaves=6,
)


def instances(schema: Any, root: Any, depth: int = 5) -> st.SearchStrategy[Any]:
    """Return a strategy for values that often satisfy the schema."""
    if "$ref" in schema and depth:
        return instances(root["$defs"][schema["$ref"][-1]], root, depth - 1)
    if "allOf" in schema or "anyOf" in schema:
        return st.one_of([instances(part, root, depth) for part in schema.get("allOf", []) + schema.get("anyOf", [])])
    if "enum" in schema:
        return st.sampled_from(schema["enum"]) | PLAIN
    if schema.get("type") == "array" and depth:
        return st.lists(instances(schema["items"], root, depth - 1), max_size=3)
    if schema.get("type") == "object" and depth:
        listed = {name: instances(part, root, depth - 1) for name, part in schema.get("properties", {}).items()}
        required = {name: listed[name] for name in schema.get("required", [])}
        if "properties" in schema:
            optional = {name: value for name, value in listed.items() if name not in required}
            return st.fixed_dictionaries(required, optional=optional)
        return st.dictionaries(
            st.sampled_from(["a", "b"]), instances(schema["additionalProperties"], root, depth - 1), max_size=2
        )
    numbers = st.integers(-5, 9) | st.sampled_from([0.5, 1.5, -2.25])
    return {"integer": numbers, "number": numbers, "string": st.text("ab", max_size=4)}.get(
        str(schema.get("type")), PLAIN
    )


def grammar_of(parameters: Any) -> str | None:
    """Return the grammar. Return None for dangling references, unsatisfiable parts, and enums beside a keyword."""
    try:
        return tool_grammar([tool(parameters, strict=True)], "f").text
    except mlx_mtp.OptionError as error:
        if re.search(r"no (value|integer|number|list|string)|cannot be followed, at x", str(error)):
            return None
        raise


def test_calls_are_allowed_just_where_their_arguments_are_valid(is_allowed: IsAllowed) -> None:
    found: list[bool] = []
    schema, small = schemas(), schemas(1)

    @settings(deadline=None, derandomize=True, max_examples=120)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        parameters = {
            **closed(x=data.draw(schema)),
            "$defs": {"a": data.draw(small), "b": data.draw(small)},
        }
        grammar = grammar_of(parameters)
        if grammar is None:
            return
        value = data.draw(instances(parameters["properties"]["x"], parameters) | PLAIN_VALUES)
        is_valid = jsonschema.Draft202012Validator(parameters).is_valid({"x": value})
        assert is_allowed(grammar, render_call("f", in_order({"x": value}))) is is_valid, (parameters, value)
        found.append(is_valid)

    check()
    assert found.count(True) > 30
    assert found.count(False) > 30
