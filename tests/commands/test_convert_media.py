"""The converter with the parts for pictures and sounds: all kept, some quantized, or left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from support.commands import run
from support.tiny import VARIANTS
from support.tiny_media import random_mel, random_pixels, random_samples

import mlx_mtp
from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.checkpoints.media_config import read_media_config
from mlx_mtp.convert.converter import Options, convert
from mlx_mtp.convert.quantization import WeightOptions
from mlx_mtp.gemma4.media_towers import load_media

TinyMedia = Callable[[str], Path]


def converted(source: Path, output: Path, modalities: tuple[str, ...] | None = None, **weights: Any) -> Path:
    convert(Options(str(source), output, "none", WeightOptions(**weights), modalities=modalities))
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
    (tmp_path / "source").symlink_to(tiny_media("e2b"))
    convert_options = ("--hf-path", tmp_path / "source", "--mlx-path", tmp_path / "out", "--drafter", "none", "-q")
    run("convert.cli", *convert_options)
    result = run(
        "generate", "--model", tmp_path / "out", "-p", "what is it?", "--image", tmp_path / "grey.png", "-m", "4",
        "--ignore-eos", "--json",
    )  # fmt: skip
    assert len(json.loads(result.stdout.splitlines()[-1])["tokens"]) == 4


def test_mlx_lm_loads_the_result(tiny_media: TinyMedia, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    output = converted(tiny_media("31b"), tmp_path / "out", quantize=True)
    model, _ = load_model(output)
    tokens = [2, 100, 200, 300]
    theirs = model(mx.array([tokens]))[0, -1]
    with mlx_mtp.load(output, None) as ours:
        top = ours.generate(tokens, max_tokens=1, num_draft_tokens=0, ignore_eos=True).tokens[0]
    assert top == mx.argmax(theirs).item()


@pytest.mark.parametrize("modalities", [("text",), ("text", "image")])
def test_modalities(tiny_media: TinyMedia, tmp_path: Path, modalities: tuple[str, ...]) -> None:
    output = converted(tiny_media("e2b"), tmp_path / "out", modalities)
    names = arrays(output)
    assert any("vision" in name for name in names) == ("image" in modalities)
    assert not any("audio" in name for name in names)
    sound = {"type": "audio", "audio": (np.zeros(16_000, np.float32), 16_000)}
    with mlx_mtp.load(output, None) as model:
        assert model.generate([{"role": "user", "content": "hello"}], max_tokens=2, num_draft_tokens=0).tokens
        known = "text, image, video" if "image" in modalities else r"text \(mlx-mtp convert --modalities text left out"
        with pytest.raises(mlx_mtp.PromptError, match=f"found audio, but this checkpoint reads only {known}"):
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
    # 10080 patches, whose scores are computed in parts of at most 0.5 GB.
    assert plan.media - weights == pytest.approx(0.54e9 + 10080 * (3 * 160 * 4 + 3072), rel=0.01)
    assert "more, if a prompt has media" in str(plan)
    assert "media" not in str(text)
