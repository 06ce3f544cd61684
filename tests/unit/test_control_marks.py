"""Marks of control tokens: none stays in the content, and no other text is lost, wherever the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tool_syntax import cut

from mlx_mtp.text.control_marks import ControlMarks


def read(pieces: list[str], *, has_tools: bool = True) -> tuple[str, str]:
    marks = ControlMarks(has_tools=has_tools)
    parts = [marks.add(piece) for piece in pieces] + [marks.add("", is_last=True)]
    return "".join(content for content, _ in parts), "".join(thought for _, thought in parts)


@pytest.mark.parametrize(
    ("text", "content", "thought"),
    [
        ("Hi <b>there</b>, x <| y |> z", "Hi <b>there</b>, x <| y |> z", ""),
        ("thought\nhm\n<channel|>Hi", "Hi", "hm\n"),
        ("thought\nless is more", "thought\nless is more", ""),
        ("thoughtful<channel|>!", "thoughtful!", ""),
        ("Hi<channel|><channel|>", "Hi", ""),
        ("<tool_call|>", "", ""),
        ("<|turn>model\nHi<turn|>", "Hi", ""),
        ("<|turn>models", "s", ""),
        ("<|turn>\nHi", "\nHi", ""),
        ("a<|channel>thought\nb<|channel>c<|think|>", "abc", ""),
        ('He said <|"|>no<|"|>.', 'He said "no".', ""),
        ("a<|tool_call>b<|tool_response>c<tool_response|>d<|tool>e<tool|>f<|turn", "abcdef<|turn", ""),
    ],
)
def test_marks_are_taken_out(text: str, content: str, thought: str) -> None:
    assert read([text]) == (content, thought)
    assert read(list(text)) == (content, thought)


def test_without_tools_a_call_is_text() -> None:
    text = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
    assert read([f"<|turn>model\n{text}"], has_tools=False) == (text, "")
    assert read(list(f"a<tool_call|>b{text}c<tool_call|>"), has_tools=False) == (f"ab{text}c", "")


SCRAPS = st.sampled_from(
    ["<|turn>", "model", "\n", "<turn|>", "thought", "<channel|>", "<|", '"', "|>", "x", "<tool_call|>"]
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(SCRAPS, max_size=12), st.lists(st.integers(0, 100), max_size=8))
def test_however_it_is_cut(scraps: list[str], places: list[int]) -> None:
    text = "".join(scraps)
    content, thought = read([text])
    assert read(cut(text, places)) == (content, thought)
    if "<" not in text:
        assert (content, thought) == (text, "")


def test_text_comes_as_it_is_written() -> None:
    marks = ControlMarks(has_tools=True)
    assert [marks.add(piece)[0] for piece in ("Hi", " there<", "b>", "<|turn>mo", "del", "\nyes")] == [
        *("Hi", " there", "<b>", "", "", "yes")
    ]
