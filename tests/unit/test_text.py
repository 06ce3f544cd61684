"""The text of a generation: where a stop string ends it, and where stop strings are ignored."""

import pytest

import mlx_mtp
from mlx_mtp.text.answer import TextStream
from mlx_mtp.text.tokenizer import load_tokenizer, thought_channel


def read(text: str, *stop: str) -> tuple[str, bool]:
    """Return the text of a generation's tokens, and whether a stop string ended it."""
    tokenizer = load_tokenizer(mlx_mtp.DEMO_PAIR, (1,))
    stream = TextStream(tokenizer, thought_channel(tokenizer), stop)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found = ""
    for token in [*tokens, None]:
        piece = stream.add(token, is_last=token is None)
        found += piece.text
        if piece.stopped:
            return found, True
    return found, False


CALL = '<|tool_call>call:f{abc:<|"|>x, end<|"|>}<tool_call|>'


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (f"Now {CALL}{CALL}", ["e", "}"], (f"Now {CALL}{CALL}", False)),
        (f"Now {CALL} the end", ["end"], (f"Now {CALL} the ", True)),
        (f"The end {CALL}", ["end"], ("The ", True)),
        # The end mark inside a string does not end a call. A start mark without a call does not begin one.
        (CALL.replace("end", "<tool_call|> end"), ["end"], (CALL.replace("end", "<tool_call|> end"), False)),
        ("<|tool_call> the end", ["end"], ("<|tool_call> the ", True)),
        # This call never ends.
        (CALL.removesuffix("<tool_call|>"), ["end"], (CALL.removesuffix("<tool_call|>"), False)),
        # The marks themselves can be stop strings.
        (f"Now {CALL} end", ["<tool_call|>"], ("Now " + CALL.removesuffix("<tool_call|>"), True)),
        (f"Now {CALL}", ["<|tool_call>"], ("Now ", True)),
        ("<|channel>thought\nthe end<channel|>Not the end", ["end"], ("Not the ", True)),
    ],
)
def test_a_stop_string_is_not_looked_for_inside_a_call(text: str, stop: list[str], expected: tuple[str, bool]) -> None:
    assert read(text, *stop) == expected
