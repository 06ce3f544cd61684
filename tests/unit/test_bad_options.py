"""Every bad option of every command: one line names it, the exit status is 1 or 2, and nothing is loaded."""

import gc
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp import DEMO_PAIR, cache_prompt, chat, generate, probe, train
from mlx_mtp import command_line as cli
from mlx_mtp.bench import cli as bench
from mlx_mtp.checkpoints.config import read_json
from mlx_mtp.convert import cli as convert
from mlx_mtp.convert import converter
from mlx_mtp.decoding.sampling import Penalties, Sampling
from mlx_mtp.errors import ConfigError, OptionError
from mlx_mtp.server import cli as server
from mlx_mtp.shell import Parser

DEMO = ("--model", str(DEMO_PAIR))
# This is deeper than Python's JSON parser can follow.
DEEP = "[" * 100_000
MODEL: list[tuple[list[str], str]] = [
    (["--drafter", "no/such/folder"], "no/such/folder: no such folder"),
    (["--max-context", "0"], "argument --max-context: expected a number of tokens, at least 2, found '0'"),
    (["--memory-limit", "many"], "argument --memory-limit: expected a number of GB"),
    (["--memory-limit", "99999999999GB"], "argument --memory-limit: expected less than 9.22e+09 GB"),
    (["--memory-limit", "9" * 400], "argument --memory-limit: expected less than 9.22e+09 GB"),
    (["--memory-limit", "1MB"], "more than the limit of 1.0 MB"),
    (["--per-layer-embeddings", "disk"], "argument --per-layer-embeddings: invalid choice: 'disk'"),
]
LENGTHS: list[tuple[list[str], str]] = [
    (["--num-draft-tokens", "9" * 23], "num_draft_tokens must be at most 1024, found 9999"),
    (["--num-draft-tokens", "-1"], "num_draft_tokens must be an integer of at least 0, found -1"),
    (["--num-draft-tokens", "x"], "argument --num-draft-tokens: expected a number of draft tokens or auto, found 'x'"),
    (["--num-draft-tokens", "2", "--drafter", "none"], "num_draft_tokens is 2, but no drafter is loaded"),
    (["--num-draft-tokens", "99", "--exact"], "num_draft_tokens is 99: exact passes verify at most 8"),
]
KV: list[tuple[list[str], str]] = [
    (["--kv-bits", "3"], "kv_bits must be 4 or 8, found 3"),
    (["--kv-group-size", "7"], "kv_group_size must be 32, 64 or 128, found 7"),
    (["--kv-bits", "8", "--kv-group-size", "128"], "kv_group_size is 128, which does not divide the 64 values"),
    (["--quantized-kv-start", "-1"], "quantized_kv_start must be an integer of at least 0, found -1"),
]
SAMPLING: list[tuple[list[str], str]] = [
    (["--temp", "-1"], "temperature must be at least 0, found -1"),
    (["--temp", "nan"], "temperature must be at least 0, found nan"),
    (["--top-p", "2"], "top_p must be between 0 and 1, found 2"),
    (["--top-k", "-5"], "top_k must be at least 0, found -5"),
    (["--min-p", "1.5"], "min_p must be between 0 and 1, found 1.5"),
    (["--xtc-probability", "2"], "xtc_probability must be between 0 and 1, found 2"),
    (["--xtc-threshold", "0.7"], "xtc_threshold must be between 0 and 0.5, found 0.7"),
    (["--seed", "-1"], "seed must be between 0 and"),
    (["--repetition-penalty", "0"], "repetition_penalty must be above 0, found 0"),
    (["--presence-context-size", "0"], "presence_context_size must be at least 1, found 0"),
    (["--acceptance", "all"], "argument --acceptance: invalid choice: 'all'"),
    (["--temp", "1e39"], "temperature must be finite in float32, found 1e+39"),
    (["--repetition-penalty", "1e39"], "repetition_penalty must be finite in float32, found 1e+39"),
    (["--repetition-penalty", "1e-50"], "repetition_penalty must be above 0, found 1e-50"),
    (["--presence-penalty", "-1e39"], "presence_penalty must be finite in float32, found -1e+39"),
    (["--frequency-penalty", "1e39"], "frequency_penalty must be finite in float32, found 1e+39"),
    (["--logit-bias", f'{{"1": 1{"0" * 400}}}'], "argument --logit-bias: expected a JSON object"),
    (["--logit-bias", DEEP], "argument --logit-bias: expected a JSON object"),
    (["--logit-bias", "[1]"], "argument --logit-bias: expected a JSON object"),
    (["--logit-bias", '{"99999": 1}'], "logit_bias names token 99999, the vocabulary has"),
]
ANSWERS: list[tuple[list[str], str]] = [
    (["--max-tokens", "0"], "max_tokens must be an integer of at least 1, found 0"),
    (["--thinking-budget", "5"], "thinking_budget is given, but enable_thinking is not"),
]
GENERATE: list[tuple[list[str], str]] = [
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "-"], "stdin: not UTF-8: byte 0xff at position 1"),
    (["--prefill-step-size", "0"], "prefill_step_size must be an integer of at least 1, found 0"),
    (["--stop", ""], "stop holds an empty string"),
    (["--min-tokens", "999"], "min_tokens is 999, more than the max_tokens of 256"),
    (["--logprobs", "99999"], "logprobs is 99999, more than the vocabulary of"),
    (["--json-schema", "absent.json"], "absent.json: cannot be read"),
    (["--json-schema", "text"], "text: not JSON"),
    (["--json-schema", "deep"], "deep: not JSON"),
    (["--prompt-cache=--"], "argument --prompt-cache: expected a value, found --"),
    (["-p--"], "argument -p: expected a value, found --"),
    (["--grammar-file", "absent"], "absent: cannot be read"),
    (["--regex", "("], "regex cannot be followed"),
    (["--ignore-chat-template", "--system-prompt", "x"], "a system prompt needs a chat template"),
    (["--prompt-cache", "absent"], "absent: no prompt cache"),
    (["--prompt-cache", "text"], "text: truncated or not a safetensors file"),
    (["--compare", "--drafter", "none"], "--compare needs a drafter"),
]
CACHE_PROMPT: list[tuple[list[str], str]] = [
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt-cache", "."], "cannot be written"),
    (["--prompt-cache", "b\udce9"], "'b\\udce9': cannot be written: the name is not UTF-8"),
    (["--prompt-cache=--"], "argument --prompt-cache: expected a value, found --"),
    (["--prompt-cache", "absent/x"], "cannot be written"),
    (["--prompt-cache", "x" * 250], "cannot be written: File name too long"),
    (["--ignore-chat-template", "--enable-thinking"], "thinking needs a chat template"),
]
SERVER: list[tuple[list[str], str]] = [
    (["--port", "99999"], "--port must be between 0 and 65535, found 99999"),
    (["--port", "http"], "argument --port: invalid int value: 'http'"),
    (["--host", "0.0.0.0"], "give an --api-key"),
    (["--host", "no host"], "no host"),
    (["--max-queue", "-1"], "--max-queue must be at least 0, found -1"),
    (["--max-prompt-tokens", "0"], "--max-prompt-tokens must be at least 1, found 0"),
    (["--max-body-size", "0"], "--max-body-size must be at least 1, found 0"),
    (["--prompt-cache-bytes", "x"], "argument --prompt-cache-bytes: expected a number of GB"),
    (["--shutdown-timeout", "nan"], "--shutdown-timeout must be at least 0, found nan"),
    (["--log-level", "all"], "argument --log-level: invalid choice: 'all'"),
]
BENCH: list[tuple[list[str], str]] = [
    (["--kinds", "poems"], "argument --kinds: expected some of"),
    (["--contexts", "0"], "argument --contexts: expected numbers of at least 1, found '0'"),
    (["--temps", "-1"], "temperature must be at least 0, found -1"),
    (["--temps", ","], "argument --temps: expected temperatures, found ','"),
    (["--seed", "-1"], "seed must be between 0 and"),
    (["--num-draft-tokens", "-1"], "num_draft_tokens must be an integer of at least 0, found -1"),
    (["--max-tokens", "1"], "max_tokens must be at least 2, found 1"),
    (["--repeats", "0"], "repeats must be at least 1, found 0"),
    (["--cool-down", "nan"], "cool_down must be at least 0, found nan"),
    (["--peers", "none"], "argument --peers: expected some of"),
    (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
    (["--plot", "text"], "text: exists already"),
]
PROBE: list[tuple[list[str], str]] = [
    (["--kinds", "poems"], "argument --kinds: expected some of"),
    (["--max-tokens", "3"], "max_tokens must be at least"),
]
TRAIN: list[tuple[list[str], str]] = [
    (["--data", "absent.jsonl"], "absent.jsonl: cannot be read"),
    (["--data", "empty"], "empty: expected a text a line, found none"),
    (["--data", "deep"], "deep, line 1: not JSON"),
    (["--data", "text"], "text, line 1: not JSON"),
    (["--data", "."], "train.jsonl: cannot be read"),
    (["--output", "text"], "text: exists already"),
    (["--resume"], "no training to resume"),
    (["--drafter-config", "absent"], "absent: no such folder"),
    (["--lora-rank", "0"], "lora_rank must be at least 1, found 0"),
    (["--learning-rate", "nan"], "learning_rate must be between 0 and 1, found nan"),
    (["--seed", "-1"], "seed must be at least 0, found -1"),
    (["--num-draft-tokens", "9"], "num_draft_tokens must be at most 8 to train, found 9"),
    (["--max-seq-length", "1"], "max_seq_length must be at least 32, found 1"),
    (["--draft-vocab", "0"], "--draft-vocab"),
    (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
]
COMMANDS: dict[str, tuple[Callable[[list[str]], int], tuple[str, ...], list[tuple[list[str], str]]]] = {
    "generate": (generate.main, (*DEMO, "--prompt", "x"), [*MODEL, *LENGTHS, *KV, *SAMPLING, *ANSWERS, *GENERATE]),
    "chat": (chat.main, DEMO, [*MODEL, *LENGTHS, *KV, *SAMPLING, *ANSWERS]),
    "server": (server.main, (*DEMO, "--port", "0"), [*MODEL, *LENGTHS, *KV, *SAMPLING, *ANSWERS, *SERVER]),
    "cache_prompt": (
        cache_prompt.main,
        (*DEMO, "--prompt", "x", "--prompt-cache", "kept"),
        [*MODEL, *KV, *CACHE_PROMPT],
    ),
    "bench": (bench.main, DEMO, [*MODEL, *KV, *BENCH]),
    "probe": (probe.main, DEMO, [*MODEL, *PROBE]),
    "train": (train.main, (*DEMO, "--data", "data.jsonl", "--output", "out"), TRAIN),
}


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "load", loaded)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no JSON, no folder")
    (tmp_path / "deep").write_text(DEEP)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "data.jsonl").write_text('{"text": "def f(x):"}\n')


def refused(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    # Some arguments are nested as deep as Python allows. A collection there would end objects of earlier tests, which
    # needs more depth, and would print its error.
    gc.disable()
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        gc.enable()
    found = capsys.readouterr()
    assert status in (1, 2), found.err
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    return found.err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [(command, arguments, message) for command, (_, _, cases) in COMMANDS.items() for arguments, message in cases],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else value if value in COMMANDS else "",
)
def test_a_bad_option_is_one_line_and_nothing_is_loaded(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main, always, _ = COMMANDS[command]
    before = sorted(tmp_path.iterdir())
    assert message in refused(main, [*always, *arguments], capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_good_options_are_loaded_with(command: str) -> None:
    """Without a bad option the commands start to load. This proves that the test above can detect it."""
    main, always, _ = COMMANDS[command]
    with pytest.raises(AssertionError, match="loaded"):
        main([*always])


def test_a_dry_run_checks_the_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    dry = [*DEMO, "--dry-run"]
    assert "temperature must be at least 0" in refused(generate.main, [*dry, "--temp", "-1"], capsys)
    assert "absent: no prompt cache" in refused(generate.main, [*dry, "--prompt-cache", "absent"], capsys)
    assert generate.main(dry) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "no/such/folder"], "no/such/folder: no such folder"),
        (["--mlx-path", "text"], "text: exists already"),
        (["--mlx-path", "o\udce9"], "cannot be written: the name is not UTF-8"),
        (["-q", "--q-bits", "7"], "--q-bits: expected one of"),
        (["--draft-vocab", "-5"], "--draft-vocab: expected at least 1, found -5"),
        (["--drafter", "none", "--draft-vocab", "9"], "--draft-vocab: expected a drafter with it, found none"),
        (["--draft-vocab-text", "data.jsonl"], "--draft-vocab-text: expected --draft-vocab with it"),
        (["--draft-vocab", "9", "--draft-vocab-text", "absent"], "--draft-vocab-text: absent: no such file"),
        (["--upload-repo", "a/b/c"], "--upload-repo: expected a hub repository's id"),
    ],
)
def test_the_converter_reads_no_weights(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: Path) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(converter, "read_checkpoint", read)
    assert message in refused(convert.main, ["--hf-path", str(DEMO_PAIR), *arguments], capsys)


def test_negative_numbers_are_values() -> None:
    parser = Parser()
    parser.add_argument("--penalty", "-p", type=float)
    parser.add_argument("--text")
    parser.add_argument("--flag", action="store_true")
    for number in ("-1", "-1e5", "-2.5E-3", "-.5e+1"):
        for arguments in (["--penalty", number], ["-p", number], [f"--penalty={number}"]):
            assert parser.parse_args([*arguments, "--flag"]) == Namespace(penalty=float(number), text=None, flag=True)
    assert parser.parse_args(["--text", "a b=--"]).text == "a b=--"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 10**400}, "temperature must be finite in float32, found an integer of 1329 bits"),
        ({"presence_penalty": -(10**400)}, "presence_penalty must be finite in float32, found an integer of"),
        ({"seed": 10**5000}, "seed must be between 0 and .*, found an integer of"),
        ({"logit_bias": {1: 10**400}}, "logit_bias of token 1 must be finite in float32, found an integer of"),
    ],
)
def test_numbers_beyond_every_float(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sampling(**options)
    with pytest.raises(OptionError, match="the vocabulary has 9"):
        Penalties(Sampling(logit_bias={10**5000: 1}), 9)


def test_json_that_python_cannot_read(tmp_path: Path) -> None:
    for content in (DEEP, '{"a": ' + "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config.json: cannot be read as JSON: "):
            read_json(tmp_path / "config.json")


def test_a_drafter_with_a_dense_head_has_no_centroids(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fields = read_json(DEMO_PAIR / "drafter" / "config.json")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(fields | {"use_ordered_embeddings": False}))
    arguments = [*DEMO, "--data", "data.jsonl", "--output", "out", "--drafter-config", "dense", "--rebuild-centroids"]
    assert "--rebuild-centroids needs a centroid head" in refused(train.main, arguments, capsys)
