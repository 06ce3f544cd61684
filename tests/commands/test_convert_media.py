"""Conversions of targets with media: what is kept, its types and bits, and that pictures and sounds are still read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.commands import run
from support.tiny import VARIANTS
from support.tiny_media import make_media_target, random_mel, random_pixels, random_samples

import mlx_mtp
from mlx_mtp.checkpoints.config import read_json, read_target_config
from mlx_mtp.checkpoints.tensors import read_checkpoint
from mlx_mtp.convert.converter import Options, convert
from mlx_mtp.convert.quantization import WeightOptions
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.errors import MTPError
from mlx_mtp.gemma4.media_towers import MediaTowers, load_media

TinyMedia = Callable[[str], Path]
Array = NDArray[np.float32]
MEDIA = ("vision_tower.", "vision_embedder.", "embed_vision.", "audio_tower.", "embed_audio.")
PROJECTION = "vision_tower.encoder.layers.0.mlp.down_proj.linear"


def quick(target: Path, output: Path, modalities: tuple[str, ...] | None = None, **weights: Any) -> Path:
    """Convert in this process, in blocks that end inside tensors."""
    options = Options(str(target), output, "none", WeightOptions(**weights), modalities=modalities)
    return convert(options, block_bytes=1000).folder


def arrays(folder: Path) -> dict[str, mx.array]:
    result: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    return result


def media_arrays(folder: Path) -> dict[str, mx.array]:
    """Return the tensors of the media parts, by their names without `model.`."""
    plain = {name.removeprefix("model."): array for name, array in arrays(folder).items()}
    return {name: array for name, array in plain.items() if name.startswith(MEDIA)}


def features(folder: Path, variant: str) -> list[Array]:
    """Return the features of a picture and, if the checkpoint reads it, of a sound."""
    towers: MediaTowers = load_media(read_target_config(folder))
    assert towers.vision is not None
    found = [towers.vision(mx.array(random_pixels(96, 144)))]
    if towers.audio is not None:
        found.append(towers.audio(mx.array(random_samples(5) if variant == "12b" else random_mel(50))))
    return [np.array(rows.astype(mx.float32)) for rows in found]


def load_in_mlx_lm(folder: Path) -> None:
    """Check that mlx-lm loads the folder with all its tensors used, except those of media, and computes numbers."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    assert bool(mx.isfinite(model(mx.array([[2, 30, 31]]))).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_media_parts_are_kept(variant: str, tiny_media: TinyMedia, tmp_path: Path) -> None:
    source = tiny_media(variant)
    out = quick(source, tmp_path / "out")
    before, after = media_arrays(source), media_arrays(out)
    assert before.keys() == after.keys()
    # Convolutions keep their order of channels.
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        assert mx.array_equal(after[name], array), name
    for ours, expected in zip(features(out, variant), features(source, variant), strict=True):
        assert np.array_equal(ours, expected)
    original, fields = read_json(source / "config.json"), read_json(out / "config.json")
    kept = [name for name in original if name.endswith(("_token_id", "_token_index"))]
    assert len(kept) > 6
    for name in kept:
        assert fields[name] == original[name]
    for name in ("vision_config", "audio_config"):
        assert fields.get(name) == (original[name] and original[name] | {"dtype": "float32"})
    load_in_mlx_lm(out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_types_and_bits(variant: str, tiny_media: TinyMedia, tmp_path: Path) -> None:
    """Projections in blocks have 8 bits. All else has the type of the text decoder, and scalars their own."""
    out = quick(tiny_media(variant), tmp_path / "out", quantize=True, dtype="bfloat16")
    stored, before = media_arrays(out), media_arrays(tiny_media(variant))
    quantization = read_json(out / "config.json")["quantization"]
    assert quantization["bits"] == 4
    for name, array in before.items():
        path = name.removesuffix(".weight")
        sizes = [size for size in (64, 32) if array.ndim and array.shape[-1] % size == 0]
        if not path.endswith(".linear") or not sizes:
            assert f"{path}.scales" not in stored
            assert path not in quantization
            assert stored[name].dtype == (mx.bfloat16 if array.ndim else mx.float32), name
            assert mx.array_equal(stored[name], array.astype(stored[name].dtype)), name
            continue
        assert quantization[path] == {"group_size": sizes[0], "bits": 8, "mode": "affine"}
        expected = mx.quantize(array.astype(mx.bfloat16), sizes[0], 8)
        for part, values in zip(("weight", "scales", "biases"), expected, strict=True):
            assert stored[f"{path}.{part}"].dtype == values.dtype
            assert mx.array_equal(stored[f"{path}.{part}"], values), path
    projections = sum(name.endswith(".linear.weight") for name in before)
    assert projections == {"e2b": 21 + 30, "12b": 0}.get(variant, 21)
    load_in_mlx_lm(out)


@pytest.mark.parametrize("weights", [{}, {"q_mode": "nvfp4"}, {"q_mode": "mxfp8"}, {"quant_predicate": "mixed_3_6"}])
@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_features_of_quantized_parts(
    variant: str, weights: dict[str, Any], tiny_media: TinyMedia, tmp_path: Path
) -> None:
    """The parts have 8 bits in groups of at least 32, with any quantization of the text decoder."""
    out = quick(tiny_media(variant), tmp_path / "out", quantize=True, **weights)
    for ours, exact in zip(features(out, variant), features(tiny_media(variant), variant), strict=True):
        error = float(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))
        assert 0 < error < 0.05


def test_a_matrix_that_groups_do_not_divide(tmp_path: Path) -> None:
    """As the 4304 columns of 26B and 31B. A group size of the command line is no error here."""
    source = make_media_target(tmp_path / "target", "31b", vision={"intermediate_size": 80})
    out = quick(source, tmp_path / "out", quantize=True, q_group_size=64)
    stored, quantization = media_arrays(out), read_json(out / "config.json")["quantization"]
    assert stored[f"{PROJECTION}.weight"].dtype == mx.float32
    assert PROJECTION not in quantization
    assert f"{PROJECTION.replace('down', 'up')}.scales" not in stored
    assert features(out, "31b")[0].shape == (1, 6, 128)


def test_groups_of_the_command_line(tmp_path: Path) -> None:
    source = make_media_target(tmp_path / "target", "31b", vision={"intermediate_size": 192})
    out = quick(source, tmp_path / "out", quantize=True, q_group_size=64, q_bits=8)
    assert f"{PROJECTION}.scales" in media_arrays(out)
    # This is what most weights have, so the config does not name it.
    assert PROJECTION not in read_json(out / "config.json")["quantization"]


def test_picture_and_sound_on_the_command_line(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """`generate` reads a converted folder, also the budget of processor_config.json."""
    shutil.copytree(tiny_media("e2b"), tmp_path / "target")
    processor = {"image_processor": {"max_soft_tokens": 70}}
    (tmp_path / "target" / "processor_config.json").write_text(json.dumps(processor))
    (tmp_path / "target" / "preprocessor_config.json").write_text("{}")
    arguments = ("--hf-path", tmp_path / "target", "--mlx-path", tmp_path / "out", "--drafter", "none", "-q")
    run("convert.cli", *arguments)
    out = tmp_path / "out"
    assert read_json(out / "processor_config.json") == processor
    assert (out / "preprocessor_config.json").is_file()
    Image.fromarray((random_pixels(300, 400) * 255).astype(np.uint8)).save(tmp_path / "picture.png")
    done = run(
        "generate", "--model", out, "--image", tmp_path / "picture.png", "-p", "what is it", "-m", "6", "--json",
        "--ignore-eos",
    )  # fmt: skip
    assert 63 < json.loads(done.stdout.splitlines()[-1])["prompt_tokens"] < 120
    with mlx_mtp.load(out, "none") as model:
        content = [{"type": "image", "path": tmp_path / "picture.png"}, {"type": "text", "text": "what is it"}]
        prompt = model.prepare([{"role": "user", "content": content}])
        stream = Stream(model.target, None, max_draft_tokens=0, media=prompt.media)
        logits = stream.read(prompt.tokens, 512)
        assert bool(mx.isfinite(logits).all())
        assert bool(mx.abs(logits).max() > 0.1)


def test_text_alone(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """The tensors, the configs and the processor's files are left out. A picture is an error that names the flag."""
    shutil.copytree(tiny_media("e2b"), tmp_path / "target")
    (tmp_path / "target" / "processor_config.json").write_text("{}")
    arguments = ("--hf-path", tmp_path / "target", "--mlx-path", tmp_path / "out", "--drafter", "none")
    run("convert.cli", *arguments, "--modalities", "text")
    out = tmp_path / "out"
    assert not media_arrays(out)
    assert not {"vision_config", "audio_config"} & read_json(out / "config.json").keys()
    assert not (out / "processor_config.json").exists()
    load_in_mlx_lm(out)
    Image.new("RGB", (50, 50)).save(tmp_path / "picture.png")
    picture = ("--image", tmp_path / "picture.png", "-p", "x")
    done = run("generate", "--model", out, *picture, code=1)
    assert "found image, but this checkpoint reads only text" in done.stderr
    assert "without --modalities text" in done.stderr
    with mlx_mtp.load(out, "none") as model:
        assert model.generate("hello", max_tokens=2, ignore_eos=True).last.generation_tokens == 2


def test_some_modalities(tiny_media: TinyMedia, tmp_path: Path) -> None:
    out = quick(tiny_media("e2b"), tmp_path / "out", ("text", "image"))
    assert not any("audio" in name for name in media_arrays(out))
    fields = read_json(out / "config.json")
    assert "vision_config" in fields
    assert "audio_config" not in fields
    assert len(features(out, "e2b")) == 1
    again = quick(tiny_media("e2b"), tmp_path / "audio", ("audio", "text"))
    assert load_media(read_target_config(again)).vision is None
    assert load_media(read_target_config(again)).audio is not None


def test_parts_without_tensors_are_not_described(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """mlx-lm's conversions keep the descriptions of parts that they drop."""
    shutil.copytree(tiny_media("26b"), tmp_path / "target")
    kept = {name: array for name, array in arrays(tiny_media("26b")).items() if "language_model" in name}
    mx.eval(kept)
    mx.save_safetensors(str(tmp_path / "target" / "model.safetensors"), kept)
    assert mlx_mtp.plan_memory(tmp_path / "target").media == 0
    out = quick(tmp_path / "target", tmp_path / "out")
    assert "vision_config" not in read_json(out / "config.json")
    assert read_checkpoint(out)


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ("image", "--modalities: expected text, or text with image or audio or both, with commas between them"),
        ("text,video", "found 'text,video'"),
        ("", "found ''"),
        ("text,audio", "has only text, image, found audio"),
    ],
)
def test_wrong_modalities(modalities: str, message: str, tiny_media: TinyMedia, tmp_path: Path) -> None:
    arguments = ("--hf-path", tiny_media("31b"), "--mlx-path", tmp_path / "out", "--drafter", "none")
    done = run("convert.cli", *arguments, "--modalities", modalities, code=1)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_damaged_parts(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """The text decoder of such a checkpoint can be converted alone."""
    shutil.copytree(tiny_media("e2b"), tmp_path / "target")
    path = tmp_path / "target" / "config.json"
    good = path.read_text()
    fields = json.loads(good)
    fields["vision_config"]["hidden_activation"] = "relu"
    path.write_text(json.dumps(fields))
    with pytest.raises(MTPError, match=r"vision_config.hidden_activation must be .* \(--modalities text leaves"):
        quick(tmp_path / "target", tmp_path / "out")
    quick(tmp_path / "target", tmp_path / "text", ("text",))
    path.write_text(good)
    tensors = arrays(tiny_media("e2b"))
    mx.eval(tensors)
    del tensors[f"model.{PROJECTION}.weight"]
    mx.save_safetensors(str(tmp_path / "target" / "model.safetensors"), tensors)
    with pytest.raises(MTPError, match=rf"tensor {PROJECTION}.weight is missing"):
        quick(tmp_path / "target", tmp_path / "out")
    assert not (tmp_path / "out").exists()
