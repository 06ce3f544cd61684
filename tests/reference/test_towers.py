"""The media parts against transformers in float32: features of pictures and clips, in all layouts of their tensors."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from support.quiet_torch import quiet_torch
from support.tiny import VARIANTS
from support.tiny_media import make_media_target, random_mel, random_pixels, random_samples
from transformers.models.gemma4.image_processing_pil_gemma4 import convert_image_to_patches, pad_along_first_dim

from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.gemma4 import vision
from mlx_mtp.gemma4.media_towers import MediaTowers, load_media

TinyMedia = Callable[[str], Path]
Array = NDArray[np.float32]

# The features are about 4.
TOLERANCE = 1e-4
# Each entry is height and width in squares of 48 pixels, which make a token each, and the budget in tokens.
SIZES = [(1, 1, 70), (7, 10, 70), (1, 70, 70), (35, 4, 140)]
# transformers takes seconds for it.
LARGEST = (14, 20, 280)
# Frames of a clip. Four frames make a token, and a token sees 12.
FRAMES = (1, 2, 3, 4, 5, 7, 8, 9, 48, 49, 100, 501)


@dataclass(frozen=True)
class Media:
    """One variant's media parts, in this project and in transformers."""

    variant: str
    towers: MediaTowers
    reference: Any


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_torch():
        yield


@pytest.fixture(scope="module", params=VARIANTS)
def media(request: pytest.FixtureRequest, tiny_media: TinyMedia) -> Media:
    return load_both(tiny_media(request.param), request.param)


def load_both(folder: Path, variant: str) -> Media:
    return Media(variant, load(folder), load_reference(folder, variant))


def load(folder: Path) -> MediaTowers:
    return load_media(read_target_config(folder))


def load_reference(folder: Path, variant: str) -> Any:
    """Load the checkpoint in transformers. Its tensors must match transformers' exactly."""
    cls = getattr(transformers, f"Gemma4{'Unified' if variant == '12b' else ''}ForConditionalGeneration")
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    return model.eval()


def features(towers: MediaTowers, pixels: Array) -> Array:
    assert towers.vision is not None
    return np.array(towers.vision(mx.array(pixels))[0].astype(mx.float32))


def sound_features(towers: MediaTowers, frames: Array) -> Array:
    assert towers.audio is not None
    return np.array(towers.audio(mx.array(frames))[0].astype(mx.float32))


def reference_features(media: Media, pixels: Array, budget: int) -> Array:
    """Return transformers' features, with the padding to the budget that its image processor makes."""
    size, per_token = (48, 1) if media.variant == "12b" else (16, 9)
    patches = convert_image_to_patches(pixels.transpose(2, 0, 1), size)
    rows, columns = np.mgrid[: pixels.shape[0] // size, : pixels.shape[1] // size]
    positions = np.stack([columns.ravel(), rows.ravel()], axis=-1)
    patches, positions = pad_along_first_dim(patches, positions, budget * per_token)
    output = media.reference.get_image_features(torch.tensor(patches)[None], torch.tensor(positions)[None])
    rows_of_text: Array = output.pooler_output[0].numpy()
    return rows_of_text


def reference_sound_features(media: Media, frames: Array, padding: int) -> Array:
    """Return transformers' features of a clip with padding after it. The padding is not zero, so it must not count."""
    padded = np.concatenate([frames, np.ones((padding, frames.shape[1]), np.float32)])
    mask = torch.arange(len(padded))[None] < len(frames)
    output = media.reference.model.get_audio_features(torch.tensor(padded)[None], mask)
    rows_of_text: Array = output.pooler_output[output.attention_mask].numpy()
    return rows_of_text


def difference(ours: Array, reference: Array) -> float:
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max())


@pytest.mark.parametrize(("height", "width", "budget"), SIZES)
def test_pictures(media: Media, height: int, width: int, budget: int) -> None:
    check_picture(media, height, width, budget)


@pytest.mark.parametrize("variant", ["e2b", "12b", "26b"])
def test_the_largest_picture(variant: str, tiny_media: TinyMedia) -> None:
    """The tower of 31B is that of 26B."""
    check_picture(load_both(tiny_media(variant), variant), *LARGEST)


def check_picture(media: Media, height: int, width: int, budget: int) -> None:
    pixels = random_pixels(48 * height, 48 * width, seed=height)
    ours = features(media.towers, pixels)
    assert len(ours) == height * width
    assert 2 < np.abs(ours).max() < 10
    assert difference(ours, reference_features(media, pixels, budget)) < TOLERANCE


def test_flat_picture_without_tower(tiny_media: TinyMedia) -> None:
    """A patch of nearly one colour has almost no deviation, by which the norm of its pixels divides.

    In float32, transformers has an error of 4e-4 here.
    """
    folder = tiny_media("12b")
    exact = Media("12b", load(folder), load_reference(folder, "12b").double())
    pixels = np.full((96, 96, 3), 200 / 255, np.float32)
    pixels[::7, ::5] += 1 / 255
    assert difference(features(exact.towers, pixels), reference_features(exact, pixels, 70)) < TOLERANCE


@pytest.mark.parametrize("frames", FRAMES)
def test_clips(frames: int, audio: Callable[[str], Media]) -> None:
    media, mel = audio("e2b"), random_mel(frames, seed=frames)
    ours = sound_features(media.towers, mel)
    assert len(ours) == -(-frames // 4)
    assert 1 < np.abs(ours).max() < 10
    for padding in (0, 1, 50):
        assert difference(ours, reference_sound_features(media, mel, padding)) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 25, 750])
def test_clips_of_samples(frames: int, audio: Callable[[str], Media]) -> None:
    media, samples = audio("12b"), random_samples(frames)
    ours = sound_features(media.towers, samples)
    assert difference(ours, reference_sound_features(media, samples, padding=3)) < TOLERANCE


@pytest.fixture(scope="module")
def audio(tiny_media: TinyMedia) -> Callable[[str], Media]:
    """Return a function from a variant with audio to its media parts."""
    loaded: dict[str, Media] = {}

    def load_variant(variant: str) -> Media:
        if variant not in loaded:
            loaded[variant] = load_both(tiny_media(variant), variant)
        return loaded[variant]

    return load_variant


def test_no_audio(tiny_media: TinyMedia) -> None:
    assert load(tiny_media("26b")).audio is None


def test_epsilon_of_norms(tmp_path: Path) -> None:
    """A large epsilon reveals factors that norms would otherwise cancel, and norms with an epsilon of their own."""
    changes = {"rms_norm_eps": 0.1}
    for variant in VARIANTS:
        has_audio = variant in ("e2b", "12b")
        folder = make_media_target(tmp_path / variant, variant, vision=changes, audio=changes if has_audio else None)
        media = load_both(folder, variant)
        pixels = random_pixels(96, 144)
        assert difference(features(media.towers, pixels), reference_features(media, pixels, 70)) < TOLERANCE
        if has_audio:
            frames = random_samples(5) if variant == "12b" else random_mel(50)
            assert (
                difference(sound_features(media.towers, frames), reference_sound_features(media, frames, 9)) < TOLERANCE
            )


def test_shared_keys_and_other_settings(tmp_path: Path) -> None:
    """Settings that no published model has: fewer K/V heads than heads, another limit of activations, other factors."""
    vision_changes = {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 30.0, "rope_type": "axial"}}
    audio_changes = {"gradient_clipping": 2.0, "residual_weight": 0.3, "attention_logit_cap": 3.0}
    audio_changes |= {"conv_kernel_size": 3, "attention_chunk_size": 6, "attention_context_left": 7}
    media = load_both(make_media_target(tmp_path, "e2b", vision=vision_changes, audio=audio_changes), "e2b")
    pixels, mel = random_pixels(96, 144), random_mel(100)
    assert difference(features(media.towers, pixels), reference_features(media, pixels, 70)) < TOLERANCE
    assert difference(sound_features(media.towers, mel), reference_sound_features(media, mel, 9)) < TOLERANCE


def test_attention_in_parts(media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_pixels(96, 144)
    expected = features(media.towers, pixels)
    lengths: list[int] = []
    attention = mx.fast.scaled_dot_product_attention

    def counted(queries: mx.array, *args: Any, **options: Any) -> mx.array:
        lengths.append(queries.shape[2])
        return attention(queries, *args, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    # The scores of 54 patches, at 2 or 4 heads, and of a part of the queries.
    monkeypatch.setattr(vision, "SCORE_BYTES", 54 * 4 * 4 * 20)
    assert difference(features(media.towers, pixels), expected) < TOLERANCE
    per_layer = {"e2b": [20, 20, 14], "12b": []}.get(media.variant, [40, 14])
    assert lengths == per_layer * 3


# --- layouts ---------------------------------------------------------------------------------------------------------


def rewritten(source: Path, folder: Path, change: Callable[[str, mx.array], dict[str, mx.array]]) -> Path:
    """Copy a checkpoint with each tensor replaced by those that `change` makes of its name and values."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    mx.eval(tensors)
    changed = [change(name, tensor) for name, tensor in tensors.items()]
    mx.save_safetensors(str(file), {name: tensor for part in changed for name, tensor in part.items()})
    return folder


def assert_same_features(towers: MediaTowers, expected: MediaTowers, variant: str, tolerance: float = 0.0) -> None:
    pixels = random_pixels(96, 144)
    assert difference(features(towers, pixels), features(expected, pixels)) <= tolerance
    if expected.audio is not None:
        frames = random_samples(5) if variant == "12b" else random_mel(50)
        assert difference(sound_features(towers, frames), sound_features(expected, frames)) <= tolerance


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_mlx_and_its_order_of_convolutions(variant: str, tiny_media: TinyMedia, tmp_path: Path) -> None:
    def change(name: str, tensor: mx.array) -> dict[str, mx.array]:
        is_convolution = "conv" in name and tensor.ndim > 2
        tensor = mx.contiguous(mx.moveaxis(tensor, 1, -1)) if is_convolution else tensor
        return {name.removeprefix("model."): tensor}

    towers = load(rewritten(tiny_media(variant), tmp_path / "mlx", change))
    assert_same_features(towers, load(tiny_media(variant)), variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantized(variant: str, tiny_media: TinyMedia, tmp_path: Path) -> None:
    """A folder with quantized projections equals one with the dequantized weights. Some have other bits."""

    def parts(name: str, tensor: mx.array) -> tuple[str, mx.array, int] | None:
        module = name.removesuffix(".weight")
        is_block = module.endswith(".linear") or "embed_" in module
        if "language_model" in name or not name.endswith(".weight") or not is_block or tensor.shape[-1] % 32:
            return None
        return module, tensor, 4 if "embed_" in module else 8

    def quantize(name: str, tensor: mx.array) -> dict[str, mx.array]:
        found = parts(name, tensor)
        if found is None:
            return {name: tensor}
        module, weight, bits = found
        packed = mx.quantize(weight, group_size=32, bits=bits)
        return {f"{module}.{part}": x for part, x in zip(("weight", "scales", "biases"), packed, strict=True)}

    def round_off(name: str, tensor: mx.array) -> dict[str, mx.array]:
        found = parts(name, tensor)
        if found is None:
            return {name: tensor}
        _, weight, bits = found
        packed = mx.quantize(weight, group_size=32, bits=bits)
        return {name: mx.dequantize(*packed, group_size=32, bits=bits)}

    plain = rewritten(tiny_media(variant), tmp_path / "plain", round_off)
    quantized = rewritten(tiny_media(variant), tmp_path / "quantized", quantize)
    config = json.loads((quantized / "config.json").read_text())
    names = ("embed_vision.embedding_projection", "embed_audio.embedding_projection")
    config["quantization"] = {"group_size": 32, "bits": 8} | {name: {"group_size": 32, "bits": 4} for name in names}
    (quantized / "config.json").write_text(json.dumps(config))
    towers = load(quantized)
    assert towers.vision is not None
    assert any(name.endswith(".scales") for name in lazy_parameters(towers.vision))
    assert_same_features(towers, load(plain), variant, TOLERANCE)
    assert (
        difference(features(towers, pixels := random_pixels(96, 96)), features(load(tiny_media(variant)), pixels)) > 0
    )


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision(variant: str, dtype: mx.Dtype, tiny_media: TinyMedia, tmp_path: Path) -> None:
    """Features in 16 bits have that type and are close to those of the same weights in float32."""

    def cast(name: str, tensor: mx.array) -> dict[str, mx.array]:
        return {name: tensor.astype(dtype)}

    def rounded(name: str, tensor: mx.array) -> dict[str, mx.array]:
        return {name: tensor.astype(dtype).astype(mx.float32)}

    towers = load(rewritten(tiny_media(variant), tmp_path / "half", cast))
    exact = load(rewritten(tiny_media(variant), tmp_path / "exact", rounded))
    assert towers.vision is not None
    assert towers.vision(mx.array(random_pixels(48, 48))).dtype == dtype
    assert_same_features(towers, exact, variant, 0.5)
