"""A grammar of tool calls allows all valid calls and no others."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from support.tiny import WINDOW, make_gemma_tokenizer, random_tokens
from support.tool_syntax import QUOTE, STRINGS, parse, render_call

import mlx_mtp
from mlx_mtp.grammars.tool_call_grammar import tool_grammar

Tool = dict[str, Any]


def tool(name: str, parameters: Any = None, **fields: Any) -> Tool:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TWO = [tool("a"), tool("a.b", {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]})]
A, B = "<|tool_call>call:a{}<tool_call|>", "<|tool_call>call:a.b{x:true}<tool_call|>"


@pytest.mark.parametrize(
    ("choice", "parallel", "allowed", "forbidden"),
    [
        ("auto", True, ["", "hi", A, "hi <" + A + B + A], [A + "hi", "hi<|tool_call>", "a<|turn>"]),
        ("auto", False, ["", "hi", A, "hi" + B], [A + B]),
        ("required", True, [A, B, B + A], ["", "hi", "hi" + A, A + "hi"]),
        ("required", False, [A, B], ["", A + B]),
        ("a.b", True, [B], ["", A, B + B]),
    ],
)
def test_choices(
    is_allowed: Callable[[str, str], bool], choice: str, parallel: bool, allowed: list[str], forbidden: list[str]
) -> None:
    grammar = tool_grammar(TWO, choice, parallel=parallel).text
    assert [text for text in allowed if not is_allowed(grammar, text)] == []
    assert [text for text in forbidden if is_allowed(grammar, text)] == []


CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"$ref": "#/$defs/name"}}, "required": ["city"]}
CITY |= {"additionalProperties": False, "$defs": {"name": {"type": "string", "minLength": 1}}}
ANSWER = '{"city": "start: ::= a"}'


@pytest.mark.parametrize(
    ("choice", "parallel", "allowed", "forbidden"),
    [
        ("auto", True, [A, B + A, ANSWER], ["", "hi", "hi" + A, ANSWER + A, A + ANSWER, '{"city": ""}', "{}"]),
        ("auto", False, [A, B, ANSWER], ["", A + B, "hi"]),
        ("required", True, [A, B + A], ["", ANSWER]),
        ("a.b", True, [B], [A, ANSWER]),
    ],
)
def test_an_answer_by_a_schema_instead_of_calls(
    is_allowed: Callable[[str, str], bool], choice: str, parallel: bool, allowed: list[str], forbidden: list[str]
) -> None:
    grammar = tool_grammar(TWO, choice, parallel=parallel, answer=CITY).text
    assert [text for text in allowed if not is_allowed(grammar, text)] == []
    assert [text for text in forbidden if is_allowed(grammar, text)] == []


def test_blanks_in_an_answer_beside_tools_are_bounded(is_allowed: Callable[[str, str], bool]) -> None:
    """The bound is the same in an answer without tools."""
    grammar = tool_grammar(TWO, "auto", answer=CITY).text
    assert is_allowed(grammar, '{\n  "city": "a"}')
    assert not is_allowed(grammar, '{\n\n\n"city": "a"}')


def test_without_tools_there_is_text_only(is_allowed: Callable[[str, str], bool]) -> None:
    grammar = tool_grammar([], "auto").text
    assert is_allowed(grammar, "hi")
    assert not is_allowed(grammar, A)


# Each tuple holds a schema of the property x, values that it allows, and values that it does not allow.
SCHEMAS: list[tuple[Any, list[Any], list[Any]]] = [
    ({"type": "string"}, ["", "a", '{"\\\n}', "<|", "tool_call|>"], [1, None]),
    ({"type": "integer"}, [0, -12, 10**15], [1.5, "1", 10**16]),
    ({"type": "number"}, [0, -1.5, 1e-30, 12], ["1", True]),
    ({"type": ["boolean", "null"]}, [True, False, None], [0, "true"]),
    ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["a"], 1, [[1]]]),
    ({"type": "array"}, [[], [1, "a", {"b": [None]}]], [{}]),
    ({"items": {"type": "integer"}}, [[1]], [["a"], 1]),
    ({"enum": ["red", "red-ish", "", 1, 12, None, {"b": 2, "a": [1]}]}, ["red", "red-ish", "", 1, 12, None], ["r", 2]),
    ({"enum": [{"a": [1, "x"], "b": {}}]}, [{"a": [1, "x"], "b": {}}], [{"a": [1]}, {}]),
    ({"type": "string", "enum": ["a", None]}, ["a"], [None]),
    ({"type": ["integer", "null"], "enum": [2, 2.5, True, None]}, [2, None], [2.5, True]),
    ({"const": 'a"b\\é\n'}, ['a"b\\é\n'], ["a"]),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ["a", 1], [None]),
    ({"anyOf": [{"enum": ["a", 1]}, True], "type": "string"}, ["a", "b"], [1]),
    ({"anyOf": [{"enum": [1]}, {"type": "number"}, {"enum": [12]}]}, [1, 12, 1.25, 125], ["1"]),
    ({}, [1, "a", None, [{"a": {"b-c": True}}]], []),
    (True, [1, {"a": []}], []),
    ({"type": "object"}, [{}, {"a": 1, "b": "c"}, {"any name": [], "日-x.y": 1}], [1]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1}], [{"a": "b"}]),
    ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    (
        {"type": "object", "properties": {"b": {"type": "integer"}, "B1": {}, "a": {}, "no": False}},
        [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 2}, {"B1": 3}, {"a": 1, "b": 2, "B1": 3}],
        [{"b": 1, "a": 1}, {"B1": 1, "a": 1}, {"c": 1}, {"no": 1}, {"b": "a"}],
    ),
    (
        {"properties": {"a": {}, "b": {}, "c": {}, "d": {}}, "required": ["b", "d", "z"]},
        [{"b": 1, "d": 1, "z": 1}, {"a": 1, "b": 1, "d": 1, "z": 1}, {"b": 1, "c": 1, "d": 1, "z": [1]}],
        [{}, {"a": 1}, {"b": 1, "d": 1}, {"a": 1, "d": 1, "z": 1}],
    ),
    (
        {"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"type": "object"}]},
        [{"a": 1}, {"a": 2}, {"ab": 1}, {}],
        [1],
    ),
    ({"oneOf": [{"type": "string"}]}, ["a"], [1]),
    ({"type": "integer", "minimum": 3}, [3], [1, "a"]),
    ({"type": "array", "items": [{"type": "string"}]}, [[], ["a"], ["a", 1]], [[1], 1]),
    (
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}]},
        [{"a": 1}],
        [{}, {"b": 1}],
    ),
    # The grammar does not follow these schemas completely.
    ({"$ref": "#/$defs/a"}, [1, "a"], []),
    ({"type": "file", "enum": ["a"]}, ["a"], [1]),
    ({"type": ["string", "null"], "anyOf": [{"type": "integer"}]}, ["a", None], [1]),
]


@pytest.mark.parametrize(("schema", "allowed", "forbidden"), SCHEMAS, ids=lambda value: str(value)[:40])
def test_arguments_follow_the_schema(
    is_allowed: Callable[[str, str], bool], schema: Any, allowed: list[Any], forbidden: list[Any]
) -> None:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    grammar = tool_grammar([tool("f", parameters)], "f").text
    assert [value for value in allowed if not is_allowed(grammar, render_call("f", {"x": value}))] == []
    assert [value for value in forbidden if is_allowed(grammar, render_call("f", {"x": value}))] == []


def test_a_string_does_not_spell_the_mark_that_ends_it(is_allowed: Callable[[str, str], bool]) -> None:
    """Its text would equal the text of the special token."""
    grammar = tool_grammar([tool("f", {"properties": {"x": {"type": "string"}}})], "auto").text
    for mark in (QUOTE, "<|tool_call>"):
        assert mark not in grammar.replace(f" {mark}", "")
        content = mark if mark != QUOTE else f"<|tool_call>call:f{{x:{QUOTE}{mark}{QUOTE}}}<tool_call|>"
        assert not is_allowed(grammar, content)


@pytest.mark.parametrize("bound", [{}, {"maxLength": 9}, {"pattern": "<"}, {"minLength": 1, "pattern": "<"}], ids=str)
def test_a_string_of_ordinary_tokens_holds_no_mark(is_allowed: Callable[..., bool], bound: Any) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "string", **bound}}}
    grammar = tool_grammar([tool("f", parameters, strict=True)], "f").text
    start, end = f"<|tool_call>call:f{{x:{QUOTE}", f"{QUOTE}}}<tool_call|>"
    assert is_allowed(grammar, start, "a<|", "|>", end)
    assert not is_allowed(grammar, start, "a<|", '"|>', end)


# No string holds the text of a special token, because here the text would become the token.
PLAIN = STRINGS.filter(lambda text: re.search(r"<\|?\w+\|?>", text) is None)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(PLAIN, PLAIN, PLAIN)
def test_any_name_and_any_string(is_allowed: Callable[[str, str], bool], name: str, value: str, other: str) -> None:
    parameters = {"type": "object", "properties": {name: {"enum": [value, 7]}}, "required": [name]}
    grammar = tool_grammar([tool("f", parameters, strict=True)], "required", parallel=False).text
    text = render_call("f", {name: value})
    assert is_allowed(grammar, text)
    assert is_allowed(grammar, render_call("f", {name: other})) is (other == value)
    assert json.loads(parse([text])[1][0][1]) == {name: value}


def test_top_level_parameters(is_allowed: Callable[[str, str], bool]) -> None:
    """They are an object, whatever else the schema says."""
    for parameters, arguments in (
        (None, {}),
        ({}, {"a": 1}),
        ({"type": ["object", "null"]}, {"a": 1}),
        ({"$ref": "#/$defs/a"}, {"a": 1}),
        ({"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, {"b": 1}),
    ):
        assert is_allowed(tool_grammar([tool("f", parameters)], "f").text, render_call("f", arguments))


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "pattern": "a(?=b)", "minLength": 1}, "pattern"),
        ({"type": "string", "pattern": "("}, "pattern"),
        ({"type": "string", "format": "binary"}, "format"),
        ({"type": "number", "multipleOf": 1e-20}, "multipleOf"),
        ({"type": "array", "uniqueItems": True, "contains": {}}, "uniqueItems, contains"),
        ({"type": "array", "items": {"type": "array", "items": {"oneOf": []}}}, "oneOf"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"type": "string", "anyOf": [{"oneOf": [{"maxLength": 1}, {"maxLength": 3}]}]}, "oneOf"),
        ({"type": "object", "properties": {"y": {"$ref": "#/$defs/none"}}}, r"\$ref"),
        ({"type": "object", "properties": {"y": {"$ref": "https://example.com/schema"}}}, r"\$ref"),
        ({"type": "object", "properties": {"y": {"$ref": "#/properties/x/properties/y"}}}, r"\$ref"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "propertyNames": {"pattern": "a"}, "minProperties": 1}, "propertyNames, minProperties"),
        ({"type": "any"}, "type"),
        ({"type": "any", "enum": [1]}, "type"),
        ({"enum": ["a"], "maxLength": 3}, "maxLength"),
        ({"type": "string", "not": {"const": "a"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if, then"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "allOf"),
        ({"anyOf": [{"type": "string"}], "type": "integer"}, "anyOf"),
    ],
)
def test_what_a_strict_tool_asks_for_is_followed_or_refused(schema: Any, keyword: str) -> None:
    parameters = {"type": "object", "properties": {"x": schema}, "additionalProperties": False}
    tool_grammar([tool("f", parameters)], "auto")
    tool_grammar([tool("f", parameters, strict=False)], "auto")
    message = f"tools: parameters of f: it is strict, but {keyword} cannot be followed, at x"
    with pytest.raises(mlx_mtp.OptionError, match=message):
        tool_grammar([tool("g"), tool("f", parameters, strict=True)], "auto")


def nested(depth: int) -> Any:
    return {"type": "array", "items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "tools: a call is required, but there are none"),
        ([tool("f")], "g", "tools: there is no tool 'g' to call, expected auto, required, f"),
        (["f"], "auto", r"tools\[0\] must be of type function and have a function, found 'f'"),
        ([{"type": "custom"}], "auto", r"tools\[0\] must be of type function"),
        ([tool("f"), tool("f")], "auto", r"tools\[1\]: there is a tool 'f' already"),
        ([tool("a b")], "auto", r"tools\[0\]: name must be 1 to 128 of .*, found 'a b'"),
        ([tool("f", [])], "auto", r"parameters of f: parameters must be an object, found \[\]"),
        ([tool("f", {"type": "string"})], "auto", "parameters of f: type must be object, found 'string'"),
        ([tool("f", {"type": 3})], "auto", "parameters of f: type must be a list, found 3"),
        ([tool("f", {"type": [[]]})], "auto", r"parameters of f: a name in type must be a string, found \[\]"),
        ([tool("f", {"properties": []})], "auto", r"properties must be an object, found \[\]"),
        ([tool("f", {"properties": {"a": 1}})], "auto", "a schema must be an object, found 1"),
        ([tool("f", {"required": "a"})], "auto", "required must be a list, found 'a'"),
        (
            [tool("f", {"required": ["a"], "additionalProperties": False})],
            "auto",
            "no value satisfies the schema false",
        ),
        ([tool("f", {"properties": {"a": {"enum": []}}})], "auto", "no value of enum is of the type beside it"),
        ([tool("f", {"properties": {"a": {"enum": [f"a{QUOTE}"]}}})], "auto", "holds the mark that ends a string"),
        ([tool("f", {"properties": {f"a{QUOTE}": {}}})], "auto", "holds the mark that ends a string"),
        ([tool("f", {"properties": {"a": {"const": float("nan")}}})], "auto", "nan is not JSON"),
        ([tool("f", {"properties": {"a": {"enum": [1], "const": 2}}})], "auto", "no value satisfies"),
        ([tool("f", {"properties": {"a": {"minItems": 2, "maxItems": 1}}})], "auto", "no list has at least 2 and at m"),
        ([tool("f", {"properties": {"a": {"minLength": 2, "maxLength": 1}}})], "auto", "no string has at least 2 and"),
        (
            [tool("f", {"properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}})],
            "auto",
            "no integer satis",
        ),
        ([tool("f", {"properties": {"a": {"minimum": "3"}}})], "auto", "minimum must be a number, found '3'"),
        ([tool("f", {"properties": {"a": {"pattern": 3}}})], "auto", "pattern must be a string, found 3"),
        ([tool("f", {"properties": {"a": {"anyOf": {}}}})], "auto", "anyOf must be a list, found {}"),
        (
            [tool("f", {"properties": {"a": {"allOf": [{"minimum": 1}, 3]}}})],
            "auto",
            "a schema must be an object, found 3",
        ),
        ([tool("f", {"properties": {"a": nested(600)}})], "auto", "tools: a schema is nested too deep"),
    ],
)
def test_bad_tools_are_refused(tools: list[Any], choice: str, message: str) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=message):
        tool_grammar(tools, choice)


TOOLS = [
    tool(
        "light",
        {
            "type": "object",
            "properties": {
                "room-name": {"enum": ["kitchen", "bed room", 'the "attic"']},
                "on": {"type": "boolean"},
                "level": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            },
            "required": ["on", "room-name"],
            "additionalProperties": False,
        },
        strict=True,
    ),
    tool(
        "plan",
        {
            "type": "object",
            "properties": {"root": {"$ref": "#/$defs/Step"}},
            "required": ["root"],
            "additionalProperties": False,
            "$defs": {
                "Step": {
                    "type": "object",
                    "properties": {
                        "at": {"type": "string", "format": "date"},
                        "code": {"type": "string", "pattern": "^[A-F]{2}[0-9]$"},
                        "level": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
                        "next": {"type": "array", "items": {"$ref": "#/$defs/Step"}, "maxItems": 1},
                        "note": {"type": "string", "maxLength": 5},
                        "times": {"type": "integer", "minimum": 2, "maximum": 12, "multipleOf": 2},
                    },
                    "required": ["at", "code", "level", "next", "note", "times"],
                    "additionalProperties": False,
                }
            },
        },
        strict=True,
    ),
    tool(
        "blinds.close",
        {"type": "object", "properties": {"which": {"type": "array", "items": {"const": "left"}}, "at": {"enum": [1]}}},
    ),
]
SCHEMA_OF = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}


@pytest.fixture(scope="module", params=["bytes", "gemma"])
def model(tiny_pair: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path_factory: Any) -> mlx_mtp.Model:
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(tiny_pair("e2b"), folder, dirs_exist_ok=True)
    if request.param == "gemma":
        for name in ("target", "target-assistant"):
            make_gemma_tokenizer(folder / name)
    return mlx_mtp.load(folder / "target")


@pytest.mark.parametrize(
    ("choice", "parallel"), [("auto", True), ("required", True), ("light", False), ("plan", False)]
)
def test_generated_calls_are_valid(model: mlx_mtp.Model, choice: str, parallel: bool) -> None:
    """The models are random, with a bias to call and to end, and with drafts."""
    tokens = ("<|tool_call>", 6.5), ("<|tool_response>", 6.0), ("}", 3.0)
    bias = {model.tokenizer.encode(text, add_special_tokens=False)[0]: value for text, value in tokens}
    grammar = tool_grammar(TOOLS, choice, parallel=parallel).text
    names = []
    for seed in range(4):
        sampling = mlx_mtp.Sampling(temperature=1.0, seed=seed, logit_bias=bias)
        result = model.generate(
            random_tokens(2 * WINDOW, seed=seed), grammar=grammar, num_draft_tokens=3, max_tokens=200, sampling=sampling
        )
        if result.last.finish_reason == "length":
            continue
        content, calls = parse([result.text])
        if choice != "auto":
            assert content == ""
            assert len(calls) == 1 if choice in SCHEMA_OF else calls
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMA_OF[name], format_checker=jsonschema.FormatChecker())
        names += [name for name, _ in calls]
    assert len(names) >= 3, "few answers call and end: the test proves little"
    assert choice not in SCHEMA_OF or set(names) == {choice}
