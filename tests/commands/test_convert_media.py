"""The converter with the parts for pictures and sounds: all kept, some quantized, or left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from support.commands import run
from support.tiny import VARIANTS
from support.tiny_media import make_media_target, random_mel, random_pixels, random_samples

import mlx_mtp
from mlx_mtp.checkpoints.config import read_json, read_target_config
from mlx_mtp.checkpoints.media_config import read_media_config
from mlx_mtp.convert.converter import Options, convert
from mlx_mtp.convert.quantization import WeightOptions
from mlx_mtp.errors import MTPError
from mlx_mtp.gemma4.media_towers import load_media

TinyMedia = Callable[[str], Path]
MEDIA = ("vision_tower.", "vision_embedder.", "embed_vision.", "audio_tower.", "embed_audio.")
PROJECTION = "vision_tower.encoder.layers.0.mlp.down_proj.linear"


def converted(source: Path, output: Path, modalities: tuple[str, ...] | None = None, **weights: Any) -> Path:
    # The blocks end inside tensors.
    convert(Options(str(source), output, "none", WeightOptions(**weights), modalities=modalities), block_bytes=10_000)
    return output


def features(folder: Path, variant: str) -> list[mx.array]:
    """Return the features of a picture and, if the checkpoint hears, of a sound."""
    towers = load_media(read_target_config(folder))
    assert towers.vision is not None
    found = [towers.vision(mx.array(random_pixels(96, 144)))]
    if towers.audio is not None:
        found.append(towers.audio(mx.array(random_samples(5) if variant == "12b" else random_mel(50))))
    return found


def arrays(folder: Path) -> dict[str, mx.array]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: array for file in files for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]


def media_tensors(folder: Path) -> dict[str, mx.array]:
    """Return the tensors of the media parts, by their names without `model.`."""
    plain = {name.removeprefix("model."): array for name, array in arrays(folder).items()}
    return {name: array for name, array in plain.items() if name.startswith(MEDIA)}


def load_in_mlx_lm(folder: Path) -> None:
    """Check that mlx-lm loads the folder with all its tensors used, except those of media, and computes numbers."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    assert bool(mx.isfinite(model(mx.array([[2, 30, 31]]))).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_parts_are_kept(tiny_media: TinyMedia, tmp_path: Path, variant: str) -> None:
    """In the same type, the features have the same bits."""
    source = tiny_media(variant)
    output = converted(source, tmp_path / "out", dtype="float32")
    for ours, theirs in zip(features(output, variant), features(source, variant), strict=True):
        assert mx.array_equal(ours, theirs)
    assert read_media_config(read_target_config(output)) == read_media_config(read_target_config(source))


@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_in_blocks_get_8_bits(tiny_media: TinyMedia, tmp_path: Path, variant: str) -> None:
    source = tiny_media(variant)
    output = converted(source, tmp_path / "out", quantize=True, dtype="bfloat16")
    stored = arrays(output)
    media = {name: array for name, array in stored.items() if "language_model" not in name}
    packed = {name for name, array in media.items() if array.dtype == mx.uint32}
    assert packed == {name for name in media if name.endswith(".linear.weight") and f"{name[:-6]}scales" in media}
    assert (variant == "12b") == (not packed)
    fields = json.loads((output / "config.json").read_text())["quantization"]
    assert all(fields[name.removesuffix(".weight")]["bits"] == 8 for name in packed)
    scalars = [array for array in media.values() if not array.shape]
    assert all(array.dtype == mx.float32 for array in scalars)
    assert len(scalars) > 0 or variant != "e2b"
    others = (array for name, array in media.items() if array.shape and name not in packed)
    assert {array.dtype for array in others} == {mx.bfloat16}
    for ours, theirs in zip(features(output, variant), features(source, variant), strict=True):
        # bfloat16 alone moves the features by up to 0.1 of their size.
        difference = ours.astype(mx.float32) - theirs
        assert mx.mean(difference**2) < 0.15**2 * mx.mean(theirs**2)


def test_the_result_answers_about_a_picture(tiny_media: TinyMedia, tmp_path: Path) -> None:
    Image.fromarray(np.full((60, 90, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    shutil.copytree(tiny_media("e2b"), tmp_path / "source")
    (tmp_path / "source" / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 70}}')
    convert_options = ("--hf-path", tmp_path / "source", "--mlx-path", tmp_path / "out", "--drafter", "none", "-q")
    run("convert.cli", *convert_options)
    result = run(
        "generate", "--model", tmp_path / "out", "-p", "what is it?", "--image", tmp_path / "grey.png", "-m", "4",
        "--ignore-eos", "--json",
    )  # fmt: skip
    summary = json.loads(result.stdout.splitlines()[-1])
    assert len(summary["tokens"]) == 4
    # The budget of a picture is that of the source's processor_config.json.
    assert 60 < summary["prompt_tokens"] < 120


def test_mlx_lm_loads_the_result(tiny_media: TinyMedia, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    output = converted(tiny_media("31b"), tmp_path / "out", quantize=True)
    model, _ = load_model(output)
    tokens = [2, 100, 200, 300]
    theirs = model(mx.array([tokens]))[0, -1]
    with mlx_mtp.load(output, None) as ours:
        top = ours.generate(tokens, max_tokens=1, num_draft_tokens=0, ignore_eos=True).tokens[0]
    assert top == mx.argmax(theirs).item()


def test_a_text_takes_the_memory_of_a_folder_without_media(tiny_media: TinyMedia, tmp_path: Path) -> None:
    folders = [converted(tiny_media("e2b"), tmp_path / name, kept) for name, kept in (("a", None), ("b", ("text",)))]
    media = sum(array.nbytes for array in media_tensors(folders[0]).values())
    options = ("--drafter", "none", "-p", "hello", "-m", "4", "--json")
    results = [run("generate", "--model", folder, *options) for folder in folders]
    peaks = [json.loads(result.stdout.splitlines()[-1])["peak_memory_gb"] * 1e9 for result in results]
    assert abs(peaks[0] - peaks[1]) < 0.2 * media


@pytest.mark.parametrize("modalities", [("text",), ("text", "image")])
def test_modalities(tiny_media: TinyMedia, tmp_path: Path, modalities: tuple[str, ...]) -> None:
    output = converted(tiny_media("e2b"), tmp_path / "out", modalities)
    names = arrays(output)
    assert any("vision" in name for name in names) == ("image" in modalities)
    assert not any("audio" in name for name in names)
    tag = "image-text-to-text" if "image" in modalities else "text-generation"
    assert f"pipeline_tag: {tag}\n" in (output / "README.md").read_text()
    sound = {"type": "audio", "audio": (np.zeros(16_000, np.float32), 16_000)}
    with mlx_mtp.load(output, None) as model:
        assert model.generate([{"role": "user", "content": "hello"}], max_tokens=2, num_draft_tokens=0).tokens
        known = "text, image, video" if "image" in modalities else "text"
        message = rf"this checkpoint reads only {known} \(.* --modalities left them out"
        with pytest.raises(mlx_mtp.PromptError, match=message):
            model.prepare([{"role": "user", "content": [sound]}])


@pytest.mark.parametrize(
    ("variant", "modalities", "message"),
    [
        ("31b", "text,audio", r"--modalities: .* has only text, image, found audio"),
        ("31b", "image", "--modalities: expected text, or text with image or audio or both"),
        ("31b", "text,smell", r"--modalities: expected text, .*found 'text,smell'"),
    ],
)
def test_refused_modalities(tiny_media: TinyMedia, tmp_path: Path, variant: str, modalities: str, message: str) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=message):
        converted(tiny_media(variant), tmp_path / "out", tuple(modalities.split(",")))
    assert list(tmp_path.iterdir()) == []


def test_the_plan_tells_what_media_add(tiny_media: TinyMedia, tiny_pair: Callable[[str], Path]) -> None:
    plan = mlx_mtp.plan_memory(tiny_media("31b"), "none")
    text = mlx_mtp.plan_memory(tiny_pair("31b") / "target", "none")
    assert plan.peak == text.peak
    assert text.media == 0
    weights = sum(array.nbytes for name, array in arrays(tiny_media("31b")).items() if "vision" in name)
    # 10080 patches, 144 wide and in float32. Their scores are computed in parts of at most 0.5 GB.
    assert plan.media - weights == pytest.approx(0.54e9 + 10080 * (18 * 144 * 4 + 3072), rel=0.01)
    assert "more, if a prompt has media" in str(plan)
    assert "media" not in str(text)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_and_fields_are_kept(variant: str, tiny_media: TinyMedia, tmp_path: Path) -> None:
    source = tiny_media(variant)
    out = converted(source, tmp_path / "out")
    before, after = media_tensors(source), media_tensors(out)
    assert before.keys() == after.keys()
    # Convolutions keep their order of channels.
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        assert mx.array_equal(after[name], array), name
    original, fields = read_json(source / "config.json"), read_json(out / "config.json")
    kept = [name for name in original if name.endswith(("_token_id", "_token_index"))]
    assert len(kept) > 6
    for name in kept:
        assert fields[name] == original[name]
    for name in ("vision_config", "audio_config"):
        assert fields.get(name) == (original[name] and original[name] | {"dtype": "float32"})
    load_in_mlx_lm(out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_types_and_bits_of_each_tensor(variant: str, tiny_media: TinyMedia, tmp_path: Path) -> None:
    """Projections in blocks have 8 bits. All else has the type of the text decoder, and scalars their own."""
    out = converted(tiny_media(variant), tmp_path / "out", quantize=True, dtype="bfloat16")
    stored, before = media_tensors(out), media_tensors(tiny_media(variant))
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
    out = converted(tiny_media(variant), tmp_path / "out", quantize=True, **weights)
    for ours, exact in zip(features(out, variant), features(tiny_media(variant), variant), strict=True):
        error = mx.sqrt(mx.mean((ours - exact) ** 2) / mx.mean(exact**2))
        assert bool(error > 0)
        assert bool(error < 0.05)


def test_a_matrix_that_groups_do_not_divide(tmp_path: Path) -> None:
    """As the 4304 columns of 26B and 31B. A group size of the command line is no error here."""
    source = make_media_target(tmp_path / "target", "31b", vision={"intermediate_size": 80})
    out = converted(source, tmp_path / "out", quantize=True, q_group_size=64)
    stored, quantization = media_tensors(out), read_json(out / "config.json")["quantization"]
    assert stored[f"{PROJECTION}.weight"].dtype == mx.float32
    assert PROJECTION not in quantization
    assert f"{PROJECTION.replace('down', 'up')}.scales" not in stored
    assert features(out, "31b")[0].shape == (1, 6, 128)


def test_groups_of_the_command_line(tmp_path: Path) -> None:
    source = make_media_target(tmp_path / "target", "31b", vision={"intermediate_size": 192})
    out = converted(source, tmp_path / "out", quantize=True, q_group_size=64, q_bits=8)
    assert f"{PROJECTION}.scales" in media_tensors(out)
    # This is what most weights have, so the config does not name it.
    assert PROJECTION not in read_json(out / "config.json")["quantization"]


def test_some_modalities(tiny_media: TinyMedia, tmp_path: Path) -> None:
    out = converted(tiny_media("e2b"), tmp_path / "out", ("text", "image"))
    assert not any("audio" in name for name in media_tensors(out))
    fields = read_json(out / "config.json")
    assert "vision_config" in fields
    assert "audio_config" not in fields
    assert len(features(out, "e2b")) == 1
    again = converted(tiny_media("e2b"), tmp_path / "audio", ("audio", "text"))
    assert load_media(read_target_config(again)).vision is None
    assert load_media(read_target_config(again)).audio is not None


def test_parts_without_tensors_are_not_described(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """mlx-lm's conversions keep the descriptions of parts that they drop."""
    shutil.copytree(tiny_media("26b"), tmp_path / "target")
    kept = {name: array for name, array in arrays(tiny_media("26b")).items() if "language_model" in name}
    mx.eval(kept)
    mx.save_safetensors(str(tmp_path / "target" / "model.safetensors"), kept)
    assert mlx_mtp.plan_memory(tmp_path / "target").media == 0
    out = converted(tmp_path / "target", tmp_path / "out")
    assert "vision_config" not in read_json(out / "config.json")
    load_in_mlx_lm(out)


def test_damaged_parts(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """The text decoder of such a checkpoint can be converted alone."""
    shutil.copytree(tiny_media("e2b"), tmp_path / "target")
    path = tmp_path / "target" / "config.json"
    good = path.read_text()
    fields = json.loads(good)
    fields["vision_config"]["hidden_activation"] = "relu"
    path.write_text(json.dumps(fields))
    with pytest.raises(MTPError, match=r"vision_config.hidden_activation must be .* \(--modalities text leaves"):
        converted(tmp_path / "target", tmp_path / "out")
    converted(tmp_path / "target", tmp_path / "text", ("text",))
    path.write_text(good)
    tensors = arrays(tiny_media("e2b"))
    mx.eval(tensors)
    del tensors[f"model.{PROJECTION}.weight"]
    mx.save_safetensors(str(tmp_path / "target" / "model.safetensors"), tensors)
    with pytest.raises(MTPError, match=rf"tensor {PROJECTION}.weight is missing"):
        converted(tmp_path / "target", tmp_path / "out")
    assert not (tmp_path / "out").exists()
