"""Drafters with a part of the vocabulary: the converter or training cuts them, and decoding stays lossless."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import WINDOW, random_tokens

import mlx_mtp
from mlx_mtp.convert.cli import main
from mlx_mtp.gemma4.draft_vocab import choose_ids
from mlx_mtp.train import main as train

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(2 * WINDOW, seed=5)
SIZE = 150


def convert(source: Path, output: Path, *args: str | Path, code: int = 0) -> None:
    """Run the converter's command line in this process, because a dozen processes take a minute to start."""
    assert main(list(map(str, ["--hf-path", source / "target", "--mlx-path", output, *args]))) == code


def test_the_most_useful_tokens() -> None:
    """The order is: tokens to keep, the most frequent tokens, the first tokens."""
    texts = [[9, 9, 7], [7, 9, 11]]
    assert choose_ids(texts, {1}, 12, 3).tolist() == [1, 7, 9]
    assert choose_ids(texts, {1}, 12, 6).tolist() == [0, 1, 2, 7, 9, 11]
    assert choose_ids([], {5}, 12, 3).tolist() == [0, 1, 5]


@pytest.mark.parametrize("options", [[], ["-q"]], ids=["unquantized", "4 bit"])
def test_converted_with_a_draft_vocabulary(tiny_pair: TinyPair, tmp_path: Path, options: list[str]) -> None:
    source = tiny_pair("31b")
    convert(source, tmp_path / "whole", *options)
    convert(source, tmp_path / "cut", "--draft-vocab", str(SIZE), *options)
    whole, cut = (mlx_mtp.load(tmp_path / name) for name in ("whole", "cut"))
    assert whole.drafter is not None
    assert cut.drafter is not None
    assert cut.drafter.draft_vocab_ids is not None
    ids = cut.drafter.draft_vocab_ids.tolist()
    assert ids == list(range(SIZE))
    assert json.loads((tmp_path / "cut" / "drafter" / "config.json").read_text())["draft_vocab_size"] == SIZE
    # The rows and the logits equal those of the whole head.
    state = mx.random.normal((1, 1, cut.drafter.config.text.hidden_size), key=mx.random.key(0))
    candidates, every = cut.drafter.candidates(state), whole.drafter.candidates(state)
    assert mx.array_equal(candidates.logits[:, :SIZE], every.logits[:, :SIZE])
    sizes = [sum(file.stat().st_size for file in (tmp_path / name / "drafter").iterdir()) for name in ("whole", "cut")]
    assert sizes[1] < sizes[0]


def test_drafts_stay_lossless(tiny_pair: TinyPair, tmp_path: Path) -> None:
    convert(tiny_pair("31b"), tmp_path / "cut", "--draft-vocab", str(SIZE))
    model = mlx_mtp.load(tmp_path / "cut")
    coupled = mlx_mtp.Sampling(temperature=1.0, seed=2, top_k=100, presence_penalty=0.3, acceptance="coupled")
    for sampling in (mlx_mtp.Sampling(), coupled):
        options: dict[str, Any] = {"max_tokens": 80, "ignore_eos": True, "sampling": sampling}
        plain = model.generate(PROMPT, num_draft_tokens=0, **options)
        assert max(plain.tokens) >= SIZE, "the text never leaves the draft vocabulary: the test proves nothing"
        for k in (1, 4):
            assert model.generate(PROMPT, num_draft_tokens=k, **options).tokens == plain.tokens
    # In sampled blocks, all accepted tokens are in the draft vocabulary.
    sampling = mlx_mtp.Sampling(temperature=1.0, seed=3)
    options = {"sampling": sampling, "max_tokens": 120, "ignore_eos": True}
    responses = list(model.stream_generate(PROMPT, num_draft_tokens=4, **options))
    assert {r.token for r in responses if r.from_draft} <= set(range(SIZE))
    assert any(r.from_draft for r in responses)
    assert max(r.token for r in responses) >= SIZE


def test_a_grammar_outside_the_draft_vocabulary(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """If the grammar allows no token of the draft vocabulary, the draft has an allowed token instead."""
    text = tmp_path / "text.txt"
    text.write_text("letters and nothing else\n" * 3)
    convert(tiny_pair("31b"), tmp_path / "cut", "--draft-vocab", "20", "--draft-vocab-text", text)
    model = mlx_mtp.load(tmp_path / "cut")
    assert model.drafter is not None
    assert model.drafter.draft_vocab_ids is not None
    words = {model.tokenizer.decode([token]) for token in np.array(model.drafter.draft_vocab_ids).tolist()}
    assert not [word for word in words if any(character.isdigit() for character in word)]
    for regex in ("[0-9]{12}", "([a-z][0-9]){8}"):
        plain = model.generate(PROMPT, regex=regex, num_draft_tokens=0)
        assert model.generate(PROMPT, regex=regex, num_draft_tokens=4).tokens == plain.tokens
        for seed in range(3):
            sampling = mlx_mtp.Sampling(temperature=1.0, seed=seed)
            assert re.fullmatch(regex, model.generate(PROMPT, regex=regex, sampling=sampling).text)


def test_counted_in_text_or_jsonl(tiny_pair: TinyPair, tmp_path: Path) -> None:
    words = "zebra quiz jazz"
    (tmp_path / "text.txt").write_text(f"{words}\n" * 2)
    line = {"messages": [{"role": "user", "content": words}], "n": 1}
    (tmp_path / "text.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"text": words}) + "\n")
    model = mlx_mtp.load(tiny_pair("31b") / "target", "none")
    expected = set(model.tokenizer.encode(words, add_special_tokens=False))
    for name in ("text.txt", "text.jsonl"):
        output = tmp_path / f"{name}.out"
        convert(tiny_pair("31b"), output, "--draft-vocab", "40", "--draft-vocab-text", tmp_path / name)
        arrays: Any = mx.load(str(output / "drafter" / "model-draft-vocab.safetensors"))
        assert expected | {1, 5, 7} <= set(arrays["draft_vocab_ids"].tolist())


def test_trained_with_a_draft_vocabulary(tiny_pair: TinyPair, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair("31b"), tmp_path / "pair")
    data = tmp_path / "data.jsonl"
    rng = np.random.default_rng(0)
    data.write_text(
        "".join(json.dumps({"text": " ".join(rng.choice(["ba", "be", "on"], 40))}) + "\n" for _ in range(9))
    )
    args = ["--model", tmp_path / "pair" / "target", "--data", data, "--iters", 4, "--batch-size", 1]
    assert train([*map(str, args), "--draft-vocab", "30"]) == 0
    model = mlx_mtp.load(tmp_path / "pair" / "target")
    assert model.drafter is not None
    assert model.drafter.draft_vocab_ids is not None
    ids = set(np.array(model.drafter.draft_vocab_ids).tolist())
    assert len(ids) == 30
    assert ids >= set(model.tokenizer.encode("ba be on", add_special_tokens=False))
    plain = model.generate(PROMPT, max_tokens=30, num_draft_tokens=0)
    assert model.generate(PROMPT, max_tokens=30).tokens == plain.tokens


@pytest.mark.parametrize("options", [("--draft-vocab", "100"), ("--drafter-q-bits", "4")])
def test_options_of_a_drafter_that_is_not_found(
    tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    """These options need a drafter. They are an error, and are never ignored silently."""
    shutil.copytree(tiny_pair("31b") / "target", tmp_path / "alone")
    args = ["--hf-path", str(tmp_path / "alone"), "--mlx-path", str(tmp_path / "out"), *options]
    assert main(args) == 1
    message = f"error: {options[0]}: expected a drafter with it, but none was found; name one with --drafter\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()
    # An invalid value is reported first.
    assert main([*args[:-1], "-5"]) == 1
    assert ", found -5\n" in capsys.readouterr().err


def test_what_cannot_be_cut(tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, centroids = tiny_pair("31b"), tiny_pair("e2b")
    for source, args, message in (
        (centroids, ["--draft-vocab", "40"], "--draft-vocab needs a dense head, found one with centroids"),
        (dense, ["--draft-vocab", "512"], "--draft-vocab must be from 1 to 511, found 512"),
        (dense, ["--draft-vocab", "0"], "--draft-vocab: expected at least 1, found 0"),
        (dense, ["--draft-vocab", "9", "--drafter", "none"], "--draft-vocab: expected a drafter with it, found none"),
        (dense, ["--draft-vocab-text", tmp_path], "--draft-vocab-text: expected --draft-vocab with it"),
        (dense, ["--draft-vocab", "9", "--draft-vocab-text", tmp_path], "cannot be opened: Is a directory"),
    ):
        convert(source, tmp_path / "out", *args, code=1)
        stderr = capsys.readouterr().err
        assert message in stderr
        assert len(stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
