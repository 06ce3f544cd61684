"""The memory plan against real memory use, and limits: an error before loading says what fits."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.commands import run
from support.tiny import make_drafter, make_target, random_tokens
from support.tiny_media import make_media_target

import mlx_mtp
from mlx_mtp import command_line as cli
from mlx_mtp import generate
from mlx_mtp.convert.cli import main as convert
from mlx_mtp.decoding import prefill
from mlx_mtp.decoding.draft_length import Choice
from mlx_mtp.decoding.packed import packed_round
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.kv_cache import rows_in_buffers
from mlx_mtp.memory_plan import TextMemory, memory_size, parse_bytes

TinyPair = Callable[[str], Path]
VARIANTS = ("e2b", "12b", "26b", "31b")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", ["16", "4"])
def test_the_plan_counts_what_is_loaded(tiny_pair: TinyPair, tmp_path: Path, variant: str, bits: str) -> None:
    folder = tiny_pair(variant) / "target"
    if bits == "4":
        assert not convert(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "pair"), "-q"])
        folder = tmp_path / "pair"
    plan = mlx_mtp.plan_memory(folder, max_context=1000)
    model = mlx_mtp.load(folder)
    loaded = sum(array.nbytes for _, array in _flat(model.target))
    # Fusion adds a scale per head of the queries and keys.
    planned = plan.weights + plan.token_embeddings + plan.per_layer_embeddings
    assert planned <= loaded <= 1.02 * planned
    assert model.drafter is not None
    assert sum(array.nbytes for _, array in _flat(model.drafter)) == pytest.approx(plan.drafter, rel=0.02)
    stream = Stream(model.target, model.drafter, max_draft_tokens=31)
    stream.cache.reserve(1000)
    full, rings = (stream.cache.buffers(kind) for kind in ("full_attention", "sliding_attention"))
    assert _bytes(full) == plan.kv == rows_in_buffers(1000) * plan.kv_per_token
    assert _bytes(rings) == plan.rings


def _flat(module: Any) -> Any:
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())


def _bytes(buffers: Any) -> int:
    return sum(array.nbytes for pair in buffers.values() for array in pair)


@pytest.mark.parametrize(("variant", "length"), [("e2b", 2500), ("31b", 1500), ("31b", 300)])
def test_the_peak_is_the_planned_one(tmp_path: Path, variant: str, length: int) -> None:
    """The layers are large, so that unplanned parts such as masks and norms matter little."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    make_target(tmp_path / "target", variant, **sizes)
    make_drafter(tmp_path / "target-assistant", variant, backbone_hidden_size=256)
    code = (
        "import sys, mlx.core as mx, mlx_mtp\n"
        "folder, length = sys.argv[1], int(sys.argv[2])\n"
        "model = mlx_mtp.load(folder)\n"
        "mx.reset_peak_memory()\n"
        "prompt = [2] + [16 + i % 480 for i in range(length - 1)]\n"
        "model.generate(prompt, max_tokens=20, num_draft_tokens=3, ignore_eos=True, reuse_prompt=False)\n"
        "print(mx.get_peak_memory())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "target"), str(length)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    planned = mlx_mtp.plan_memory(tmp_path / "target", max_context=length + 20).peak
    assert peak == pytest.approx(planned, rel=0.1)


def media_peak(folder: Path, budget: int) -> int:
    """Return the peak of a process that reads a picture of `budget` tokens, or else a sound of 30 seconds, in bytes."""
    code = (
        "import sys, numpy as np, mlx.core as mx\n"
        "from pathlib import Path\n"
        "from mlx_mtp.checkpoints.config import read_target_config\n"
        "from mlx_mtp.gemma4.media_towers import load_media\n"
        "from mlx_mtp.media.audio import read_audio\n"
        "from mlx_mtp.media.images import read_image\n"
        "towers = load_media(read_target_config(Path(sys.argv[1])))\n"
        "model = towers.vision or towers.audio\n"
        "if towers.vision:\n"
        "    values = read_image(np.zeros((700, 1000, 3), np.uint8), budget=int(sys.argv[2])).values\n"
        "else:\n"
        "    values = read_audio((np.zeros(480_000, np.float32), 16_000)).log_mel()\n"
        "mx.eval(model.parameters(), model(mx.array(values)))\n"
        "print(mx.get_peak_memory())\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(budget)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("intermediate_size", [96, 2000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_picture_takes_the_planned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, intermediate_size: int
) -> None:
    # A picture of 1120 tokens would take half a minute.
    monkeypatch.setattr("mlx_mtp.memory_plan.BUDGETS", (280,))
    vision = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": intermediate_size}
    source = make_media_target(tmp_path / "source", "e2b", vision=vision)
    options = ["--drafter", "none", "--modalities", "text,image", "--dtype", dtype]
    assert convert(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), *options]) == 0
    assert media_peak(tmp_path / "out", 280) == pytest.approx(
        mlx_mtp.plan_memory(tmp_path / "out", drafter="none").media, rel=0.1
    )


def test_other_media_take_the_planned_memory(tmp_path: Path) -> None:
    """12B has no tower. A checkpoint that only hears plans the longest sound."""
    unified = make_media_target(tmp_path / "12b", "12b")
    source = make_media_target(tmp_path / "e2b", "e2b")
    options = ["--drafter", "none", "--modalities", "text,audio"]
    assert convert(["--hf-path", str(source), "--mlx-path", str(tmp_path / "hears"), *options]) == 0
    for folder in (unified, tmp_path / "hears"):
        assert media_peak(folder, 1120) == pytest.approx(mlx_mtp.plan_memory(folder, drafter="none").media, rel=0.1)


def test_a_limit_is_checked_before_loading_and_says_what_would_fit(tiny_pair: TinyPair) -> None:
    folder = tiny_pair("e2b") / "target"
    plan = mlx_mtp.plan_memory(folder)
    assert plan.context == 4096
    assert mlx_mtp.load(folder, memory_limit=plan.peak).max_context == 4096
    limit = mlx_mtp.plan_memory(folder, max_context=1500).peak
    with pytest.raises(mlx_mtp.MemoryLimitError, match="what would fit: a context of ") as error:
        mlx_mtp.load(folder, memory_limit=limit)
    fitting = int(str(error.value).rsplit("--max-context ", 1)[1].split(")")[0])
    assert fitting >= 1500
    assert mlx_mtp.load(folder, memory_limit=limit, max_context=fitting).max_context == fitting
    with pytest.raises(mlx_mtp.MemoryLimitError):
        mlx_mtp.load(folder, memory_limit=limit, max_context=fitting + 1)
    with pytest.raises(mlx_mtp.MemoryLimitError, match="only fewer bits or a smaller model would fit"):
        mlx_mtp.load(folder, memory_limit=1000)


def test_a_prompt_over_the_context_is_refused_with_both_numbers(tiny_pair: TinyPair) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target", max_context=50)
    assert model.generate(random_tokens(40), max_tokens=100, ignore_eos=True).last.generation_tokens == 10
    with pytest.raises(mlx_mtp.PromptError, match="the prompt has 50 tokens, but the context holds 50 with the answer"):
        model.generate(random_tokens(50))
    for wrong in (0, 1, 4097):
        with pytest.raises(mlx_mtp.OptionError, match=rf"max_context is {wrong}: expected 2 to the model's 4096"):
            mlx_mtp.load(tiny_pair("e2b") / "target", max_context=wrong)


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("6", "6GB", "1.5 gb", "800MB", "1GiB", "2MiB", "12B")] == [
        6 * 10**9, 6 * 10**9, 1_500_000_000, 800 * 10**6, 2**30, 2**21, 12,
    ]  # fmt: skip
    for text in ("", "GB", "six", "6 GBs", "-1", "1e9"):
        with pytest.raises(mlx_mtp.OptionError, match="expected a number of GB"):
            parse_bytes(text)
    assert memory_size() > 10**9


def test_a_long_prompt_is_read_in_smaller_chunks_with_the_same_text(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    prompt = random_tokens(400, seed=3)
    options = mlx_mtp.GenerationOptions(max_tokens=20, num_draft_tokens=3, ignore_eos=True, reuse_prompt=False)

    def read(**changes: Any) -> tuple[list[int], list[int]]:
        ends = [0]
        stream = model.stream_generate(prompt, options, on_prefill=lambda done, _: ends.append(done), **changes)
        tokens = [response.token for response in stream]
        return tokens, [b - a for a, b in itertools.pairwise(ends)]

    whole, at_once = read()
    assert at_once == [400]
    for step in (1, 17, 399):
        tokens, chunks = read(prefill_step_size=step)
        assert tokens == whole
        assert max(chunks) == step
    monkeypatch.setattr(prefill, "SCORE_BYTES", 4 * 4 * 512 * 100)
    tokens, chunks = read()
    assert tokens == whole
    assert chunks[0] == 100
    monkeypatch.setattr(prefill, "SCORE_BYTES", 1)
    assert read()[1][0] == 32


def test_on_a_mac_memory_is_wired(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    info = mx.device_info() | {"max_recommended_working_set_size": 123}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: calls.append(("wired", size)))
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: calls.append(("limit", size)))
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_model_options(parser)
    args = parser.parse_args(["--model", str(tiny_pair("e2b") / "target"), "--memory-limit", "1GB"])
    assert cli.load_model(args.model, None, args).drafter is not None
    assert calls == [("wired", 123), ("limit", 10**9)]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_kv_and_mapped_embeddings_are_planned(tmp_path: Path, bits: int) -> None:
    folder = make_target(tmp_path / "target", "e2b")
    options = mlx_mtp.GenerationOptions(kv_bits=bits, kv_group_size=32, quantized_kv_start=0)
    plan, plain = mlx_mtp.plan_memory(folder, max_context=1000, options=options), mlx_mtp.plan_memory(folder)
    model = mlx_mtp.load(folder, "none")
    stream = Stream(model.target, None, max_draft_tokens=31, kv_quantization=options.kv_quantization)
    stream.cache.reserve(1000)
    assert sum(a.nbytes for a in stream.cache.arrays()) == pytest.approx(plan.kv + plan.rings, rel=0.01)
    assert plan.kv_per_token < plain.kv_per_token
    # The context is shorter than the start of quantization.
    later = mlx_mtp.plan_memory(
        folder, max_context=1000, options=mlx_mtp.GenerationOptions(kv_bits=8, kv_group_size=32)
    )
    assert later.kv_per_token == plain.kv_per_token
    with pytest.raises(mlx_mtp.OptionError, match="does not divide"):
        mlx_mtp.plan_memory(folder, options=mlx_mtp.GenerationOptions(kv_bits=8))
    mapped = mlx_mtp.plan_memory(folder, per_layer_embeddings="mapped")
    # The limit for rows in memory is above the size of this whole table.
    assert mapped.per_layer_embeddings == plain.per_layer_embeddings
    assert mlx_mtp.plan_memory(folder, per_layer_embeddings="resident") == plain


@pytest.mark.in_place
def test_each_more_text_in_a_round_takes_the_planned_memory(tmp_path: Path) -> None:
    """The logits of many rows take nearly all of it."""
    folder = make_target(tmp_path, "31b", vocab_size=65536)
    model = mlx_mtp.load(folder, "none")
    peaks = {}
    for count in (1, 8):
        sampling = mlx_mtp.Sampling(temperature=1.0, top_p=0.9)
        streams = [Stream(model.target, None, max_draft_tokens=15, sampling=sampling) for _ in range(count)]
        for index, stream in enumerate(streams):
            stream.prefill([7 + index, 5], 8)
        choices = [Choice(15, ahead=False, copied=list(range(11, 26)))] * count
        for _ in range(2):
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            packed_round(streams, choices, [frozenset()] * count)
        peaks[count] = mx.get_peak_memory() - before
    more = TextMemory(model.config.text, model.target.dtype.size, 64, 16).more_work
    assert 0.3 * 7 * more < peaks[8] - peaks[1] < 7 * more


# Command lines


def test_a_dry_run_prints_the_plan_and_loads_nothing(tiny_pair: TinyPair) -> None:
    folder = tiny_pair("e2b") / "target"
    result = run("generate", "--model", folder, "--dry-run", "--max-context", "2000", "--json")
    *table, last = result.stdout.splitlines()
    names = [line[:32].strip() for line in table]
    assert names == [
        "target's layers", "token embeddings (both models)", "per-layer embeddings", "drafter",
        "K/V of sliding layers", "K/V of 2000 tokens", "work of a pass", "peak", "each more text at the same time",
        "K/V per 1000 tokens",
    ]  # fmt: skip
    assert json.loads(last)["peak"] == mlx_mtp.plan_memory(folder, max_context=2000).peak
    plain = run("generate", "--model", folder, "--dry-run", "--drafter", "none")
    assert "drafter" not in plain.stdout
    refused = run("generate", "--model", folder, "--dry-run", "--memory-limit", "1MB", code=1)
    assert "peak" in refused.stdout
    assert refused.stderr.startswith(f"error: {folder}: needs ")


def test_limits_from_the_command_line(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_pair("e2b") / "target"
    common = ["--model", str(folder), "--prompt", "hello there", "-m", "4", "--num-draft-tokens", "2"]
    assert run("generate", *common, "--memory-limit", "1GB", "--max-context", "100").stdout
    assert run("generate", *common, "--memory-limit", "1MB", code=1).stderr.startswith(f"error: {folder}: needs ")
    for option, value, message in (
        ("--max-context", "5", "but the context holds 5 with the answer"),
        ("--max-context", "5000", "expected 2 to the model's 4096"),
    ):
        assert generate.main([*common, option, value]) == 1
        assert message in capsys.readouterr().err
    for wrong in ([*common, "--memory-limit", "lots"], ["--model", str(folder)]):
        with pytest.raises(SystemExit) as stopped:
            generate.main(wrong)
        assert stopped.value.code == 2
    assert "--prompt" in capsys.readouterr().err
