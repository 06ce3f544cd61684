"""Tool calls: any cut of the answer gives the same calls. A call is read as meant, or passed on unchanged."""

import json
import logging
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import STOP_IDS, make_gemma_tokenizer, make_tokenizer
from support.tool_syntax import (
    CALLS,
    CONTENTS,
    QUOTE,
    SCALARS,
    STRINGS,
    TEXTS,
    Call,
    Tool,
    Writer,
    cut,
    parse,
    render,
    render_call,
    tool,
)

import mlx_mtp
from mlx_mtp.server.answers import Answer
from mlx_mtp.text.answer import TextStream
from mlx_mtp.text.tokenizer import load_tokenizer, thought_channel
from mlx_mtp.text.tool_call_parser import ToolCallParser


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(st.tuples(CONTENTS, CALLS), max_size=3),
    CONTENTS,
    st.sampled_from(["", "", " ", "\n\t"]),
    st.lists(st.integers(0, 1000), max_size=12),
)
def test_content_and_calls_however_the_answer_is_cut(
    parts: list[tuple[str, tuple[str, dict[str, Any]]]], after: str, blank: str, places: list[int]
) -> None:
    text = "".join(content + render_call(*call, blank) for content, call in parts) + after
    content, calls = parse(cut(text, places))
    assert content == "".join(content for content, _ in parts) + after
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [call for _, call in parts]
    assert parse(text) == parse([text]) == (content, calls)


SCRAPS = st.sampled_from(
    [
        "<|tool_call>",
        "<tool_call|>",
        QUOTE,
        "call:",
        "f{",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "a",
        " ",
        "1",
        "<",
        '|"',
        "true",
        '"',
        "(",
        ")",
        "=",
    ]
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(SCRAPS, max_size=25), st.lists(st.integers(0, 1000), max_size=12))
def test_whatever_the_text_it_is_read_the_same_however_it_is_cut(scraps: list[str], places: list[int]) -> None:
    text = "".join(scraps)
    for end in ("stop", "length"):
        assert parse(text, end=end) == parse([text], end=end) == parse(cut(text, places), end=end)


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser()
    steps = [
        ("Let me see. <|tool", "Let me see. ", []),
        ("_call>call:wea", "", []),
        ("ther{", "", [(0, "weather", "{")]),
        ("ci", "", []),
        ("ty:" + QUOTE + 'San "F', "", [(0, None, '"city":"San \\"F')]),
        ("ran<|", "", [(0, None, "ran")]),
        # A mark ends a string if the text after it begins the next value or ends the call.
        ("cisco" + QUOTE, "", [(0, None, "<|cisco")]),
        (",days:1", "", [(0, None, '","days":')]),
        ("2}", "", []),
        ("<tool_call|><|tool_call>call:b{}<tool_call|>ok", "ok", [(0, None, "12}"), (1, "b", "{}")]),
        ("", "", []),
    ]
    for text, content, deltas in steps:
        assert parser.add(text) == (content, deltas)
    assert parser.add("<", is_last=True) == ("<", [])


@pytest.mark.parametrize(
    ("bare", "expected"),
    [
        ("true", True),
        ("null", None),
        ("-0.5e-3", -0.0005),
        ("-7", -7),
        ("None", None),
        ("True", True),
        ("007", "007"),
        ("+1", "+1"),
        ("1.", "1."),
        ("NaN", "NaN"),
        ("１", "１"),  # noqa: RUF001
        ('"a"', "a"),
        ("a:b", "a:b"),
        ("a]", "a]"),
        ("<b>", "<b>"),
    ],
)
def test_bare_values(bare: str, expected: Any) -> None:
    content, [(_, arguments)] = parse(f"<|tool_call>call:f{{x: {bare} ,y:[{{}},{bare.strip(']')}]}}<tool_call|>")
    assert content == ""
    last = expected.strip("]") if isinstance(expected, str) else expected
    assert json.loads(arguments) == {"x": expected, "y": [{}, last]}


def test_keys_are_passed_on() -> None:
    _, [(_, arguments)] = parse(
        f"<|tool_call>call:f{{x-y.z:1,a b:2,a c:3,{QUOTE} :{QUOTE}:4,{{,:5,{QUOTE}{QUOTE} :6}}<tool_call|>",
        tools=[tool("f", **{"{,": {"type": "integer"}})],
    )
    assert arguments == '{"x-y.z":1,"a b":2,"a c":3," :":4,"{,":5,"":6}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # These texts have no `call:NAME{`.
        ("a<|tool_call>b<tool_call|>c", "a<|tool_call>b<tool_call|>c", []),
        ("<|tool_call>call:{}<tool_call|>", "<|tool_call>call:{}<tool_call|>", []),
        ("<|tool_call>call:a b{}", "<|tool_call>call:a b{}", []),
        ("<|tool_call>call<|tool_call>call:f{}<tool_call|>", "<|tool_call>call", [("f", "{}")]),
        ("<|tool_call><|tool_call>call:f{}<tool_call|>", "<|tool_call>", [("f", "{}")]),
        ("<|tool_call>call", "<|tool_call>call", []),
        ("<tool_call|>", "<tool_call|>", []),
        # In these calls the syntax breaks inside.
        (f"<|tool_call>call:f{{a:{QUOTE}b{QUOTE} c<tool}}<tool_call|>d", "d", [("f", f'{{"a":"b{QUOTE} c<tool}}')]),
        ("<|tool_call>call:f{a:1,b<tool_call|>d", "d", [("f", '{"a":1,b')]),
        ("<|tool_call>call:f{a:,b:1}<tool_call|>", "", [("f", '{"a":,b:1}')]),
        ("<|tool_call>call:f{a:1,}:2}<tool_call|>", "", [("f", '{"a":1,}:2}')]),
        (f"<|tool_call>call:f{{a:b{QUOTE}c{QUOTE}}}<tool_call|>", "", [("f", f'{{"a":b{QUOTE}c{QUOTE}}}')]),
        (f"<|tool_call>call:f{{{QUOTE}a{QUOTE} 1}}<tool_call|>", "", [("f", f"{{{QUOTE}a{QUOTE} 1}}")]),
        (
            "<|tool_call>call:f{a 1}<tool_call|> <|tool_call>call:g{}<tool_call|>",
            " ",
            [("f", "{a 1}"), ("g", "{}")],
        ),
    ],
)
def test_nothing_of_a_malformed_call_is_lost(
    text: str, content: str, calls: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mlx_mtp.text.tool_call_parser"):
        assert parse([text]) == (content, calls)
    assert parse(text) == (content, calls)
    assert bool(caplog.records) is (text != "<tool_call|>")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", "{"),
        ("a", "{a"),
        ("a:", '{"a":'),
        ("a:12", '{"a":12'),
        (f"a:{QUOTE}b\n", '{"a":"b\\n'),
        (f'a:{QUOTE}b<|"', '{"a":"b<|\\"'),
        (f"{QUOTE}b c", '{"b c'),
        ("a:[{b:true},", '{"a":[{"b":true},'),
        ("}", "{}"),
        ("} ", "{}"),
        ('a:"b', '{"a":"b'),
        ('a:"b",c:', '{"a":"b",c:'),
    ],
)
def test_arguments_that_are_cut_off_are_incomplete(text: str, arguments: str, caplog: pytest.LogCaptureFixture) -> None:
    text = "<|tool_call>call:f{" + text
    assert parse(text, end="length") == parse([text], end="length") == ("", [("f", arguments)])
    parser = ToolCallParser()
    assert parser.add(text, is_last=True, is_cut=True) == ("", [(0, "f", arguments)])
    assert not caplog.records


def test_a_call_without_its_end_ends_where_the_next_begins() -> None:
    text = "<|tool_call>call:f{a:1} <|tool_call>call:g{}<tool_call|>"
    assert parse(text) == parse([text]) == ("", [("f", '{"a":1}'), ("g", "{}")])


def arguments_of(written: str, *tools: Tool, end: str = "<tool_call|>") -> str:
    """Return the text of the arguments of one call. It must be the same for any cut of the text."""
    text = f"<|tool_call>call:f{written}{end}"
    found = parse([text], tools=tools)
    assert found == parse(text, tools=tools)
    content, [(name, arguments)] = found
    assert (content, name) == ("", "f")
    return arguments


M = QUOTE


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        # JSON's and Python's quotes can hold commas, braces and escapes.
        ('{ids:["k1","k2"],on:\'x\'}', {"ids": ["k1", "k2"], "on": "x"}),
        ('{"cmd": "ls -l, now", "to": {"dir": "a}b"}}', {"cmd": "ls -l, now", "to": {"dir": "a}b"}}),
        (r'{a:"say \"hi\"\n\u00e9\ud83d\ude00",b:"C:\\x"}', {"a": 'say "hi"\né😀', "b": "C:\\x"}),
        (r"{a:'it\'s',b:'\x41\U0001f600'}", {"a": "it's", "b": "A😀"}),
        ("{a:'it's',b:'x'}", {"a": "it's", "b": "x"}),
        ('{a:"say "hi" now",b:1}', {"a": 'say "hi" now', "b": 1}),
        # Words can be Python's or JSON's.
        ("{all:False,some:True,x:None,y:[None]}", {"all": False, "some": True, "x": None, "y": [None]}),
        # Marks can be doubled, nested or missing.
        (f"{{a:{M}{M}x{M}{M},b:{M}{M}y{M}}}", {"a": "x", "b": "y"}),
        (f"{{a:{M}x{M}{M},b:1}}", {"a": "x", "b": 1}),
        (f"{{a:{M}say {M}hi{M} now{M},b:1}}", {"a": 'say "hi" now', "b": 1}),
        (
            f"{{a:{M}sql({M}{M}{M}SELECT 1{M}{M}{M}).df(){M},l:[{M}x{M}]}}",
            {"a": 'sql("""SELECT 1""").df()', "l": ["x"]},
        ),
        (f"{{a:{M}ls -l}}", {"a": "ls -l"}),
        (f"{{a:{M}if (x) }}],b:{M}y{M}}}", {"a": "if (x) }]", "b": "y"}),
        (f"{{a:<b>x, y</b>{M},b:{M}y{M}}}", {"a": "<b>x, y</b>", "b": "y"}),
        (f"{{a:Paris, France{M},n:5}}", {"a": "Paris, France", "n": 5}),
        # Commas and braces can be missing or surplus.
        (f"{{a:{M}left{M}n:90}}", {"a": "left", "n": 90}),
        (f"{{a:{M}left{M} b:{M}x{M}}}", {"a": "left", "b": "x"}),
        ('{a:"left" b:1}', {"a": "left", "b": 1}),
        ("{a:[1,2,],b:{c:1,},}", {"a": [1, 2], "b": {"c": 1}}),
        ("{a:1}}", {"a": 1}),
        ("{a:{b:1}},c:2}", {"a": {"b": 1}, "c": 2}),
        ("{a:[1,2}", {"a": [1, 2]}),
        (f"{{a:[{{b:{M}x{M},c:1]}}", {"a": [{"b": "x", "c": 1}]}),
        ("{a:1", {"a": 1}),
        # Calls can have Python's form, or be a bare name.
        ("(a=1, b=\"x, y\", c={'k': [True, None]})", {"a": 1, "b": "x, y", "c": {"k": [True, None]}}),
        ('(a: "x")', {"a": "x"}),
        ("()", {}),
        ("", {}),
        ("{a='x'}", {"a": "x"}),
    ],
)
def test_slips_are_read_as_they_are_meant(written: str, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert json.loads(arguments_of(written)) == expected
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
WITH_SCHEMA = tool("f", a=TEXT, b=TEXT, n=NUMBER, on={"type": "boolean"}, l={"type": "array", "items": TEXT})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{a:90210,b:true}", {"a": "90210", "b": "true"}),
        (f"{{n:{M}30{M},on:{M}True{M}}}", {"n": 30, "on": True}),
        (f"{{n:{M}thirty{M}}}", {"n": "thirty"}),
        (f'{{l:{M}["x","y"]{M}}}', {"l": ["x", "y"]}),
        (f"{{l:{M}x, y{M}}}", {"l": "x, y"}),
        # A broken string must end at the right place, and not at its commas.
        ("{a:look, at, me,n:1}", {"a": "look, at, me", "n": 1}),
        ("{a:see, note: this,n:1}", {"a": "see, note: this", "n": 1}),
        (f"{{a:{M}see, note: this,n:1}}", {"a": "see, note: this", "n": 1}),
        ("{a:San Francisco, b:celsius}", {"a": "San Francisco", "b": "celsius"}),
        (f"{{a:12, rue X{M},n:1}}", {"a": "12, rue X", "n": 1}),
        # Well-formed values that the schema does not allow stay unchanged.
        (f"{{n:{{x:1}},z:{M}y{M}}}", {"n": {"x": 1}, "z": "y"}),
    ],
)
def test_the_schema_helps_to_read(written: str, expected: Any) -> None:
    assert json.loads(arguments_of(written, WITH_SCHEMA)) == expected


@pytest.mark.parametrize(
    ("schema", "written", "expected"),
    [
        ({"type": ["string", "integer"]}, f"{M}3{M}", "3"),
        ({"type": ["string", "integer"]}, "3", 3),
        ({"type": ["integer", "null"]}, f"{M}null{M}", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, f"{M}3{M}", 3),
        ({"anyOf": [{"type": "integer"}, {}]}, f"{M}3{M}", "3"),
        ({"$ref": "#/$defs/count"}, f"{M}3{M}", 3),
        ({"allOf": [{"$ref": "#/$defs/count"}], "description": "how many"}, f"{M}3{M}", 3),
        ({"$ref": "#/$defs/loop"}, f"{M}3{M}", "3"),
        ({"enum": [1, 2]}, f"{M}2{M}", 2),
        ({"type": "integer", "nullable": True}, f"{M}None{M}", None),
        ({"type": "number"}, f"{M}1.5{M}", 1.5),
        ({"type": "integer"}, f"{M}1.5{M}", "1.5"),
        ({"type": "unknown"}, f"{M}3{M}", "3"),
    ],
)
def test_types_of_the_schema(schema: Any, written: str, expected: Any) -> None:
    found = tool("f", x=schema)
    found["function"]["parameters"]["$defs"] = {"count": NUMBER, "loop": {"$ref": "#/$defs/loop"}}
    assert json.loads(arguments_of(f"{{x:{written}}}", found)) == {"x": expected}


@pytest.mark.parametrize(
    "written",
    [
        f"{{a:{M}x,b:90}}",
        "{a:{b:1,c:2}",
        "{a:`x`}",
        f'{{a:"x{M}}}',
        f'{{a:{M}x"}}',
        f"{{a: {M}x{M}{M}{M},b:1}}",
        f"{{a:{M}{M}{M}}}",
        f"{{a: x{M}}}",
        "(1, 2)",
    ],
)
def test_two_meanings_are_none(written: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = arguments_of(written)
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)
    assert "a call of f cannot be read" in caplog.text


SHELL = tool("f", path=TEXT, command=TEXT, text=TEXT, options={"type": "object"}, limit=NUMBER, x=NUMBER)
RAW = object()


def check(written: str, expected: Any, *tools: Tool) -> None:
    """Compare the arguments of a call with `expected`. RAW means that no reading is certain."""
    arguments = arguments_of(written, *tools)
    if expected is RAW:
        with pytest.raises(json.JSONDecodeError):
            json.loads(arguments)
    else:
        assert json.loads(arguments) == expected


@pytest.mark.parametrize("tools", [(), (SHELL,)])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{,limit:7}", {"limit": 7}),
        ("{;limit:7}", {"limit": 7}),
        (f"{{text:{M}a{M},,limit:7}}", {"text": "a", "limit": 7}),
        (f"{{text:{M}a{M}, ;limit:7}}", {"text": "a", "limit": 7}),
        ("{limit:7,options:{, x:1}}", {"limit": 7, "options": {"x": 1}}),
        ("{limit;x:7}", RAW),
        ("{* limit:7}", RAW),
    ],
)
def test_a_comma_is_no_part_of_a_key(written: str, expected: Any, tools: tuple[Tool, ...]) -> None:
    check(written, expected, *tools)


def test_a_key_of_the_schema_may_be_any_text() -> None:
    check("{,limit:7}", {",limit": 7}, tool("f", **{",limit": NUMBER}))


@pytest.mark.parametrize("tools", [(), (SHELL,)])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('(text=f"see", limit=7)', {"text": "see", "limit": 7}),
        ('{text: r"see", limit: 7}', {"text": "see", "limit": 7}),
        (r'(path=r"D:\new\u0041", limit=7)', {"path": r"D:\new\u0041", "limit": 7}),
        (r"(text=r'\w+\n', path=u'\n')", {"text": r"\w+\n", "path": "\n"}),
        (r"{text:b'a', path:Rb'''it's \d''', limit:7}", {"text": "a", "path": r"it's \d", "limit": 7}),
        ('(text=f"see {x}", limit=7)', RAW),
        (r"(text=b'\xff')", RAW),
        ("(limit=int(7))", RAW),
        ('(text=str("a"), limit=7)', RAW),
        ('(text=join("a", "b"))', RAW),
        ('(text="a" "b")', RAW),
        ('(text="a" + "b")', RAW),
        ('(text="a".strip(), limit=7)', RAW),
        ("(text=['a'][0])", RAW),
    ],
)
def test_literals_of_python_are_read_and_expressions_are_not(
    written: str, expected: Any, tools: tuple[Tool, ...]
) -> None:
    check(written, expected, *tools)


@pytest.mark.parametrize("tools", [(), (SHELL,)])
@pytest.mark.parametrize(
    "written",
    [
        f"{{command:`ls -l`,text:{M}limit:7{M}}}",
        f"{{command:`ls`,text:{M}a{M},limit:7}}",
        "{command:`ls`,limit:7}",
        f"{{limit:7,command:`a, b` c{M}}}",
    ],
)
def test_text_between_backticks_is_not_read(written: str, tools: tuple[Tool, ...]) -> None:
    check(written, RAW, *tools)


@pytest.mark.parametrize("tools", [(), (SHELL,)])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (r'{path:"D:\Users\tom",limit:7}', {"path": r"D:\Users\tom", "limit": 7}),
        (r"{'path':'D:\work\report\new.txt'}", {"path": r"D:\work\report\new.txt"}),
        (r'{text:"^\s+\bnow\b",limit:7}', {"text": r"^\s+\bnow\b", "limit": 7}),
        (r"""{command:"cut -f\t '\$x'"}""", {"command": r"cut -f\t '\$x'"}),
        (r'{text:"a\tb\\c\u00e9\"d\""}', {"text": 'a\tb\\cé"d"'}),
        # Some backslashes escape, and others are text. The meaning is unclear.
        (r'{text:"say \"hi\" \$x"}', RAW),
        (r'{text:"D:\\new\Users"}', RAW),
        (r'{text:"a\", limit:7, path:"\d"}', RAW),
        (r'{text:"\a", path:"\d"}', RAW),
        (r'{path:"D:\dir\", limit:7}', RAW),
    ],
)
def test_backslashes_are_escapes_or_text(written: str, expected: Any, tools: tuple[Tool, ...]) -> None:
    check(written, expected, *tools)


@pytest.mark.parametrize("tools", [(), (SHELL,)])
@pytest.mark.parametrize(
    "written",
    [
        f"{{text:{M}a{M},{M}b{M},options:{{path:{M}0{M},k:{M}{M}{M}{M}{M},n:7}}",
        f"{{options:{{x:1, y{M},limit:7}}",
        f"{{options:[1, 2 {M},limit:7}}",
        "{options:{a b},limit:7}",
    ],
)
def test_a_structure_is_no_text(written: str, tools: tuple[Tool, ...]) -> None:
    check(written, RAW, *tools)


@pytest.mark.parametrize(
    ("written", "tools", "expected"),
    [
        ("{do:make x=1, y=2}", (), RAW),
        ("{do:say hi, then: 3}", (), RAW),
        (f"{{do:ls -l,then:{M}x{M}}}", (), RAW),
        ("{do:say hi}, then: 3}", (), RAW),
        ("{do:say hi, then: 3}", (SHELL,), RAW),
        ("{command:say hi, then: 3}", (SHELL,), RAW),
        ("{command:say hi, limit: 3}", (SHELL,), {"command": "say hi", "limit": 3}),
        ('{command:say hi, "limit": 3}', (SHELL,), {"command": "say hi", "limit": 3}),
        ("{do:say,then:wait}", (), {"do": "say", "then": "wait"}),
        ("{do:say hi}", (), {"do": "say hi"}),
        ("{do:12, then: 3}", (), {"do": 12, "then": 3}),
    ],
)
def test_text_without_quotes_is_not_split_at_a_comma(written: str, tools: tuple[Tool, ...], expected: Any) -> None:
    check(written, expected, *tools)


@pytest.mark.parametrize("tools", [(), (SHELL,)])
@pytest.mark.parametrize(
    "written",
    [
        f'{{command:"print "hi" > a.txt{M}}}',
        '(text="x", text="y")',
        "{text:'x', text:'y'}",
        f"{{text:{M}x{M},text:{M}y{M}}}",
        f"{{text:{M}x{M},{M}text{M}:{M}y{M}}}",
        "{limit:7,limit:8}",
        '{text:"x"}, {text:"y"}',
        '{text:"x"},{limit:7}',
    ],
)
def test_doubtful_arguments_are_passed_on(written: str, tools: tuple[Tool, ...]) -> None:
    check(written, RAW, *tools)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{text:[]}", RAW),
        ("{text:{limit:7},limit:7}", RAW),
        ("{limit:+7}", {"limit": 7}),
        ("{limit:2_500}", {"limit": 2500}),
        ("{limit:-7.}", {"limit": -7}),
        ("{limit:'+7'}", {"limit": 7}),
        ("{text:+7}", {"text": "+7"}),
        ("{limit:2__500}", RAW),
        ("{limit:007}", RAW),
        ("{limit:seven}", RAW),
        ("{limit:.5}", RAW),
    ],
)
def test_values_without_quotes_have_the_type_of_the_schema(written: str, expected: Any) -> None:
    check(written, expected, SHELL)


@pytest.mark.parametrize(
    ("written", "tools", "name", "arguments"),
    [
        ('"f"{limit:7}', (), "f", '{"limit":7}'),
        ("'f'(limit=7)", (SHELL,), "f", '{"limit":7}'),
        ("`f` {limit:7}", (), "f", '{"limit":7}'),
        (f"{M}f{M}{{limit:7}}", (), "f", '{"limit":7}'),
        ('"mcp:f"{limit:7}', (SHELL,), "f", '{"limit":7}'),
        ("f:{limit:7}", (SHELL,), "f", '{"limit":7}'),
        ("f=(limit=7)", (SHELL,), "f", '{"limit":7}'),
        ("f[{limit:7}]", (SHELL,), "f", '{"limit":7}'),
        ("f[{limit:7},{limit:8}]", (SHELL,), "f", "[{limit:7},{limit:8}]"),
        ('f["x"]', (SHELL,), "f", '["x"]<tool_call|>'),
        # A tool can have any name.
        ("f:{limit:7}", (tool("f:"),), "f:", '{"limit":7}'),
    ],
)
def test_names_of_tools_are_found(written: str, tools: tuple[Tool, ...], name: str, arguments: str) -> None:
    text = f"<|tool_call>call:{written}<tool_call|>ok"
    assert parse([text], tools=tools) == parse(text, tools=tools) == ("ok", [(name, arguments)])


@pytest.mark.parametrize(
    ("head", "calls"),
    [
        ("", []),
        ("cal", []),
        ("call:", []),
        ("call:f", []),
        ('call:"f', []),
        ("call:f{}call:g", [("f", "{}")]),
        ("call:f{limit:7}, ca", [("f", '{"limit":7}')]),
    ],
)
def test_a_call_that_is_cut_in_its_name_is_no_content(head: str, calls: list[Call]) -> None:
    text = f"ok <|tool_call>{head}"
    for tools in ((), (tool("f"), tool("g"))):
        found = parse([text], tools=tools, end="length")
        assert found == parse(text, tools=tools, end="length") == ("ok ", calls)
        parser = ToolCallParser(tools)
        assert parser.add(text, is_last=True, is_cut=True)[0] == "ok "


@pytest.mark.parametrize("text", ["x, path: " * 20_000, M * 4000, '"' + r'a\d" b ' * 7000])
def test_the_time_for_unreadable_arguments_is_bounded(text: str) -> None:
    """A parser that tries each place with each other place needs five seconds or more per text."""
    start = time.process_time()
    parse([f"<|tool_call>call:f{{command:{text}}}<tool_call|>"])
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "text",
    ['f{a:"' + "x y " * 25_000, "f{a:" + "x y " * 25_000, "f{" + "x y " * 25_000, "f{a:" + "1" * 100_000, "f" * 40_000],
)
def test_long_parts_of_a_call_are_looked_through_once(text: str) -> None:
    """A parser that restarts its search for each piece needs five seconds or more per text."""
    start = time.process_time()
    parse(["<|tool_call>call:", *(text[at : at + 4] for at in range(0, len(text), 4))])
    assert time.process_time() - start < 3


def test_calls_in_one_block() -> None:
    text = f"<|tool_call>call:a{{x:1}}call:b{{y:{M}call:c{{}}{M}}},\ncall:c(z='}}call:d{{')<tool_call|>ok call:e{{}}"
    calls = [("a", '{"x":1}'), ("b", '{"y":"call:c{}"}'), ("c", '{"z":"}call:d{"}')]
    assert parse(text) == parse([text]) == ("ok call:e{}", calls)


def test_a_call_ends_behind_its_strings() -> None:
    end = "<tool_call|>"
    for written in (f"{{a:{M}x{end}y{M},b:1}}", f'{{a:"x{end}y",b:1}}', f'{{a:"x{end}y", b: {M}{end}{M}}}'):
        assert json.loads(arguments_of(written))["a"] == f"x{end}y"
    text = f"<|tool_call>call:f{{a:{M}ls}}{end}\n<|tool_call>call:g{{a:{M}x{M}}}{end}"
    assert parse(text) == parse([text]) == ("\n", [("f", '{"a":"ls"}'), ("g", '{"a":"x"}')])


def test_a_namespace_before_the_name() -> None:
    text = "<|tool_call>call:google:mcp:f{}<tool_call|>"
    assert parse([text], tools=[tool("f")]) == ("", [("f", "{}")])
    assert parse([text], tools=[tool("g")]) == ("", [("google:mcp:f", "{}")])


def test_a_model_that_stops_has_finished() -> None:
    """A call without its end is complete only if all its values are closed."""
    assert arguments_of(f"{{a:[{M}x{M}", end="") == '{"a":["x"]}'
    for written in (f"{{a:{M}rm -rf /tmp", "{a:1,", "{a:", "{"):
        with pytest.raises(json.JSONDecodeError):
            json.loads(arguments_of(written, end=""))


def test_unreadable_calls_are_counted() -> None:
    parser = ToolCallParser()
    parser.add(
        "<|tool_call>call:f{a 1}<tool_call|><|tool_call>call:f{a:1,}<tool_call|><|tool_call>call:g{b 2}<tool_call|>"
    )
    assert parser.unreadable == 2


@pytest.mark.parametrize(
    ("end", "arguments", "count"), [("stop", '{"a":1}', []), ("length", '{"a":1', []), ("stop", "{a 1", [1])]
)
def test_an_answer_reads_calls_by_its_tools_and_its_end(end: str, arguments: str, count: list[int]) -> None:
    unreadable: list[int] = []
    answer = Answer([tool("f", a=NUMBER)], unreadable.append)
    text = "<|tool_call>call:f{a 1" if count else "<|tool_call>call:f{a:1"
    response: Any = SimpleNamespace(text=text, thought="", in_thought=False, finish_reason=end)
    answer.add(response)
    assert [call.arguments for call in answer.calls] == [arguments]
    assert unreadable == count


NAMES = st.sampled_from(["a", "key"]) | STRINGS
MARKED = STRINGS | st.sampled_from(["a<tool_call|>b", "x, y: 1}", "it's", "}call:b{"])
MIXED = st.recursive(
    SCALARS | MARKED,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.dictionaries(NAMES, MIXED, max_size=3),
    st.lists(st.sampled_from(["strict", "json", "python", "call"]), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.lists(st.integers(0, 1000), max_size=6),
)
def test_any_object_in_any_syntax_comes_back_equal(
    arguments: dict[str, Any], styles: list[str], seed: int, places: list[int]
) -> None:
    text = Writer(random.Random(seed), styles).call("f", arguments) + "ok"
    content, [(name, found)] = parse([text])
    assert (content, name) == ("ok", "f")
    assert json.loads(found) == arguments
    assert parse(cut(text, places)) == (content, [(name, found)])


OPTIONS = {"type": "object", "properties": {"depth": NUMBER, "name": TEXT}}
DAMAGED = tool("f", path=TEXT, text=TEXT, n=NUMBER, tags={"type": "array", "items": TEXT}, options=OPTIONS)
DAMAGED["function"]["parameters"]["properties"]["edits"] = {"type": "array", "items": OPTIONS}
CODES = st.sampled_from(['echo "a", b', 'x = {"k": 1}', "f(a, b: 1)", 'say "hi" now, c: d', '"""doc"""\nx']) | TEXTS
DAMAGED_TEXTS = CODES.filter(lambda text: QUOTE not in text)
DAMAGED_OPTIONS = st.fixed_dictionaries({}, optional={"depth": st.integers(), "name": DAMAGED_TEXTS})
DAMAGED_ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "path": DAMAGED_TEXTS,
        "text": DAMAGED_TEXTS,
        "n": st.integers(),
        "tags": st.lists(DAMAGED_TEXTS, max_size=3),
        "options": DAMAGED_OPTIONS,
        "edits": st.lists(DAMAGED_OPTIONS, max_size=2),
    },
)


class Text(str):
    """The text of a string. It is never a token of the syntax."""

    __slots__ = ()


def tokens_of(value: Any) -> list[str]:
    """Return the tokens of a value in Gemma's syntax."""
    if isinstance(value, str):
        return [QUOTE, Text(value), QUOTE]
    if not isinstance(value, dict | list):
        return [render(value)]
    pairs = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    parts = [[*([f"{key}:"] if key is not None else []), *tokens_of(item)] for key, item in pairs]
    inner = [token for index, part in enumerate(parts) for token in ([","] if index else []) + part]
    return ["{", *inner, "}"] if isinstance(value, dict) else ["[", *inner, "]"]


def damaged(tokens: list[str], kind: str, pick: int) -> str:
    """Return the text of the tokens with one error of this kind, if a place for it exists."""
    wanted = {"comma": (",",), "trailing": ("}", "]"), "brace": ("}", "]"), "more": ("}", "]")}.get(kind, (QUOTE,))
    places = [index for index, token in enumerate(tokens) if token in wanted and not isinstance(token, Text)]
    if kind == "comma":
        places = [index for index in places if tokens[index - 1] == QUOTE]
    if kind == "trailing":
        places = [index for index in places if tokens[index - 1] not in ("{", "[")]
    changed = list(tokens)
    if places:
        at = places[pick % len(places)]
        changed[at] = {"double": tokens[at] * 2, "more": tokens[at] * 2, "trailing": "," + tokens[at]}.get(kind, "")
    return "".join(changed)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    DAMAGED_ARGUMENTS,
    st.sampled_from(["mark", "mark", "double", "comma", "trailing", "brace", "more"]),
    st.integers(0, 100),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_damaged_call_is_repaired_or_passed_on_but_never_altered(
    arguments: dict[str, Any], kind: str, pick: int, with_schema: bool, place: int
) -> None:
    text = f"<|tool_call>call:f{damaged(tokens_of(arguments), kind, pick)}<tool_call|>"
    tools = [DAMAGED] if with_schema else []
    content, calls = parse([text], tools=tools)
    assert parse(cut(text, [place]), tools=tools) == (content, calls)
    try:
        found = [json.loads(written) for _, written in calls]
    except ValueError:
        return
    assert (content, found) == ("", [arguments])


def test_long_arguments_are_read_in_one_go() -> None:
    """One step per held-back character would take minutes."""
    for text in ("x = {'a': 1}, y: 2\n" * 5000, " " * 100_000, "," * 100_000, "}" * 100_000):
        written = f"<|tool_call>call:f{{a:{M}{text}z{M},b:True}}<tool_call|>"
        _, [(_, arguments)] = parse(written[start : start + 9] for start in range(0, len(written), 9))
        assert json.loads(arguments) == {"a": text + "z", "b": True}


@pytest.mark.parametrize("form", ["bytes", "gemma", "demo"])
def test_special_tokens_are_text_of_the_answer(form: str, tmp_path: Path) -> None:
    """Every blank next to them is kept."""
    folder = {"bytes": make_tokenizer, "gemma": make_gemma_tokenizer}.get(form, lambda _: mlx_mtp.DEMO_PAIR)(tmp_path)
    tokenizer = load_tokenizer(folder, STOP_IDS)
    text = f"so <|tool_call>call:f{{a: {QUOTE} Zürich 日 {QUOTE} , b:{QUOTE}{QUOTE}}} <tool_call|> \n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, thought_channel(tokenizer), ())
    pieces = [stream.add(token, is_last=index == len(tokens) - 1).text for index, token in enumerate(tokens)]
    assert "".join(pieces) == text
    content, [(_, arguments)] = parse(pieces)
    assert content == "so  \n"
    assert json.loads(arguments) == {"a": " Zürich 日 ", "b": ""}
