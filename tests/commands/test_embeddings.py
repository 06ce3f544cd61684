"""Resident and mapped per-layer embeddings: equal bits, less memory, and one clear error if files change."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.commands import run
from support.tiny import VOCAB_SIZE, WINDOW, make_drafter, make_target, random_tokens

import mlx_mtp
from mlx_mtp import generate, probe
from mlx_mtp.bench import cli as bench
from mlx_mtp.bench.operations import operations, round_outputs
from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.checkpoints.tensors import INDEX_NAME, read_checkpoint
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.convert.converter import Options, convert
from mlx_mtp.convert.quantization import WeightOptions
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.disk_table import EmbeddingStats, MappedEmbedding
from mlx_mtp.gemma4.drafter import Draft, Drafter
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.networks import load_target
from mlx_mtp.training.losses import compute_target_states

TinyPair = Callable[[str], Path]
Folder = Callable[[str], Path]
# One prompt is longer than the sliding window, and one is shorter.
LONG, SHORT = random_tokens(3 * WINDOW + 5, seed=2), random_tokens(WINDOW - 5, seed=1)
TABLE = "embed_tokens_per_layer"

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "8-bit": {"quantize": True, "q_bits": 8},
    "4-bit": {"quantize": True},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
}
EVERY_FORMAT = ["unconverted", *FORMATS, "sharded"]


@pytest.fixture(scope="module")
def folder(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function from a format to an E2B-like pair: unconverted, converted, or sharded weights and scales."""
    root = tmp_path_factory.mktemp("formats")

    def make(name: str) -> Path:
        if name == "unconverted":
            return tiny_pair("e2b") / "target"
        if name in FORMATS and not (root / name).exists():
            convert(
                Options(str(tiny_pair("e2b") / "target"), root / name, "auto", WeightOptions(**FORMATS[name])), 9999
            )
        if name == "sharded" and not (root / name).exists():
            shard(shutil.copytree(make("4-bit"), root / name))
        return root / name

    return make


def shard(folder: Path) -> None:
    """Move the scales into a second file, so that the table's scales are apart from its weights and biases."""
    tensors: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name in sorted(tensors):
        weight_map[name] = (
            "model-00002-of-00002.safetensors" if "scales" in name else "model-00001-of-00002.safetensors"
        )
    for file in set(weight_map.values()):
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in tensors if weight_map[name] == file})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert len({info.file for name, info in read_checkpoint(folder).items() if TABLE in name}) == 2


def both(folder: Path, **options: Any) -> list[mlx_mtp.Model]:
    return [mlx_mtp.load(folder, per_layer_embeddings=how, **options) for how in ("resident", "mapped")]


def decode(
    model: mlx_mtp.Model,
    prompt: list[int],
    k: int,
    rounds: int,
    *,
    step: int = 64,
    compiled: bool = True,
    **options: Any,
) -> tuple[list[RoundReport], list[mx.array]]:
    """Return the rounds of a stream, and the hidden state after each round."""
    shared = CompiledRounds() if compiled else None
    stream = Stream(model.target, model.drafter, max_draft_tokens=8, rounds=shared, **options)
    seen, hidden = [stream.prefill(prompt, step)], [stream.state.hidden]
    for _ in range(rounds):
        seen.append(stream.round(k))
        hidden.append(stream.state.hidden)
    return seen, hidden


def assert_same(
    left: tuple[list[RoundReport], list[mx.array]], right: tuple[list[RoundReport], list[mx.array]]
) -> None:
    assert [r[:4] for r in left[0]] == [r[:4] for r in right[0]]
    for ours, theirs in zip(left[1], right[1], strict=True):
        assert ours.dtype == theirs.dtype
        assert mx.array_equal(ours, theirs).item()


# --- equal bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_mapped_rounds_have_the_bits_of_resident_ones(folder: Folder, name: str) -> None:
    resident, mapped = both(folder(name))
    assert (resident.per_layer_embeddings, mapped.per_layer_embeddings) == ("resident", "mapped")
    for prompt, k, compiled in ((SHORT, 0, True), (SHORT, 3, True), (LONG, 3, False)):
        results = [decode(model, prompt, k, 20, compiled=compiled) for model in (resident, mapped)]
        assert_same(*results)
        assert len({token for result in results[0][0] for token in result.tokens}) > 10


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=1),
        Sampling(
            temperature=1.2, acceptance="coupled", min_p=0.01, seed=2, repetition_penalty=1.3, xtc_probability=0.5
        ),
    ],
    ids=["block", "coupled"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_sampled_rounds(folder: Folder, sampling: Sampling, compiled: bool) -> None:
    models = both(folder("4-bit" if compiled else "unconverted"))
    for k in (0, 3):
        assert_same(*(decode(m, LONG, k, 20, compiled=compiled, sampling=sampling, logprobs=2) for m in models))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_prefill_in_chunks(folder: Folder, step: int) -> None:
    models = both(folder("4-bit"))
    assert_same(*(decode(model, LONG, 3, 10, step=step) for model in models))


def test_every_kind_of_generation(folder: Folder) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["alpha", "beta"]}}}

    def push(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits + 5 * (mx.arange(VOCAB_SIZE) % 7 == tokens[-1] % 7)

    resident, mapped = both(folder("4-bit"))
    kinds: list[dict[str, Any]] = [
        {"num_draft_tokens": "auto"},
        {"num_draft_tokens": 3, "json_schema": schema, "sampling": Sampling(temperature=1.0, seed=3)},
        {"num_draft_tokens": 3, "logits_processors": [push], "logprobs": 1},
        {"num_draft_tokens": 3, "enable_thinking": True, "thinking_budget": 5},
        {"num_draft_tokens": 8, "stop": "e", "min_tokens": 4},
    ]
    for options in kinds:
        ours, theirs = (model.generate(LONG, max_tokens=25, **options) for model in (resident, mapped))
        assert (ours.tokens, ours.text, ours.thought) == (theirs.tokens, theirs.text, theirs.thought)
        assert ours.last.stats.accepted == theirs.last.stats.accepted
        assert ours.last.stats.embeddings is None
        assert theirs.last.stats.embeddings is not None
    assert repr(resident.parts.costs.identity(Sampling(), None, 0)) != repr(
        mapped.parts.costs.identity(Sampling(), None, 0)
    )


def test_exact_rounds(folder: Folder) -> None:
    for name in ("unconverted", "4-bit"):
        resident, mapped = both(folder(name), exact=True)
        for k in (0, 3):
            ours, theirs = (model.generate(LONG, max_tokens=20, num_draft_tokens=k) for model in (resident, mapped))
            assert ours.tokens == theirs.tokens


def test_no_drafter(folder: Folder) -> None:
    ours, theirs = (model.generate(SHORT, max_tokens=30) for model in both(folder("4-bit"), drafter="none"))
    assert ours.tokens == theirs.tokens
    assert theirs.last.stats.host_reads == theirs.last.stats.rounds


def test_another_type_of_activations(folder: Folder) -> None:
    """A cast of the weights also casts the rows, including the rounding of resident scales."""
    for name in ("unconverted", "8-bit"):
        models = both(folder(name))
        for model in models:
            assert model.drafter is not None
            for module in (model.target, model.drafter):
                module.set_dtype(mx.bfloat16)
        assert_same(*(decode(model, LONG, 3, 20) for model in models))


def test_whatever_else_passes_over_the_target(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """These passes are training's target states, the probe, the graph of a round, and bench."""
    models = both(folder("4-bit"))
    ours, theirs = (compute_target_states(model.target, LONG) for model in models)
    assert mx.array_equal(ours.hidden, theirs.hidden).item()
    assert mx.array_equal(ours.embeddings, theirs.embeddings).item()
    text = random_tokens(64 + 36, seed=4)
    resident, mapped = (probe.first_differences(model.target, text) for model in models)
    assert resident == mapped
    counts = [operations(round_outputs(model.target, model.drafter, 3)).total() for model in models]
    # With mapped embeddings, the host does the three gathers of packed weights, scales and biases.
    assert 0 <= counts[0] - counts[1] < 10
    args = ["--model", str(folder("4-bit")), "--per-layer-embeddings", "mapped", "--kinds", "code", "--contexts", "40"]
    args += ["--temps", "0", "--num-draft-tokens", "2", "-m", "6", "--repeats", "1"]
    assert bench.main(args) == 0
    (case,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    reads = {name: row["host_reads_per_round"] for name, row in case["settings"].items()}
    assert reads["0"] == 1
    assert 1 < reads["2"] <= 2


# --- host reads and buffers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_one_more_host_read_in_a_round_that_drafts(folder: Folder, compiled: bool) -> None:
    for k, reads in ((0, 1), (1, 2), (4, 2)):
        model = mlx_mtp.load(folder("4-bit"), per_layer_embeddings="mapped")
        seen, _ = decode(model, LONG, k, 5, compiled=compiled)
        assert [result.host_reads for result in seen[1:]] == [reads] * 5


def test_both_halves_are_compiled_once_per_shape(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlx_mtp.load(folder("4-bit"), per_layer_embeddings="mapped")
    rounds = CompiledRounds()
    stream = Stream(model.target, model.drafter, max_draft_tokens=3, rounds=rounds)
    stream.prefill(SHORT, 64)
    calls = []
    draft = Drafter.draft

    def counted(*args: Any) -> Draft:
        calls.append(1)
        return draft(*args)

    monkeypatch.setattr(Drafter, "draft", counted)
    for _ in range(6):
        stream.round(3)
    # The first call is eager, and the second call is the trace.
    assert len(calls) == 2
    assert len(rounds.traces) == 1


@pytest.mark.in_place
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("k", [0, 3])
def test_a_round_copies_no_buffer(folder: Folder, k: int, compiled: bool) -> None:
    """A draft that was read holds no K/V view. A round's peak does not grow with the buffers."""
    model = mlx_mtp.load(folder("unconverted"), per_layer_embeddings="mapped")
    target, peaks, sizes, rounds = model.target, [], [], CompiledRounds() if compiled else None
    for capacity in (1024, 64 * 1024):
        stream = Stream(target, model.drafter, max_draft_tokens=3, rounds=rounds)
        stream.cache = Cache(target.config, target.dtype, max_block=4, capacity=capacity)
        stream.prefill(LONG, 64)
        for _ in range(3):
            stream.round(k)
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(5):
            stream.round(k)
        peaks.append(mx.get_peak_memory() - active)
        sizes.append(sum(buffer.nbytes for buffer in stream.cache.arrays()))
    assert sizes[1] > sizes[0] + 15e6
    assert peaks[1] < peaks[0] + 1e6


# --- memory ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys, mlx.core as mx, mlx_mtp
from mlx.utils import tree_flatten
model = mlx_mtp.load(sys.argv[1], per_layer_embeddings=sys.argv[2])
loading, active = mx.get_peak_memory(), mx.get_active_memory()
weights = sum(v.nbytes for m in (model.target, model.drafter) for _, v in tree_flatten(m.parameters()))
model.generate(list(range(20, 60)), max_tokens=20, num_draft_tokens=3, ignore_eos=True)
print(loading, mx.get_peak_memory(), active - weights)
"""


@pytest.mark.parametrize("bits", [32, 4])
def test_the_table_is_never_in_memory(tmp_path: Path, bits: int) -> None:
    """This is true while loading and while decoding. The drafter embeds with the target's token table."""
    make_target(tmp_path / "target", "e2b", hidden_size_per_layer_input=4096)
    make_drafter(tmp_path / "target-assistant", "e2b")
    source = tmp_path / "target"
    if bits == 4:
        convert(Options(str(source), tmp_path / "four", "auto", WeightOptions(quantize=True)), 1 << 20)
        source = tmp_path / "four"
    table = sum(info.end - info.start for name, info in read_checkpoint(source).items() if TABLE in name)
    assert table > 5e6
    found = {}
    for how in ("resident", "mapped"):
        command = [sys.executable, "-c", _MEASURE, str(source), how]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found[how] = [int(number) for number in result.stdout.split()]
    for moment in (0, 1):
        assert found["mapped"][moment] < found["resident"][moment] - 0.9 * table
    # The rest is small, such as rotary periods. A token table has 131 kB in float32.
    assert max(found[how][2] for how in found) < 30e3


def test_files_are_closed_with_the_model(folder: Folder) -> None:
    def open_files() -> int:
        return len(os.listdir("/dev/fd"))

    gc.collect()
    before = open_files()
    model = mlx_mtp.load(folder("sharded"), per_layer_embeddings="mapped")
    assert open_files() == before + 2
    model.generate(SHORT, max_tokens=5, num_draft_tokens=3)
    del model
    gc.collect()
    assert open_files() == before


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_kept_and_those_not_used_for_longest_forgotten(folder: Folder) -> None:
    infos = {name.split(".")[-1]: info for name, info in read_checkpoint(folder("4-bit")).items() if TABLE in name}
    table = mlx_mtp.load(folder("4-bit")).target.embed_tokens_per_layer
    size = sum(info.end - info.start for info in infos.values()) // VOCAB_SIZE
    mapped = MappedEmbedding(table, infos, kept_bytes=3 * size + 1)

    def take(*tokens: int) -> tuple[int, int]:
        before = mapped.stats
        ids = mx.array([tokens], mx.int32)
        assert mx.array_equal(mapped(ids), table(ids)).item()
        hits, misses, read = mapped.stats.since(before)
        assert read == misses * size
        return hits, misses

    assert take(5, 6, 5) == (0, 2)
    assert take(7, 5) == (1, 1)
    # Three rows are kept: row 6 is dropped first, then row 7.
    assert take(8) == (0, 1)
    assert take(5) == (1, 0)
    assert take(6) == (0, 1)
    assert take(8, 5, 6) == (3, 0)
    assert take(7) == (0, 1)
    # One pass needs more rows than are kept.
    assert take(*range(100, 110), 511, 0) == (0, 12)
    none = MappedEmbedding(table, infos, kept_bytes=0)
    for _ in range(2):
        none.read([3, 4, 3])
    assert none.stats == EmbeddingStats(0, 4, 4 * size)
    with pytest.raises(mlx_mtp.WeightsError, match="the per-layer table has no row for token 512"):
        mapped.read([512])


def test_statistics_of_a_generation_and_of_the_model(folder: Folder) -> None:
    resident, mapped = both(folder("unconverted"))
    assert resident.embedding_stats is None
    options = mlx_mtp.GenerationOptions(max_tokens=20, num_draft_tokens=0, reuse_prompt=False)
    first, again = (mapped.generate(LONG, options).last.stats.embeddings for _ in range(2))
    assert first is not None
    assert again is not None
    row = 4 * 6 * 64
    assert first.bytes_read == row * first.misses > 0
    assert again == EmbeddingStats(first.hits + first.misses, 0, 0)
    assert mapped.embedding_stats == first.plus(again)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    """A copy of a pair that a test may damage. The value is the target's folder."""
    shutil.copytree(tiny_pair("e2b"), tmp_path / "pair")
    return tmp_path / "pair" / "target"


def test_a_file_that_is_deleted_can_be_read_on_and_one_that_changes_is_an_error(copied: Path, folder: Folder) -> None:
    file = copied / "model.safetensors"
    models = [mlx_mtp.load(copied, per_layer_embeddings="mapped") for _ in range(2)]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(mlx_mtp.WeightsError, match=rf"{file}: was (truncated|changed) while the model was in use"):
        models[0].generate(LONG, max_tokens=5)
    # The file has the old length, but other content.
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(mlx_mtp.WeightsError, match=rf"{file}: was changed while the model was in use; load it again"):
        models[1].generate(LONG, max_tokens=5)
    file.write_bytes(whole)
    model = mlx_mtp.load(copied, per_layer_embeddings="mapped")
    file.unlink()
    expected = mlx_mtp.load(folder("unconverted")).generate(LONG, max_tokens=30, num_draft_tokens=3).tokens
    assert model.generate(LONG, max_tokens=30, num_draft_tokens=3).tokens == expected


def test_a_file_truncated_while_the_command_runs(copied: Path) -> None:
    command = [sys.executable, "-m", "mlx_mtp.generate", "--model", str(copied), "-p", "hello", "-m", "3000"]
    command += ["--per-layer-embeddings", "mapped", "--temp", "1.5", "--num-draft-tokens", "3", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(5)
    os.truncate(copied / "model.safetensors", 5000)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in stderr.decode().splitlines() if line]
    assert line == f"error: {copied / 'model.safetensors'}: was truncated while the model was in use; load it again"


def test_bad_tables(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    mx.eval(tensors)
    name = f"model.language_model.{TABLE}.weight"
    table = tensors.pop(name)
    for change, message in (
        ({}, rf"tensor {TABLE}.weight is missing"),
        ({name: table[:, 1:]}, r"has shape \[512, 383\], expected \[512, 384\]"),
        ({name: table.astype(mx.int32)}, "is I32, expected one of F32, F16, BF16"),
    ):
        mx.save_safetensors(str(file), tensors | change)
        with pytest.raises(mlx_mtp.WeightsError, match=message):
            mlx_mtp.load(copied, per_layer_embeddings="mapped")


def test_packed_weights_of_another_type(folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(folder("4-bit"), tmp_path / "odd")
    file = tmp_path / "odd" / "model.safetensors"
    tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    mx.eval(tensors)
    (name,) = [name for name in tensors if f"{TABLE}.weight" in name]
    mx.save_safetensors(str(file), tensors | {name: tensors[name].view(mx.int32)})
    with pytest.raises(mlx_mtp.WeightsError, match=rf"{file}: the per-layer table's weight is I32, expected U32"):
        mlx_mtp.load(tmp_path / "odd", per_layer_embeddings="mapped")


# --- choosing --------------------------------------------------------------------------------------------------------


def test_a_model_without_a_table(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tiny_pair("31b") / "target")
    assert generate.main(["--model", target, "-p", "x", "--per-layer-embeddings", "mapped"]) == 1
    message = f"error: per_layer_embeddings is 'mapped', but {target} has no per-layer table\n"
    assert capsys.readouterr().err == message
    for how in ("auto", "resident"):
        model = mlx_mtp.load(target, "none", per_layer_embeddings=how)
        assert model.per_layer_embeddings is None
        assert model.embedding_stats is None
    with pytest.raises(mlx_mtp.OptionError, match="must be one of resident, mapped, auto, found 'disk'"):
        mlx_mtp.load(target, per_layer_embeddings="disk")  # type: ignore[arg-type]


def test_auto_goes_by_the_machine(
    folder: Folder, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The function of the same name hides the module.
    module = sys.modules["mlx_mtp.loading"]
    for name in ("unconverted", "8-bit"):
        model = mlx_mtp.load(folder(name))
        assert model.per_layer_embeddings == "resident"
        assert model.drafter is not None
        assert model.drafter_config is not None
        size = mlx_mtp.plan_memory(folder(name), per_layer_embeddings="resident").resident
        weights = sum(v.nbytes for m in (model.target, model.drafter) for v in lazy_parameters(m).values())
        # Fusion adds scales of queries and keys. int64 ids become int32.
        assert size == pytest.approx(weights, rel=0.03)
        for memory, expected in ((2 * size, "resident"), (2 * size - 2, "mapped")):
            monkeypatch.setattr(module, "memory_size", lambda memory=memory: memory)
            assert mlx_mtp.load(folder(name)).per_layer_embeddings == expected
    monkeypatch.setattr(module, "memory_size", lambda: 1000)
    assert mlx_mtp.load(tiny_pair("31b") / "target").per_layer_embeddings is None
    args = ["--model", str(folder("8-bit")), "-p", "hello", "-m", "5", "--num-draft-tokens", "2", "--verbose"]
    assert generate.main(args) == 0
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "the model would take more than half of this machine's memory: its per-layer embeddings are"
    )
    assert "per-layer embeddings: mapped" in rest
    assert generate.main([*args, "--per-layer-embeddings", "resident"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert not any("half of this machine" in line for line in lines)
    assert "per-layer embeddings: resident" in lines


def test_the_commands(folder: Folder, tmp_path: Path) -> None:
    texts = []
    for how in ("resident", "mapped"):
        options = ["--temp", "0", "-m", "40", "--num-draft-tokens", "3", "--per-layer-embeddings", how]
        result = run("generate", "--model", folder("4-bit"), "-p", "hello", "--json", *options)
        report = json.loads(result.stdout.splitlines()[-1])
        texts.append(report["text"])
        assert report["per_layer_embeddings"] == how
        if how == "mapped":
            rows = report["embedding_rows"]
            assert rows["misses"] > 0
            assert rows["bytes_read"] > 0
            (line,) = [line for line in result.stderr.splitlines() if line.startswith("Per-layer embeddings: ")]
            assert line.startswith(f"Per-layer embeddings: {rows['misses']} rows read from disk (")
            assert line.endswith(f" MB), {rows['hits']} found in memory")
        else:
            assert report["embedding_rows"] is None
            assert "Per-layer embeddings" not in result.stderr
    assert texts[0] == texts[1]
    options = ["-m", "10", "--num-draft-tokens", "2", "--per-layer-embeddings", "mapped"]
    result = run("chat", "--model", folder("4-bit"), *options, stdin="hello\n/stats\n")
    assert "Per-layer embeddings: " in result.stderr
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "hello there, how are you today? " * 3}) + "\n" for _ in range(4)))
    options = ["--output", str(tmp_path / "trained"), "--iters", "1", "--per-layer-embeddings", "mapped"]
    run("train", "--model", folder("unconverted"), "--data", data, *options)
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_load_target_alone(folder: Folder) -> None:
    config = read_target_config(folder("4-bit"))
    assert load_target(config).mapped is None
    mapped = load_target(config, mapped=True).mapped
    assert mapped is not None
    assert not mapped.stats.misses
    assert np.prod(mapped.like.shape) == 0
    assert isinstance(load_target(config).embed_tokens_per_layer, nn.QuantizedEmbedding)
