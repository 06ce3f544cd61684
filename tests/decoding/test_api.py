"""The library as an app uses it: prompts of every kind, interleaved and cancelled streams, text in pieces."""

import gc
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.tiny import STOP_IDS, WINDOW, random_tokens

import mlx_mtp

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(2 * WINDOW, seed=5)
TEXT = "naïve café 日本語 🦊 👩‍👩‍👧 Ελλάδα, done"


@pytest.fixture(scope="module")
def model(tiny_pair: TinyPair) -> mlx_mtp.Model:
    return mlx_mtp.load(tiny_pair("e2b") / "target")


def dictate(prompt: list[int], tokens: list[int]) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a processor that makes the model write these tokens."""

    def process(text: mx.array, logits: mx.array) -> mx.array:
        index = text.size - len(prompt)
        return logits if index >= len(tokens) else logits.at[:, tokens[index]].add(1000.0)

    return process


def test_a_prompt_is_text_token_ids_or_messages(model: mlx_mtp.Model) -> None:
    def tokens(prompt: Any) -> list[int]:
        return model.generate(prompt, max_tokens=12).tokens

    ids = model.tokenizer.encode("hello there")
    assert tokens("hello there") == tokens(ids) == tokens(tuple(ids)) == tokens(mx.array(ids))
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "and now"},
    ]
    rendered = (
        "<bos><|turn>system\nbe brief<turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n"
        "<|turn>user\nand now<turn|>\n<|turn>model\n"
    )
    assert model.tokenizer.decode(model.encode(messages)) == rendered
    assert tokens(messages) == tokens(rendered)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([2, 512], "the prompt must hold token ids from 0 to 511, found 512"),
        ([2, -1], "the prompt must hold token ids from 0 to 511, found -1"),
        ([2, "a"], "the prompt must hold token ids from 0 to 511, found 'a'"),
        ([{"content": "x"}], r"messages\[0\] must have a role and content, found {'content': 'x'}"),
        ([{"role": "user", "content": "x"}, "y"], r"messages\[1\] must have a role and content, found 'y'"),
        ([2] * 4096, "the prompt has 4096 tokens, but the context holds 4096 with the answer"),
    ],
)
def test_bad_prompts_are_refused_at_once(model: mlx_mtp.Model, prompt: Any, message: str) -> None:
    with pytest.raises(mlx_mtp.PromptError, match=message):
        model.stream_generate(prompt)


def test_the_templates_own_complaint_is_passed_on(tiny_pair: TinyPair) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target", "none")
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(mlx_mtp.PromptError, match="the chat template cannot render the messages: roles must alternate"):
        model.stream_generate([{"role": "user", "content": "x"}])


def test_streams_of_one_model_may_interleave(model: mlx_mtp.Model) -> None:
    options: list[dict[str, Any]] = [
        {"num_draft_tokens": 3},
        {"num_draft_tokens": 2, "sampling": mlx_mtp.Sampling(temperature=1.0, seed=5, presence_penalty=0.5)},
        {"num_draft_tokens": 4, "regex": "([a-z]{2,5} ){9}"},
        {"num_draft_tokens": 0, "logprobs": 2},
    ]
    prompts = [random_tokens(WINDOW + 10 * i, seed=i) for i in range(4)]
    streams = [
        model.stream_generate(prompt, max_tokens=40, ignore_eos="regex" not in option, **option)
        for prompt, option in zip(prompts, options, strict=True)
    ]
    turns = list(zip_longest(*streams))
    for index, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
        alone = model.generate(prompt, max_tokens=40, ignore_eos="regex" not in option, **option)
        responses = [turn[index] for turn in turns if turn[index] is not None]
        assert [response.token for response in responses] == alone.tokens
        assert "".join(response.text for response in responses) == alone.text
        assert responses[-1].stats == alone.last.stats


def test_closing_a_stream_frees_its_caches(model: mlx_mtp.Model) -> None:
    prompt = random_tokens(2000, seed=1)
    # This call compiles the rounds, which the model keeps.
    options = mlx_mtp.GenerationOptions(num_draft_tokens=3, ignore_eos=True, reuse_prompt=False)
    model.generate(prompt, options, max_tokens=30)
    gc.collect()
    before = mx.get_active_memory()
    stream = model.stream_generate(prompt, options, max_tokens=2000)
    for _ in range(20):
        last = next(stream)
    held = mx.get_active_memory() - before
    assert held > 4e5
    stream.close()
    # The memory is free at once. Nothing is left for the garbage collector.
    assert mx.get_active_memory() - before < held / 20
    with pytest.raises(StopIteration):
        next(stream)
    assert last.generation_tokens == 20
    # A stream that never started has nothing to free.
    model.stream_generate(prompt).close()


def test_nothing_is_printed(model: mlx_mtp.Model, capfd: pytest.CaptureFixture[str]) -> None:
    sampling = mlx_mtp.Sampling(temperature=1.0, top_k=64, top_p=0.95, repetition_penalty=1.1)
    for grammar in ({}, {"json_schema": {"type": "array", "items": {"type": "boolean"}}}):
        options: dict[str, Any] = {"enable_thinking": True, "thinking_budget": 5, "stop": "zz", **grammar}
        model.generate([{"role": "user", "content": "hello"}], max_tokens=30, sampling=sampling, logprobs=1, **options)
    with pytest.raises(mlx_mtp.OptionError):
        model.stream_generate(PROMPT, regex="[a")
    assert capfd.readouterr() == ("", "")


def test_every_piece_is_readable_text(model: mlx_mtp.Model) -> None:
    """A character of several tokens arrives whole, even where a block or a stop string cuts it."""
    tokens = model.tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > 1.5 * len(TEXT)
    for k in (0, 4):
        for stop in ("", "本", "語 🦊 ", "Ελλ", "done"):
            expected = TEXT.partition(stop)[0] if stop else TEXT
            options: dict[str, Any] = {"stop": stop or (), "max_tokens": len(tokens), "ignore_eos": True}
            processors = [dictate(PROMPT, tokens)]
            pieces = list(model.stream_generate(PROMPT, logits_processors=processors, num_draft_tokens=k, **options))
            assert "".join(piece.text for piece in pieces) == expected
            for piece in pieces:
                piece.text.encode()
                assert "\ufffd" not in piece.text


def test_bytes_that_are_no_character_are_replaced(model: mlx_mtp.Model) -> None:
    """A random model often writes such bytes. Every piece is valid text all the same."""
    # The second token is the zero byte. mlx-lm's byte-level detokenizer confuses it with another byte.
    unwanted = dict.fromkeys((model.tokenizer.get_vocab()[piece] for piece in ("<|channel>", "\u0100")), -1000.0)
    for seed in range(4):
        sampling = mlx_mtp.Sampling(temperature=1.5, seed=seed, logit_bias=unwanted)
        options: dict[str, Any] = {"sampling": sampling, "ignore_eos": True, "max_tokens": 60, "num_draft_tokens": 3}
        pieces = list(model.stream_generate(PROMPT, stop="\ufffd\ufffd!", **options))
        assert [piece.text.encode().decode() for piece in pieces] == [piece.text for piece in pieces]
        # The same detokenizer, unlike Gemma's own, drops a space at the start of the text.
        whole = model.tokenizer.decode([piece.token for piece in pieces])
        assert "".join(piece.text for piece in pieces) == whole.removeprefix(" ")


@pytest.mark.parametrize("stop_id", STOP_IDS)
def test_every_stop_id_ends_the_text(model: mlx_mtp.Model, stop_id: int) -> None:
    """generation_config.json lists several stop ids. The text does not contain them, wherever they are in a block."""
    words = model.tokenizer.encode("a few words", add_special_tokens=False)
    for k, length in chain(((0, 3),), ((4, n) for n in range(1, 6))):
        said = [*words[:length], stop_id, *words]
        result = model.generate(PROMPT, num_draft_tokens=k, logits_processors=[dictate(PROMPT, said)])
        assert result.tokens == [*words[:length], stop_id]
        assert result.text == model.tokenizer.decode(words[:length])
        assert result.last.finish_reason == "stop"
