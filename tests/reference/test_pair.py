"""The demo pair in its published form: converted by a user's commands, and exact with a useful drafter."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.commands import run

import mlx_mtp

Convert = Callable[..., Path]

# These standard library modules are not in the pair's training data.
HELD_OUT = ("curses/has_key.py", "asyncio/streams.py", "wsgiref/simple_server.py", "posixpath.py", "queue.py")


@pytest.fixture(scope="module")
def converted(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Return a function that converts the pair with the given options, once for each set of options."""
    root = tmp_path_factory.mktemp("converted")

    def folder(*options: str) -> Path:
        output = root / "_".join(options)
        if not output.is_dir():
            source = ("--hf-path", pair / "target", "--drafter", pair / "assistant")
            run("convert.cli", *source, "--mlx-path", output, *options)
        return output

    return folder


def held_out(model: mlx_mtp.Model, length: int) -> list[list[int]]:
    """Return the first tokens of each held-out module."""
    root = Path(sysconfig.get_path("stdlib"))
    return [model.tokenizer.encode((root / name).read_text())[:length] for name in HELD_OUT]


def test_the_commands_a_user_types(converted: Convert) -> None:
    folder = converted("-q")
    prompt = "def read_config(path):"
    args = (
        "--model",
        folder,
        "--prompt",
        prompt,
        "--max-tokens",
        "60",
        "--ignore-chat-template",
        "--ignore-eos",
        "--num-draft-tokens",
        "3",
    )
    sampled = run("generate", *args, "--seed", "1")
    assert len(sampled.stdout) > 10
    assert "Acceptance length: " in sampled.stderr
    result = run("generate", *args, "--json", "--temp", "0")
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert result.stdout.startswith(report["text"])
    assert report["generation_tokens"] == 60
    assert report["drafter"] == str(folder / "drafter")
    assert report["accepted"] > report["rounds"] / 2
    plain = run("generate", *args, "--json", "--temp", "0", "--num-draft-tokens", "0")
    assert json.loads(plain.stdout.splitlines()[-1])["text"] == report["text"]


def test_a_drafter_of_no_help_shows(converted: Convert) -> None:
    """A useless drafter has clearly lower figures, so the figures of `test_demo.py` are meaningful."""
    model = mlx_mtp.load(converted("--dtype", "bfloat16"))
    assert model.target.dtype == mx.bfloat16
    assert model.drafter is not None
    options = mlx_mtp.GenerationOptions(max_tokens=60, num_draft_tokens=3, ignore_eos=True)
    (prompt,) = held_out(model, 250)[:1]
    useful = model.generate(prompt, options).last.stats.acceptance_length
    model.drafter.model.norm.weight = -model.drafter.model.norm.weight
    model = mlx_mtp.Model(model.target, model.drafter, model.tokenizer, model.config, model.drafter_config)
    useless = model.generate(prompt, options).last.stats.acceptance_length
    assert useful is not None
    assert useless is not None
    assert useless < 1.5 < 2.0 < useful


@pytest.mark.parametrize("k", [1, 4, 8])
def test_speculative_greedy_is_plain_greedy_in_float32(converted: Convert, k: int) -> None:
    model = mlx_mtp.load(converted("--dtype", "float32"))
    window = model.config.text.sliding_window
    # The text grows over the window, or the buffers of 256 rows grow.
    for length in (window - 20, 4 * window - 20):
        prompt = held_out(model, length)[k % 5]
        plain = model.generate(prompt, max_tokens=60, num_draft_tokens=0, ignore_eos=True)
        drafted = model.generate(prompt, max_tokens=60, num_draft_tokens=k, ignore_eos=True)
        assert drafted.tokens == plain.tokens
        assert drafted.last.stats.accepted > 0


def test_four_bit_with_float32_activations(converted: Convert) -> None:
    model = mlx_mtp.load(converted("-q", "--dtype", "float32", "--drafter-q-bits", "4"))
    assert model.target.embed_tokens.bits == 4
    for prompt in held_out(model, 60)[:2]:
        plain = model.generate(prompt, max_tokens=60, num_draft_tokens=0, ignore_eos=True)
        drafted = model.generate(prompt, max_tokens=60, num_draft_tokens=3, ignore_eos=True)
        assert drafted.tokens == plain.tokens
        length = drafted.last.stats.acceptance_length
        assert length is not None
        assert length > 1.5


def test_greedy_tokens_are_those_of_transformers(pair: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32)
    model = mlx_mtp.load(pair / "target", pair / "assistant")
    for prompt in held_out(model, 100)[:2]:
        tokens = torch.tensor([prompt])
        theirs = reference.generate(tokens, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert model.generate(prompt, max_tokens=60, ignore_eos=True).tokens == theirs[0, len(prompt) :].tolist()
