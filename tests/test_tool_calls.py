"""Tool calls: the same however the answer is cut, and nothing lost of malformed ones."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import STOP_IDS, make_gemma_tokenizer, make_tokenizer
from tool_syntax import CALLS, CONTENTS, QUOTE, Call, cut, parse, render_call

import mlx_mtp
from mlx_mtp.text import TextStream
from mlx_mtp.tokenizer import load_tokenizer, thought_channel
from mlx_mtp.tool_calls import ToolCallParser


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
    ]
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(SCRAPS, max_size=25), st.lists(st.integers(0, 1000), max_size=12))
def test_whatever_the_text_it_is_read_the_same_however_it_is_cut(scraps: list[str], places: list[int]) -> None:
    text = "".join(scraps)
    assert parse(text) == parse([text]) == parse(cut(text, places))


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser()
    steps = [
        ("Let me see. <|tool", "Let me see. ", []),
        ("_call>call:wea", "", []),
        ("ther{", "", [(0, "weather", "{")]),
        ("ci", "", []),
        ("ty:" + QUOTE + 'San "F', "", [(0, None, '"city":"San \\"F')]),
        ("ran<|", "", [(0, None, "ran")]),
        ("cisco" + QUOTE, "", [(0, None, '<|cisco"')]),
        (",days:1", "", [(0, None, ',"days":')]),
        ("2}", "", [(0, None, "12}")]),
        ("<tool_call|><|tool_call>call:b{}<tool_call|>ok", "ok", [(1, "b", "{}")]),
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
        ("None", "None"),
        ("True", "True"),
        ("007", "007"),
        ("+1", "+1"),
        ("1.", "1."),
        ("NaN", "NaN"),
        ("１", "１"),  # noqa: RUF001
        ("two words", "two words"),
        ('"a"', '"a"'),
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
        f"<|tool_call>call:f{{x-y.z:1,a b:2,a b:3,{QUOTE} :{QUOTE}:4,{{,:5,{QUOTE}{QUOTE} :6}}<tool_call|>"
    )
    assert arguments == '{"x-y.z":1,"a b":2,"a b":3," :":4,"{,":5,"":6}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # No call:NAME{.
        ("a<|tool_call>b<tool_call|>c", "a<|tool_call>b<tool_call|>c", []),
        ("<|tool_call>call:{}<tool_call|>", "<|tool_call>call:{}<tool_call|>", []),
        ("<|tool_call>call:a b{}", "<|tool_call>call:a b{}", []),
        ("<|tool_call>call<|tool_call>call:f{}<tool_call|>", "<|tool_call>call", [("f", "{}")]),
        ("<|tool_call><|tool_call>call:f{}<tool_call|>", "<|tool_call>", [("f", "{}")]),
        ("<|tool_call>call:f", "<|tool_call>call:f", []),
        ("<tool_call|>", "<tool_call|>", []),
        # The syntax breaks inside.
        (f"<|tool_call>call:f{{a:{QUOTE}b{QUOTE} c<tool}}<tool_call|>d", "d", [("f", '{"a":"b"c<tool}')]),
        ("<|tool_call>call:f{a:1,b<tool_call|>d", "d", [("f", '{"a":1,b')]),
        ("<|tool_call>call:f{a:[1,2}<tool_call|>", "", [("f", '{"a":[1,2}')]),
        ("<|tool_call>call:f{a:,b:1}<tool_call|>", "", [("f", '{"a":,b:1}')]),
        ("<|tool_call>call:f{a:1,}<tool_call|>", "", [("f", '{"a":1,}')]),
        ("<|tool_call>call:f{a:1,}:2}<tool_call|>", "", [("f", '{"a":1,}:2}')]),
        (f"<|tool_call>call:f{{a:b{QUOTE}c{QUOTE}}}<tool_call|>", "", [("f", f'{{"a":b{QUOTE}c{QUOTE}}}')]),
        (f"<|tool_call>call:f{{{QUOTE}a{QUOTE} 1}}<tool_call|>", "", [("f", '{"a"1}')]),
        ("<|tool_call>call:f{a:1}}<tool_call|>d", "d", [("f", '{"a":1}}')]),
        ("<|tool_call>call:f{a:1<tool_call|>d", "d", [("f", '{"a":1')]),
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
    with caplog.at_level(logging.WARNING, "mlx_mtp.tool_calls"):
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
    ],
)
def test_arguments_that_are_cut_off_are_incomplete(text: str, arguments: str, caplog: pytest.LogCaptureFixture) -> None:
    text = "<|tool_call>call:f{" + text
    assert parse(text) == parse([text]) == ("", [("f", arguments)])
    parser = ToolCallParser()
    assert parser.add(text, is_last=True) == ("", [(0, "f", arguments)])
    assert not caplog.records


def test_a_call_without_its_end_ends_where_the_next_begins() -> None:
    text = "<|tool_call>call:f{a:1} <|tool_call>call:g{}<tool_call|>"
    assert parse(text) == parse([text]) == ("", [("f", '{"a":1}'), ("g", "{}")])


@pytest.mark.parametrize("form", ["bytes", "gemma", "demo"])
def test_special_tokens_are_text_of_the_answer(form: str, tmp_path: Path) -> None:
    """With every blank beside them."""
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
