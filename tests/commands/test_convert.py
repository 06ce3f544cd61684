"""The converter: its output, its refusals, and that a refusal or an interruption leaves no files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import Finished, run
from support.tiny import VARIANTS, load_drafter, load_target, make_drafter, make_target, random_tokens

from mlx_mtp.checkpoints.config import read_json, read_target_config
from mlx_mtp.checkpoints.layouts import MLX_PREFIX
from mlx_mtp.checkpoints.tensors import INDEX_NAME, TensorInfo, read_checkpoint
from mlx_mtp.convert.converter import Options, Summary, convert
from mlx_mtp.convert.quantization import WeightOptions, check_options
from mlx_mtp.convert.safetensors_writer import Conversion, plan_shards
from mlx_mtp.errors import ConfigError, HubError, MTPError, OptionError, OutputError
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target

SOURCE_PREFIX = "model.language_model."


@pytest.fixture
def e2b(tiny_pair: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with an E2B-like pair that a test may damage. Outputs are also written there."""
    shutil.copytree(tiny_pair("e2b"), tmp_path, dirs_exist_ok=True)
    return tmp_path


def run_convert(*arguments: object) -> Finished:
    return run("convert.cli", *arguments, code=None)


def quick(target: Path, output: Path, drafter: str = "auto", block_bytes: int = 1 << 20, **weights: Any) -> Summary:
    """Convert in this process."""
    return convert(Options(str(target), output, drafter, WeightOptions(**weights)), block_bytes)


def arrays(folder: Path) -> dict[str, mx.array]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: array for file in files for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))


def logits(target: Target, tokens: mx.array) -> mx.array:
    cache = Cache(target.config, target.dtype, max_block=8)
    return target.soft_cap(target(tokens, cache, logit_rows=tokens.shape[1]).logits)


def mlx_lm_logits(folder: Path, tokens: mx.array) -> mx.array:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    result: mx.array = model(tokens)
    return result


def assert_mlx_lm_agrees(folder: Path) -> None:
    """Check that mlx-lm loads the output unchanged and computes the logits of this project's target."""
    tokens = mx.array([random_tokens(40)])
    ours, theirs = logits(load_target(folder)[0], tokens), mlx_lm_logits(folder, tokens)
    assert float(mx.abs(ours - theirs).max()) < 1e-4


def assert_nothing_written(folder: Path, allowed: tuple[str, ...] = ("target", "target-assistant")) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(allowed)


# Output


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{"quantize": True}, {"dtype": "float32"}], ids=["q4", "float32"])
def test_variants_load_and_agree_with_mlx_lm(
    tiny_pair: Callable[[str], Path], tmp_path: Path, variant: str, options: dict[str, Any]
) -> None:
    quick(tiny_pair(variant) / "target", tmp_path / "out", **options)
    assert_mlx_lm_agrees(tmp_path / "out")
    load_drafter(tmp_path / "out" / "drafter")


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
def test_quantized_weights_are_those_of_whole_tensors(
    tiny_pair: Callable[[str], Path], tmp_path: Path, block_bytes: int
) -> None:
    """Fused experts have interleaved halves in the source. Blocks can end inside an expert."""
    source = load_file(tiny_pair("26b") / "target" / "model.safetensors")
    quick(tiny_pair("26b") / "target", tmp_path / "out", "none", block_bytes, quantize=True, dtype="bfloat16")
    output = arrays(tmp_path / "out")
    experts = "layers.1.experts."
    gate, up = mx.split(mx.array(source[f"{SOURCE_PREFIX}{experts}gate_up_proj"]), 2, axis=-2)
    weights = {
        "embed_tokens": mx.array(source[f"{SOURCE_PREFIX}embed_tokens.weight"]),
        "layers.3.self_attn.q_proj": mx.array(source[f"{SOURCE_PREFIX}layers.3.self_attn.q_proj.weight"]),
        f"{experts}switch_glu.gate_proj": gate,
        f"{experts}switch_glu.up_proj": up,
        f"{experts}switch_glu.down_proj": mx.array(source[f"{SOURCE_PREFIX}{experts}down_proj"]),
    }
    for module, weight in weights.items():
        expected = mx.quantize(weight.astype(mx.bfloat16), 64, 4)
        for name, array in zip(("weight", "scales", "biases"), expected, strict=True):
            assert same_bits(output[f"{MLX_PREFIX}{module}.{name}"], array), f"{module}.{name}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unquantized_weights_are_the_source_cast(tiny_pair: Callable[[str], Path], tmp_path: Path, dtype: str) -> None:
    source = load_file(tiny_pair("e2b") / "target" / "model.safetensors")
    quick(tiny_pair("e2b") / "target", tmp_path / "out", "none", 1000, dtype=dtype)
    output = arrays(tmp_path / "out")
    for name, array in output.items():
        expected = mx.array(source[SOURCE_PREFIX + name.removeprefix(MLX_PREFIX)]).astype(getattr(mx, dtype))
        assert same_bits(array, expected), name
    # The output has no vision tower and no unused K/V projections of layers that share K/V.
    assert not any("layers.5.self_attn.k_proj" in name or "vision" in name for name in output)
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype


def test_bfloat16_source(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    """A bfloat16 checkpoint is unchanged bit for bit. Its own dtype is the default."""
    quick(tiny_pair("31b") / "target", tmp_path / "first", "none", dtype="bfloat16")
    shutil.copytree(tmp_path / "first", tmp_path / "target")
    quick(tmp_path / "target", tmp_path / "second", "none", 1000)
    first, second = arrays(tmp_path / "first"), arrays(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)


def test_real_pair(pair: Path, tmp_path: Path) -> None:
    source = ("--hf-path", pair / "target", "--drafter", pair / "assistant")
    done = run_convert(*source, "--mlx-path", tmp_path / "out", "-q", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stderr.splitlines()[-1]
    assert done.stdout == ""
    from mlx_lm.utils import load

    load(str(tmp_path / "out"))
    assert_mlx_lm_agrees(tmp_path / "out")
    drafter, config = load_drafter(tmp_path / "out" / "drafter")
    assert config.quantization is None
    assert drafter.model.embed_tokens.weight.dtype == mx.float32
    expected = arrays(pair / "assistant")["masked_embedding.token_ordering"]
    assert drafter.masked_embedding is not None
    assert same_bits(drafter.masked_embedding.token_ordering, expected)


def test_output_folder(e2b: Path) -> None:
    done = run_convert("--model", e2b / "target", "--mlx-path", e2b / "new" / "out", "-q")
    assert done.returncode == 0, done.stderr
    out = e2b / "new" / "out"
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "drafter",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in (out / "drafter").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "drafter").stat().st_mode & 0o777 == out.stat().st_mode & 0o777 == 0o777 & ~_umask()
    fields = read_json(out / "config.json")
    assert fields["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"} == fields["quantization_config"]
    assert "vision_config" not in fields and "audio_config" not in fields  # noqa: PT018


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_shards(tiny_pair: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_mtp.convert.converter.plan_shards", lambda all_: plan_shards(all_, 120_000))
    quick(tiny_pair("31b") / "target", tmp_path / "out", "none", quantize=True)
    index = read_json(tmp_path / "out" / INDEX_NAME)
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    stored = arrays(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())
    source = read_checkpoint(tiny_pair("31b") / "target")
    assert index["metadata"]["total_parameters"] == sum(np.prod(tensor.shape) for tensor in source.values())
    assert_mlx_lm_agrees(tmp_path / "out")


def test_tensors_lie_aligned(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    quick(tiny_pair("e2b") / "target", tmp_path / "out", "none", quantize=True, dtype="bfloat16")
    widths = {"U32": 4, "BF16": 2}
    for tensor in read_checkpoint(tmp_path / "out").values():
        assert tensor.start % widths[tensor.dtype] == 0


def test_resaved_config(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    """A config that transformers saved has per_layer_config, and lacks fields of other models."""
    for variant in ("12b", "31b"):
        target = tmp_path / variant
        shutil.copytree(tiny_pair(variant) / "target", target)
        fields = read_json(target / "config.json")
        text = fields["text_config"]
        full = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text.pop("num_global_key_value_heads")}
        text["per_layer_config"] = {
            f"{i:02d}": full for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"
        }
        if variant == "12b":
            for lost in ("hidden_size_per_layer_input", "enable_moe_block", "vocab_size_per_layer_input"):
                del text[lost]
        (target / "config.json").write_text(json.dumps(fields))
        quick(target, tmp_path / f"{variant}-out", "none", quantize=True)
        assert_mlx_lm_agrees(tmp_path / f"{variant}-out")


def test_text_only_checkpoint(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    """A fine-tune is saved as the text decoder alone: a top-level config, and names without `language_model`."""
    target = tmp_path / "target"
    shutil.copytree(tiny_pair("31b") / "target", target)
    fields = read_json(target / "config.json")
    (target / "config.json").write_text(json.dumps(fields["text_config"] | {"dtype": "float32"}))
    tensors = load_file(target / "model.safetensors")
    save_file(
        {name.replace(SOURCE_PREFIX, "model."): value for name, value in tensors.items()}, target / "model.safetensors"
    )
    quick(target, tmp_path / "out", "none")
    assert_mlx_lm_agrees(tmp_path / "out")


# Quantization choices


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)])
def test_modes(tiny_pair: Callable[[str], Path], tmp_path: Path, mode: str, group_size: int, bits: int) -> None:
    quick(tiny_pair("26b") / "target", tmp_path / "out", "none", quantize=True, q_mode=mode)
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    assert {name: quantization[name] for name in ("mode", "group_size", "bits")} == {
        "mode": mode,
        "group_size": group_size,
        "bits": bits,
    }
    assert_mlx_lm_agrees(tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_bits(tiny_pair: Callable[[str], Path], tmp_path: Path, bits: int) -> None:
    quick(tiny_pair("e2b") / "target", tmp_path / "out", "none", quantize=True, q_bits=bits, q_group_size=32)
    assert read_json(tmp_path / "out" / "config.json")["quantization"]["bits"] == bits
    assert_mlx_lm_agrees(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_recipes_choose_what_mlx_lm_chooses(tiny_pair: Callable[[str], Path], tmp_path: Path, recipe: str) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model

    quick(tiny_pair("31b") / "target", tmp_path / "out", "none", quantize=True, quant_predicate=recipe)
    quick(tiny_pair("31b") / "target", tmp_path / "unquantized", "none")
    model, _ = load_model(tmp_path / "unquantized")
    choose: Any = mixed_quant_predicate_builder(recipe, model, 64)
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    default = {name: quantization[name] for name in ("group_size", "bits", "mode")}
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized"):
            assert quantization.get(path, default) == choose(path, module), path
    assert any("down_proj" in name for name in quantization)
    assert_mlx_lm_agrees(tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"q_mode": "mxfp4"}, {"quant_predicate": "mixed_2_6"}])
def test_router_stays_at_8_bits(tiny_pair: Callable[[str], Path], tmp_path: Path, options: dict[str, Any]) -> None:
    quick(tiny_pair("26b") / "target", tmp_path / "out", "none", quantize=True, **options)
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    output = arrays(tmp_path / "out")
    for layer in range(4):
        path = f"{MLX_PREFIX}layers.{layer}.router.proj"
        assert quantization[path] == {"group_size": 64, "bits": 8, "mode": "affine"}
        assert output[f"{path}.weight"].shape[-1] * 4 == 64


def test_group_size_must_divide(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\S+\.weight has 64 columns, not divisible by the group size of 128"):
        quick(tiny_pair("26b") / "target", tmp_path / "out", "none", quantize=True, q_group_size=128)
    assert_nothing_written(tmp_path, ())


def test_groups_get_smaller_by_default(tmp_path: Path) -> None:
    """Columns that only the smaller group size divides are quantized too. mlx-lm would leave them unquantized."""
    make_target(tmp_path / "target", "e2b", hidden_size_per_layer_input=32)
    quick(tmp_path / "target", tmp_path / "out", "none", quantize=True)
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    assert quantization["group_size"] == 64
    assert quantization[f"{MLX_PREFIX}layers.0.per_layer_projection"]["group_size"] == 32
    assert_mlx_lm_agrees(tmp_path / "out")


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_weights_that_no_group_size_divides_stay_unquantized(tmp_path: Path, mode: str) -> None:
    """As in mlx-lm, but a warning says so."""
    make_target(tmp_path / "target", "e2b", hidden_size_per_layer_input=20)
    make_drafter(tmp_path / "target-assistant", "e2b", hidden_size=40)
    options = ("--hf-path", tmp_path / "target", "--mlx-path", tmp_path / "out", "-q", "--q-mode", mode)
    result = run("convert.cli", *options, "--drafter-q-bits", "4")
    layers = read_target_config(tmp_path / "target").text.layers
    # The table of all layers, and the projection of each layer.
    names = "embed_tokens_per_layer, layers.0.per_layer_projection, ..."
    text = "weights stay unquantized, because no group size divides their columns"
    assert f"{text}: {len(layers) + 1} ({names})\n" in result.stderr
    output = arrays(tmp_path / "out")
    assert f"{MLX_PREFIX}embed_tokens_per_layer.scales" not in output
    assert f"{MLX_PREFIX}embed_tokens.scales" in output
    assert_mlx_lm_agrees(tmp_path / "out")
    texts = run(
        "generate", "--model", tmp_path / "out", "--prompt", "x", "-m", "5", "--num-draft-tokens", "2", "--json"
    )
    assert json.loads(texts.stdout.splitlines()[-1])["rounds"] > 0


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_default_drafter(tiny_pair: Callable[[str], Path], tmp_path: Path, variant: str) -> None:
    """With or without -q, a drafter with a dense head gets 4 bits. A centroid head stays bfloat16."""
    quick(tiny_pair(variant) / "target", tmp_path / "out")
    output, fields = arrays(tmp_path / "out" / "drafter"), read_json(tmp_path / "out" / "drafter" / "config.json")
    if variant == "e2b":
        assert "quantization" not in fields
        assert fields["dtype"] == "bfloat16"
        assert output["model.embed_tokens.weight"].dtype == mx.bfloat16
        assert output["masked_embedding.token_ordering"].dtype == mx.int32
    else:
        assert fields["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
        source: Any = mx.load(str(tiny_pair(variant) / "target-assistant" / "model.safetensors"))
        expected = mx.quantize(source["model.embed_tokens.weight"], 64, 4)
        assert same_bits(output["model.embed_tokens.weight"], expected[0])
        assert "pre_projection.scales" in output
    assert "quantization" not in read_json(tmp_path / "out" / "config.json")


def test_chosen_drafter_bits(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    quick(tiny_pair("e2b") / "target", tmp_path / "centroid", drafter_q_bits=8)
    output = arrays(tmp_path / "centroid" / "drafter")
    modules = ("model.embed_tokens", "masked_embedding.centroids", "pre_projection", "model.layers.3.mlp.down_proj")
    assert all(f"{module}.scales" in output for module in modules)
    assert output["masked_embedding.token_ordering"].dtype == mx.int32
    load_drafter(tmp_path / "centroid" / "drafter")
    quick(tiny_pair("31b") / "target", tmp_path / "dense", drafter_q_bits=16, quantize=True)
    assert not any(name.endswith(".scales") for name in arrays(tmp_path / "dense" / "drafter"))
    assert arrays(tmp_path / "dense" / "drafter")["model.norm.weight"].dtype == mx.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": True, "q_bits": 7}, "--q-bits: expected one of 2, 3, 4, 5, 6, 8, found 7"),
        ({"quantize": True, "q_group_size": 48}, "--q-group-size: expected one of 32, 64, 128, found 48"),
        ({"quantize": True, "q_mode": "int4"}, "--q-mode: expected one of affine, mxfp4, nvfp4, mxfp8, found int4"),
        ({"quantize": True, "q_mode": "mxfp4", "q_bits": 8}, "--q-bits: expected 4 with --q-mode mxfp4, found 8"),
        (
            {"quantize": True, "q_mode": "nvfp4", "q_group_size": 32},
            "--q-group-size: expected 16 with --q-mode nvfp4",
        ),
        ({"dtype": "float64"}, "--dtype: expected one of float16, bfloat16, float32, found float64"),
        ({"drafter_q_bits": 7}, "--drafter-q-bits: expected one of 2, 3, 4, 5, 6, 8, 16, found 7"),
        ({"quantize": True, "quant_predicate": "mixed_1_2"}, "--quant-predicate: expected one of mixed_2_6, "),
        (
            {"quantize": True, "quant_predicate": "mixed_2_6", "q_mode": "mxfp4"},
            "--quant-predicate: expected --q-mode",
        ),
        ({"quantize": True, "quant_predicate": "mixed_2_6", "q_bits": 4}, "--q-bits: expected none with --quant-pred"),
        ({"q_bits": 4}, "--q-bits: expected --quantize with it, found 4 alone"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_options(WeightOptions(**options))
    assert message in str(caught.value)


# Refusals


def _no_tokenizer(folder: Path) -> None:
    (folder / "target" / "tokenizer.json").unlink()


def _truncated(folder: Path) -> None:
    file = folder / "target" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def _edit_tensors(edit: Callable[[dict[str, Any]], object], role: str = "target") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / role / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return damage


def _edit_config(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "target" / "config.json"
        path.write_text(json.dumps(read_json(path) | fields))

    return damage


def _lost_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "target" / INDEX_NAME).write_text(json.dumps(index))


def _other_drafter(folder: Path) -> None:
    shutil.rmtree(folder / "target-assistant")
    make_drafter(folder / "target-assistant", "31b")


NORM = f"{SOURCE_PREFIX}norm.weight"
GATE = f"{SOURCE_PREFIX}layers.3.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_tokenizer, "the folder has no tokenizer.json or tokenizer.model"),
        (_truncated, "model.safetensors: truncated"),
        (_edit_tensors(lambda tensors: tensors.pop(GATE)), "tensor layers.3.mlp.gate_proj.weight is missing"),
        (_edit_tensors(lambda t: t.update({GATE: t[GATE][:-1]})), f"{GATE} has shape [127, 64], expected [128, 64]"),
        (
            _edit_tensors(lambda t: t.update({NORM: t[NORM].astype(np.float64)})),
            f"{NORM} has type F64, expected one of",
        ),
        (_edit_tensors(lambda t: t.update(other=t[NORM])), "tensor other belongs to no part of the model"),
        (
            _edit_tensors(lambda t: t.pop("pre_projection.weight"), "target-assistant"),
            "pre_projection.weight is missing",
        ),
        (_lost_shard, "names model-00001-of-00002.safetensors, which is not in the folder"),
        (_other_drafter, "the drafter does not belong to"),
        (_edit_config(model_type="llama"), "field model_type must be a Gemma 4 target's"),
        (_edit_config(dtype="float8"), "field dtype must be one of float16, bfloat16, float32, found float8"),
        (_edit_config(quantization={"group_size": 64, "bits": 4}), "is quantized already (4 bits)"),
        (lambda folder: (folder / "target" / "config.json").unlink(), "the folder has no config.json"),
    ],
)
def test_damaged_checkpoints(e2b: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(e2b)
    with pytest.raises(MTPError) as caught:
        quick(e2b / "target", e2b / "out", quantize=True)
    assert message in str(caught.value)
    assert_nothing_written(e2b)


def test_errors_on_the_command_line(e2b: Path) -> None:
    """One line names the error. The exit status is not zero, and there is no traceback and no output."""
    (e2b / "file").touch()
    (e2b / "existing").mkdir()
    target, drafter, out = e2b / "target", e2b / "target-assistant", e2b / "out"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((target, out, "-q", "--q-bits", "7"), "--q-bits: expected one of 2, 3, 4, 5, 6, 8, found 7"),
        ((target, out, "--q-bits", "many"), "argument --q-bits: invalid int value: 'many'"),
        ((target, e2b / "existing"), "existing: exists already"),
        ((target, e2b / "existing", "--overwrite"), "not replaced: expected a model's folder"),
        ((target, target, "--overwrite"), "would replace the checkpoint it is made from"),
        ((target, e2b / "file" / "out"), "file is not a folder"),
        ((drafter, out), "this is a drafter, pass it with --drafter"),
        ((target, out, "--drafter", target), "this is a target, not a drafter"),
        ((target, out, "--drafter", "none", "--drafter-q-bits", "4"), "--drafter-q-bits: expected a drafter"),
        ((e2b / "absent", out), "absent: no such folder"),
        ((target, out, "--upload-repo", "a/b/c"), "--upload-repo: expected a hub repository's id, found a/b/c"),
    ]
    for (source, output, *rest), message in cases:
        done = run_convert("--hf-path", source, "--mlx-path", output, *rest)
        assert done.returncode in (1, 2), message
        assert done.stderr.startswith("error: "), done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert_nothing_written(e2b, ("existing", "file", "target", "target-assistant"))


def test_no_permission(e2b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission to write"):
        quick(e2b / "target", e2b / "out")


def test_float16_overflow(e2b: Path) -> None:
    """The overflow is found only during writing. The written files are removed again."""
    _edit_tensors(lambda tensors: tensors.update({NORM: tensors[NORM] * 1e5}))(e2b)
    with pytest.raises(MTPError, match=r"norm\.weight holds .*, float16 at most 65504; use --dtype bfloat16"):
        quick(e2b / "target", e2b / "out" / "deep", dtype="float16")
    assert_nothing_written(e2b)


def test_source_truncated_after_the_check(e2b: Path) -> None:
    source = e2b / "target" / "model.safetensors"
    info = TensorInfo(source, "F32", (64, 64), source.stat().st_size - 64, source.stat().st_size - 64 + 64 * 64 * 4)
    with pytest.raises(MTPError, match="truncated while"):
        list(Conversion("a.weight", info, (64, 64), mx.float32).blocks(1 << 20))


def test_disk_full(e2b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one byte is missing, the conversion is refused before any write. With enough bytes it succeeds."""
    done = quick(e2b / "target", e2b / "first")
    needed = sum(file.stat().st_size for file in (e2b / "first").rglob("*") if file.is_file())
    assert done.drafter is not None
    usage = namedtuple("usage", "total used free")
    # The name of the folder is part of its model card.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 1, needed - 1))
    with pytest.raises(OutputError, match=rf"needs {needed:,} bytes, found {needed - 1:,} free"):
        quick(e2b / "target", e2b / "other")
    assert_nothing_written(e2b, ("first", "target", "target-assistant"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 0, needed))
    quick(e2b / "target", e2b / "other")


def test_disk_fails_while_writing(e2b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_mtp.convert.converter.write_shard", fail)
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left on device"):
        quick(e2b / "target", e2b / "out")
    assert_nothing_written(e2b)


def test_overwrite(e2b: Path) -> None:
    """The old folder stays whole until the new one is complete."""
    quick(e2b / "target", e2b / "out", "none")
    before = (e2b / "out" / "model.safetensors").read_bytes()
    options = Options(str(e2b / "target"), e2b / "out", overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        convert(replace(options, overwrite=False))

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(options, progress=interrupt)
    assert (e2b / "out" / "model.safetensors").read_bytes() == before
    assert_nothing_written(e2b, ("out", "target", "target-assistant"))
    convert(options)
    assert (e2b / "out" / "drafter" / "config.json").is_file()
    assert_nothing_written(e2b, ("out", "target", "target-assistant"))


def test_overwrite_interrupted_between_the_renames(e2b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(e2b / "target", e2b / "out", "none")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(Options(str(e2b / "target"), e2b / "out", overwrite=True))
    load_target(e2b / "out")
    assert_nothing_written(e2b, ("out", "target", "target-assistant"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(e2b: Path, number: signal.Signals) -> None:
    """A process that is stopped half way removes its output."""
    slow = "write = c.write_shard; c.write_shard = lambda *a: (write(*a), time.sleep(60))"
    imports = "import sys, time, mlx_mtp.convert.converter as c; from mlx_mtp.convert.cli import main"
    command = f"{imports}; {slow}; sys.exit(main())"
    arguments = ["--hf-path", str(e2b / "target"), "--mlx-path", str(e2b / "out")]
    process = subprocess.Popen([sys.executable, "-c", command, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(e2b.glob(".out.partial-*/new/model.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert_nothing_written(e2b)


# Drafters and the hub


def test_no_drafter_found(e2b: Path) -> None:
    shutil.rmtree(e2b / "target-assistant")
    done = run_convert("--hf-path", e2b / "target", "--mlx-path", e2b / "out")
    assert done.returncode == 0, done.stderr
    assert "no drafter found for" in done.stderr
    assert not (e2b / "out" / "drafter").exists()


def test_drafter_inside_the_target(e2b: Path) -> None:
    (e2b / "target-assistant").rename(e2b / "target" / "drafter")
    quick(e2b / "target", e2b / "out")
    load_drafter(e2b / "out" / "drafter")


class FakeHub:
    """A replacement for huggingface_hub.HfApi."""

    calls: list[tuple[str, dict[str, Any]]]
    error: Exception | None = None

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
        if FakeHub.error is not None:
            raise FakeHub.error
        FakeHub.calls.append((repo_id, {"exist_ok": exist_ok}))

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        files = sorted(str(file.relative_to(folder_path)) for file in folder_path.rglob("*") if file.is_file())
        FakeHub.calls.append((repo_id, {"files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.calls, FakeHub.error = [], None
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    return FakeHub


def test_upload(e2b: Path, hub: type[FakeHub]) -> None:
    convert(Options(str(e2b / "target"), e2b / "out", upload_repo="someone/model"))
    created, uploaded = hub.calls
    assert created == ("someone/model", {"exist_ok": True})
    assert uploaded[0] == "someone/model"
    assert {"README.md", "config.json", "drafter/model.safetensors", "model.safetensors"} <= set(uploaded[1]["files"])


def test_failed_upload_keeps_the_result(e2b: Path, hub: type[FakeHub]) -> None:
    hub.error = OSError("401 Unauthorized\nand much more")
    with pytest.raises(HubError, match=r"^someone/model: upload failed, the converted model is in .*: 401 Una\w+$"):
        convert(Options(str(e2b / "target"), e2b / "out", upload_repo="someone/model"))
    load_target(e2b / "out")


def test_hub_id(e2b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download gets the hub id and its revision. The model card names the source and keeps its licence."""
    asked = []

    def resolve(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return e2b / "target" if name == "someone/target" else e2b / "target-assistant"

    (e2b / "target" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Source\n")
    monkeypatch.setattr("mlx_mtp.convert.converter.resolve_folder", resolve)
    convert(Options("someone/target", e2b / "out", "someone/drafter", revision="v1"))
    assert asked == [("someone/target", "v1"), ("someone/drafter", None)]
    card = (e2b / "out" / "README.md").read_text()
    assert "base_model: someone/target" in card
    assert "license: apache-2.0" in card


def test_per_layer_config_that_cannot_be_published(e2b: Path) -> None:
    """Different heads in layers of one type have no published spelling. They are refused, and not approximated."""
    path = e2b / "target" / "config.json"
    fields = read_json(path)
    text = fields["text_config"]
    full = {"head_dim": text.pop("global_head_dim")}
    text["per_layer_config"] = {"1": full, "3": full, "5": {"head_dim": 48}}
    path.write_text(json.dumps(fields))
    _edit_tensors(
        lambda t: t.update(
            {
                f"{SOURCE_PREFIX}layers.5.self_attn.q_proj.weight": np.ones((192, 64), np.float32),
                f"{SOURCE_PREFIX}layers.5.self_attn.o_proj.weight": np.ones((64, 192), np.float32),
                f"{SOURCE_PREFIX}layers.5.self_attn.q_norm.weight": np.ones(48, np.float32),
            }
        )
    )(e2b)
    with pytest.raises(ConfigError, match="per_layer_config must be alike for all full_attention layers"):
        quick(e2b / "target", e2b / "out", "none")


def test_memory(tmp_path: Path) -> None:
    """For a larger checkpoint, peak memory stays within twice the largest tensor plus 500 MB."""
    # The checkpoint has 72 MB of embeddings, and 14 layers of 3 tensors of 32 MB.
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 18432}
    make_target(tmp_path / "target", "31b", layer_types=_layer_types(14), **sizes)
    size = (tmp_path / "target" / "model.safetensors").stat().st_size
    largest = max(tensor.end - tensor.start for tensor in read_checkpoint(tmp_path / "target").values())
    bound = 2 * largest + 500e6
    assert size > 2 * bound
    arguments = ["--hf-path", str(tmp_path / "target"), "--mlx-path", str(tmp_path / "out"), "-q", "--drafter", "none"]
    command = [sys.executable, "-c", _PEAK, sys.executable, "-m", "mlx_mtp.convert", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < bound


# On Linux, a process's peak includes its parent's before exec. A small process in between hides the tests' peak.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _layer_types(count: int) -> list[str]:
    return ["sliding_attention"] * (count - 1) + ["full_attention"]
