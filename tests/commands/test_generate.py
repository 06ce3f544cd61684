"""`python -m mlx_mtp.generate`, run as a user runs it: as a process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import Finished, run

from mlx_mtp.generate import main
from mlx_mtp.model import Model

TinyPair = Callable[[str], Path]
# A fixed number of draft tokens avoids the measurement of costs, except in tests of it.
COMMAND = [sys.executable, "-m", "mlx_mtp.generate", "--temp", "0", "--num-draft-tokens", "3"]
AUTO = ("--num-draft-tokens", "auto")
PROMPT = "the quick brown fox"


def generate(*args: object, stdin: str = "", code: int = 0) -> Finished:
    return run("generate", *COMMAND[3:], *args, stdin=stdin, code=code)


def last_json(stdout: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return report


def test_text_on_stdout_and_a_summary_on_stderr(tiny_pair: TinyPair) -> None:
    result = generate("--model", tiny_pair("e2b") / "target", "--prompt", PROMPT, "-m", "30", "--ignore-eos")
    assert len(result.stdout) > 10
    lines = dict(line.split(": ", 1) for line in result.stderr.splitlines() if ": " in line)
    assert lines["Generation"].startswith("30 tokens, ")
    assert set(lines) >= {"Prompt", "Rounds", "Acceptance length", "Acceptance by position", "Peak memory"}


@pytest.mark.parametrize("drafter", [(), ("--drafter", "none")])
def test_copies_are_measured_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: tuple[str]) -> None:
    """The first text measures the rounds, and the second one uses their costs. Both are the plain text."""
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    code = "def first(value):\n    return value + 1\n\n\n" * 3
    options = ("--prompt", code, "-m", "140", "--ignore-eos", "--json")
    plain = last_json(generate(*options, "--num-draft-tokens", "0").stdout)
    assert plain["copied"] == {"rounds": 0, "drafted": 0, "accepted": 0}
    for _ in range(2):
        result = generate(*options, *AUTO, *drafter)
        found = last_json(result.stdout)
        assert found["tokens"] == plain["tokens"]
        assert found["rounds"] < plain["rounds"]
    copied = found["copied"]
    assert f"Copied: {copied['drafted']} in {copied['rounds']} rounds, accepted: {copied['accepted']}" in result.stderr
    assert found["accepted"] >= copied["accepted"] > 20
    (kept,) = tmp_path.glob("rounds-*.json")
    assert len(json.loads(kept.read_text())["seconds"]["copied"]) == 32


def test_copies_come_from_a_prompt_cache_as_well(tmp_path: Path) -> None:
    code, file = "def first(value):\n    return value + 1\n\n\n" * 3, tmp_path / "prompt.safetensors"
    run("cache_prompt", "--prompt", code, "--ignore-chat-template", "--prompt-cache", file)
    options = (
        "--prompt",
        "def",
        "--ignore-chat-template",
        "--prompt-cache",
        file,
        "-m",
        "80",
        "--ignore-eos",
        "--json",
    )
    plain = last_json(generate(*options, "--num-draft-tokens", "0").stdout)
    found = last_json(generate(*options, *AUTO).stdout)
    assert found["tokens"] == plain["tokens"]
    assert found["copied"]["accepted"] > 20
    off = last_json(generate(*options, *AUTO, "--copy-drafts", "off").stdout)
    assert off["tokens"] == plain["tokens"]
    assert off["copied"]["rounds"] == 0


def test_json_holds_every_field_and_the_text_does_not_depend_on_drafting(tiny_pair: TinyPair) -> None:
    target = tiny_pair("e2b") / "target"
    reports = {}
    for k in ("0", "4"):
        result = generate(
            "--model", target, "-p", PROMPT, "-m", "40", "--num-draft-tokens", k, "--json", "--ignore-eos"
        )
        reports[k] = last_json(result.stdout)
        assert result.stdout.startswith(reports[k]["text"] + "\n")
    plain, drafted = reports["0"], reports["4"]
    assert set(drafted) >= {
        "text", "tokens", "prompt_tokens", "generation_tokens", "finish_reason", "drafter", "rounds", "drafted",
        "accepted", "acceptance_by_position", "prompt_tps", "generation_tps", "peak_memory_gb",
    }  # fmt: skip
    for name in ("text", "tokens", "prompt_tokens", "generation_tokens", "finish_reason"):
        assert plain[name] == drafted[name]
    assert drafted["generation_tokens"] == len(drafted["tokens"]) == 40
    assert drafted["finish_reason"] == "length"
    assert drafted["drafter"] == str(tiny_pair("e2b") / "target-assistant")
    assert drafted["drafted"] > 0
    assert drafted["accepted"] <= drafted["drafted"]
    assert drafted["rounds"] + drafted["accepted"] + 1 == 40
    assert len(drafted["acceptance_by_position"]) == 4
    assert plain["drafted"] == 0
    assert plain["rounds"] == 39
    assert drafted["prompt_tps"] > 0
    assert drafted["generation_tps"] > 0
    assert 0 < drafted["peak_memory_gb"] < 1


def test_chat_template_system_prompt_and_stdin(tiny_pair: TinyPair) -> None:
    target = tiny_pair("31b") / "target"

    def prompt_tokens(*args: str, stdin: str = "") -> int:
        result = generate("--model", target, "-m", "1", "--json", *args, stdin=stdin)
        count: int = last_json(result.stdout)["prompt_tokens"]
        return count

    bare = prompt_tokens("-p", PROMPT, "--ignore-chat-template")
    chat = prompt_tokens("-p", PROMPT)
    assert bare < chat < prompt_tokens("-p", PROMPT, "--system-prompt", "be brief")
    assert prompt_tokens("-p", "-", stdin=PROMPT) == chat


def test_no_drafter_is_said_in_one_line(tiny_pair: TinyPair, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair("12b") / "target", tmp_path / "alone")
    result = generate("--model", tmp_path / "alone", "-p", PROMPT, "-m", "5", *AUTO)
    assert f"no drafter found for {tmp_path / 'alone'}: decoding plainly" in result.stderr.splitlines()[0]
    assert "nothing drafted (no drafter)" in result.stderr
    result = generate("--model", tmp_path / "alone", "--drafter", "none", "-p", PROMPT, "-m", "5", "--json", *AUTO)
    assert "no drafter found" not in result.stderr
    assert last_json(result.stdout)["drafter"] is None
    result = generate("--model", tmp_path / "alone", "-p", PROMPT, code=1)
    assert result.stderr.splitlines()[-1] == "error: num_draft_tokens is 3, but no drafter is loaded"


def test_verbose_says_what_was_loaded(tiny_pair: TinyPair) -> None:
    result = generate("--model", tiny_pair("e2b") / "target", "-p", PROMPT, "-m", "2", "--verbose")
    assert f"target: {tiny_pair('e2b') / 'target'}, gemma4, not quantized" in result.stderr
    assert f"drafter: {tiny_pair('e2b') / 'target-assistant'}, gemma4_assistant, not quantized" in result.stderr


def test_compare_times_the_drafter_against_plain_decoding(tiny_pair: TinyPair) -> None:
    target = tiny_pair("e2b") / "target"
    result = generate("--model", target, "-p", PROMPT, "-m", "12", "--compare", "--json")
    ratio = last_json(result.stdout)["speedup"]
    assert ratio > 0
    line = next(line for line in result.stderr.splitlines() if line.startswith("Speed: "))
    assert line.startswith(f"Speed: {ratio:.2f} times plain decoding (")
    refused = generate("--model", target, "-p", PROMPT, "-m", "12", "--compare", "--num-draft-tokens", "0", code=1)
    assert refused.stderr.splitlines()[-1].startswith("error: --compare needs a drafter")


def test_help_names_every_option() -> None:
    result = generate("--help")
    for option in ("--model", "--drafter", "--prompt", "--system-prompt", "--max-tokens", "--temp", "--json"):
        assert option in result.stdout
    assert "--num-draft-tokens" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", ""], "error: the prompt is empty: expected some text"),
        (["-p", "x", "--temp", "-0.7"], "error: temperature must be at least 0, found -0.7"),
        (["-p", "x", "--temp", "1", "--top-p", "0"], "error: top_p must be at least 1e-06, found 0"),
        (["-p", "x", "--min-p", "1.5"], "error: min_p must be between 0 and 1, found 1.5"),
        (["-p", "x", "-m", "0"], "error: max_tokens must be an integer of at least 1, found 0"),
        (["-p", "x", "--num-draft-tokens", "-1"], "error: num_draft_tokens must be an integer of at least 0, found -1"),
        (["-p", "x", "--prefill-step-size", "0"], "error: prefill_step_size must be an integer of at least 1, found 0"),
        (["-p", "x", "--ignore-chat-template", "--system-prompt", "y"], "error: a system prompt needs a chat template"),
        (["-p", "x" * 5000, "--ignore-chat-template"], "but the context holds 4096 with the answer"),
        (["-p", "x", "--drafter", "absent"], "error: absent: no such folder"),
    ],
)
def test_bad_options_give_one_line(tiny_pair: TinyPair, args: list[str], message: str) -> None:
    result = generate("--model", tiny_pair("e2b") / "target", *args, code=1)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_a_missing_model_gives_one_line(tmp_path: Path) -> None:
    result = generate("--model", tmp_path / "absent", "-p", "x", code=1)
    assert result.stderr == f"error: {tmp_path / 'absent'}: no such folder\n"


def test_ctrl_c_ends_cleanly_with_what_was_generated(tiny_pair: TinyPair) -> None:
    command = [*COMMAND, "--model", str(tiny_pair("e2b") / "target"), "-p", PROMPT, "-m", "3500", "--json"]
    command.append("--ignore-eos")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None
    process.stdout.read(20)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert b"Generation: " in stderr
    report = last_json(stdout.decode())
    assert report["finish_reason"] == "interrupted"
    assert 0 < report["generation_tokens"] == len(report["tokens"]) < 3500


def test_text_streams_as_it_is_generated(tiny_pair: TinyPair) -> None:
    """Text arrives during decoding: the first bytes come long before the process ends."""
    command = [*COMMAND, "--model", str(tiny_pair("e2b") / "target"), "-p", PROMPT, "-m", "200", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.read(5)
    assert process.poll() is None
    process.communicate(timeout=60)


def test_a_prompt_compiles_no_kernel_on_the_cpu(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """The C++ compiler takes a second for a kernel. The first token does not wait for it."""
    env = os.environ | {"TMPDIR": str(tmp_path), "MLX_MTP_CACHE": str(tmp_path / "costs")}
    command = [*COMMAND[:3], "--model", str(tiny_pair("e2b") / "target"), "--temp", "0", "-p", PROMPT]
    kernels = []
    for tokens in ("1", "4"):
        subprocess.run([*command, "-m", tokens, "--ignore-eos"], env=env, check=True, capture_output=True)
        kernels.append(len(list(tmp_path.rglob("*.so"))))
    first, later = kernels
    assert first == 0
    if sys.platform == "linux":
        assert later > 0, "MLX keeps its kernels elsewhere"


def test_compare_leaves_out_the_first_pair(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first pair of runs compiles rounds."""
    speeds = iter([900.0, 1.0, 20.0, 10.0, 20.0, 10.0, 20.0, 10.0])

    def timed(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(last=SimpleNamespace(generation_tps=next(speeds)))

    monkeypatch.setattr(Model, "generate", timed)
    assert main(["--model", str(tiny_pair("e2b") / "target"), "--prompt", PROMPT, "-m", "4", "--compare"]) == 0
    assert "Speed: 2.00 times plain decoding (2.00 to 2.00, 3 runs of each in turn)" in capsys.readouterr().err
