"""Pictures and sounds as arrays, compared with the preprocessing of transformers."""

from pathlib import Path

import matplotlib
import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

from mlx_mtp.gemma4.vision import to_patches
from mlx_mtp.media.audio import log_mel, read_audio
from mlx_mtp.media.images import BUDGETS, fitted_size, read_image

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
DRAWING = Path(matplotlib.get_data_path()) / "sample_data" / "Minduka_Present_Blue_Pack.png"


def check_picture(image: Image.Image, budget: int) -> None:
    """Compare all values, their places in the grid, and the number of soft tokens. transformers adds rows of zeros."""
    expected = Gemma4ImageProcessorPil(max_soft_tokens=budget)([image], return_tensors="np")
    picture = read_image(image, budget=budget)
    squares = to_patches(mx.array(picture.values), 16)
    rows, columns, _ = squares.shape
    patches, count = np.array(squares.flatten(0, 1)), rows * columns
    assert picture.tokens == expected["num_soft_tokens_per_image"][0]
    assert np.array_equal(patches, expected["pixel_values"][0, :count])
    assert not expected["pixel_values"][0, count:].any()
    places = np.stack([np.tile(np.arange(columns), rows), np.repeat(np.arange(rows), columns)], axis=1)
    assert np.array_equal(expected["image_position_ids"][0, :count], places)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_photograph(budget: int) -> None:
    with Image.open(PHOTOGRAPH) as image:
        assert (image.height, image.width) == (600, 512)
        check_picture(image, budget)
        assert read_image(PHOTOGRAPH, budget=budget).digest == read_image(image, budget=budget).digest
    assert read_image(PHOTOGRAPH).tokens == 270


@pytest.mark.parametrize(
    ("height", "width"), [(300, 451), (3, 900), (900, 3), (1, 1), (768, 768), (1300, 977), (47, 49)]
)
def test_pictures_of_many_sizes(height: int, width: int) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    check_picture(Image.fromarray(pixels), 280)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_kinds_of_pixels(mode: str, tmp_path: Path) -> None:
    """transformers takes the transparency of a palette from the file, so the picture is one in a file."""
    file = tmp_path / "picture.tiff" if mode == "CMYK" else tmp_path / "picture.png"
    with Image.open(DRAWING) as image:
        assert image.mode == "RGBA"
        image.convert(mode).save(file)
    with Image.open(file) as image:
        assert image.mode == mode
        check_picture(image, 140)


def test_sizes() -> None:
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, np.log(8000), (4000, 2))).astype(int).tolist():
        for budget in BUDGETS:
            expected = get_aspect_ratio_preserving_size(height, width, 16, 9 * budget, 3)
            assert fitted_size(height, width, budget) == expected


def speech(count: int) -> NDArray[np.float32]:
    """Return harmonics whose strength and pitch change, with some noise."""
    rng = np.random.default_rng(count)
    time = np.arange(count) / 16_000
    phase = 2 * np.pi * (120 * time + 5 * np.sin(4 * time))
    voice = sum(np.sin(n * phase) / n for n in range(1, 20)) * (1 + np.sin(7 * time))
    sound: NDArray[np.float32] = (0.1 * voice + 0.01 * rng.standard_normal(count)).astype(np.float32)
    return sound


@pytest.mark.parametrize("count", [160, 161, 320, 640, 641, 4321, 16_000, 16_001, 100_000, 479_999, 480_000])
def test_log_mel_frames_bit_for_bit(count: int) -> None:
    samples = speech(count)
    expected = Gemma4AudioFeatureExtractor()([samples], return_tensors="np")
    valid = expected["input_features"][0][expected["input_features_mask"][0]]
    frames = log_mel(samples)
    assert frames.dtype == valid.dtype == np.float32
    assert frames.shape == valid.shape == (max((count - 161) // 160 + 1, 0), 128)
    assert np.array_equal(frames.view(np.uint32), valid.view(np.uint32))


@pytest.mark.parametrize("scale", [0, 1e-4, 1, 10])
def test_log_mel_frames_of_silence_and_noise(scale: float) -> None:
    samples = (scale * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)
    expected = Gemma4AudioFeatureExtractor()([samples], return_tensors="np")
    valid = expected["input_features"][0][expected["input_features_mask"][0]]
    assert np.array_equal(log_mel(samples).view(np.uint32), valid.view(np.uint32))


@pytest.mark.parametrize("count", [161, 640, 641, 16_000, 16_001, 480_000])
def test_raw_frames(count: int) -> None:
    samples = speech(count)
    expected = Gemma4UnifiedAudioFeatureExtractor()([samples], return_tensors="np")
    assert expected["input_features_mask"].all()
    assert np.array_equal(read_audio((samples, 16_000)).raw_frames(), expected["input_features"][0])
