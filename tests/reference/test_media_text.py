"""Prompts with media against transformers in float32: token positions, logits after the prompt, and greedy text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from support.quiet_torch import quiet_torch
from support.tiny import VARIANTS, make_drafter
from support.tiny_media import MEDIA_IDS, make_media_target
from transformers.models.gemma4.image_processing_pil_gemma4 import convert_image_to_patches, pad_along_first_dim
from transformers.models.gemma4_unified import modeling_gemma4_unified

import mlx_mtp
from mlx_mtp.decoding.prompt_media import PreparedPrompt
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.media.audio import read_audio
from mlx_mtp.media.images import read_image
from mlx_mtp.media.video import read_video

# The logits are about 5.
TOLERANCE = 3e-4
MAX_TOKENS = 40
BUDGET = 70
RATE = 16_000


@dataclass(frozen=True)
class Case:
    """A pair of one variant, and the same target in transformers."""

    variant: str
    model: mlx_mtp.Model
    reference: Any


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_torch():
        yield


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    variant = request.param
    folder = make_media_target(tmp_path_factory.mktemp("media") / "target", variant)
    drafter = make_drafter(folder.parent / "drafter", variant)
    cls = getattr(transformers, f"Gemma4{'Unified' if variant == '12b' else ''}ForConditionalGeneration")
    reference = cls.from_pretrained(folder, dtype=torch.float32).eval()
    with mlx_mtp.load(folder, drafter) as model:
        yield Case(variant, model, reference)


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / 40
    waves = np.sin(rows[..., None] * [1, 2, 3] + columns[..., None] * [3, 1, 2] + seed)
    pixels: NDArray[np.uint8] = np.clip(128 + 80 * waves + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(
        np.uint8
    )
    return pixels


def sound(samples: int, seed: int) -> tuple[NDArray[np.float32], int]:
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(samples) / RATE * 2 * np.pi * (300 + 100 * seed))
    return (0.3 * wave + rng.normal(0, 0.05, samples)).astype(np.float32), RATE


IMAGE: dict[str, Any] = {"type": "image", "image": picture(300, 500, 0), "max_soft_tokens": BUDGET}
OTHER: dict[str, Any] = {"type": "image", "image": picture(400, 200, 1), "max_soft_tokens": BUDGET}
CLIP: dict[str, Any] = {"type": "audio", "audio": sound(9000, 0)}
SHORT_CLIP: dict[str, Any] = {"type": "audio", "audio": sound(3001, 1)}
PROMPTS = {
    "one picture": [IMAGE],
    "two pictures": [IMAGE, {"type": "text", "text": "and then"}, OTHER],
    "two clips": [CLIP, SHORT_CLIP],
    "picture and clip": [OTHER, CLIP],
}


def messages(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "tell me about it"}]}]


def reads(case: Case, parts: Sequence[dict[str, Any]]) -> bool:
    return case.variant in ("e2b", "12b") or all(part["type"] != "audio" for part in parts)


def reference_inputs(case: Case, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return transformers' inputs for media, with the padding that its processors make."""
    size, per_token = (48, 1) if case.variant == "12b" else (16, 9)
    inputs: dict[str, Any] = {}
    pictures = [read_image(part["image"], budget=BUDGET).pixels for part in parts if part["type"] == "image"]
    for part in parts:
        if part["type"] == "video":
            pictures += [frame.pixels for frame in read_video(part["video"]).frames]
    if pictures:
        patches, positions = [], []
        for pixels in pictures:
            rows, columns = np.mgrid[: pixels.shape[0] // size, : pixels.shape[1] // size]
            places = np.stack([columns.ravel(), rows.ravel()], axis=-1)
            cut = convert_image_to_patches(pixels.transpose(2, 0, 1).astype(np.float32) / 255, size)
            padded, padded_places = pad_along_first_dim(cut, places, BUDGET * per_token)
            patches.append(padded)
            positions.append(padded_places)
        inputs |= {
            "pixel_values": torch.tensor(np.stack(patches)),
            "image_position_ids": torch.tensor(np.stack(positions)),
        }
    clips = [read_audio(part["audio"]) for part in parts if part["type"] == "audio"]
    if clips:
        frames = [clip.raw_frames() if case.variant == "12b" else clip.log_mel() for clip in clips]
        longest = max(map(len, frames))
        inputs["input_features"] = torch.tensor(
            np.stack([np.pad(each, ((0, longest - len(each)), (0, 0))) for each in frames])
        )
        inputs["input_features_mask"] = torch.tensor([[i < len(each) for i in range(longest)] for each in frames])
    return inputs


def reference_logits(case: Case, tokens: list[int], inputs: dict[str, Any]) -> NDArray[np.float32]:
    """Return transformers' logits after each token.

    This version of transformers cannot read a video. Its frames are pictures, so they stand here as pictures.
    """
    ids = torch.tensor([tokens])
    ids[ids == MEDIA_IDS["video_token_id"]] = MEDIA_IDS["image_token_id"]
    kinds = (ids == MEDIA_IDS["image_token_id"]).int() + 3 * (ids == MEDIA_IDS["audio_token_id"]).int()
    if case.variant == "12b":
        # The forward of transformers' class for 12B lets pictures see both ways in full layers too, and ignores the
        # window. Its own masks for compiled generation are right, and are those of the other classes.
        unified = modeling_gemma4_unified
        inputs = inputs | {
            "attention_mask": unified.create_masks_for_vision_model(
                config=case.reference.config.text_config,
                inputs_embeds=torch.zeros(1, len(tokens), case.reference.config.text_config.hidden_size),
                attention_mask=None,
                past_key_values=None,
                position_ids=torch.arange(len(tokens))[None],
                block_sequence_ids=unified.get_block_sequence_ids_for_mask(kinds, ids.device),
            )
        }
    output = case.reference(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **inputs)
    logits: NDArray[np.float32] = output.logits[0].numpy()
    return logits


def assert_greedy(case: Case, text: list[int], prompt: list[int], inputs: dict[str, Any]) -> None:
    """Assert that `text` is transformers' greedy text after the prompt.

    A row of logits depends on the tokens before it alone. So one pass over the prompt and the whole text has the same
    rows as a pass for each token, and each token must be the best of its row.
    """
    rows = reference_logits(case, prompt + text[:-1], inputs)[len(prompt) - 1 :]
    assert text == rows.argmax(axis=-1).tolist()


def logits_after(case: Case, prompt: PreparedPrompt, step: int) -> NDArray[np.float32]:
    target = case.model.target
    stream = Stream(target, None, max_draft_tokens=0, media=prompt.media)
    return np.array(target.soft_cap(stream.read(prompt.tokens, step))[0].astype(mx.float32))


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_after_the_prompt(case: Case, name: str) -> None:
    """The chunks of 17 rows are shorter than a picture of 70 soft tokens, and the window is 16."""
    parts = PROMPTS[name]
    if not reads(case, parts):
        with pytest.raises(mlx_mtp.PromptError, match="this checkpoint reads only text, image, video"):
            case.model.prepare(messages(parts))
        return
    prompt = case.model.prepare(messages(parts))
    expected = reference_logits(case, prompt.tokens, reference_inputs(case, parts))[-1]
    assert np.abs(expected).max() > 1
    for step in (512, 64, 17):
        assert np.abs(logits_after(case, prompt, step) - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_text(case: Case, name: str) -> None:
    parts = PROMPTS[name]
    if not reads(case, parts):
        return
    prompt = case.model.prepare(messages(parts))
    texts = []
    for k in (0, 1, 4):
        for step in (512, 64, 17):
            result = case.model.generate(
                prompt,
                max_tokens=MAX_TOKENS,
                num_draft_tokens=k,
                prefill_step_size=step,
                ignore_eos=True,
                reuse_prompt=False,
            )
            assert len(result.tokens) == MAX_TOKENS
            texts.append(result.tokens)
    assert all(text == texts[0] for text in texts)
    assert_greedy(case, texts[0], prompt.tokens, reference_inputs(case, parts))


def test_video(case: Case, tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(picture(200, 300, number)).save(tmp_path / f"{number}.png")
    parts = [{"type": "video", "video": tmp_path, "fps": 0.5}]
    prompt = case.model.prepare(messages(parts))
    inputs = reference_inputs(case, parts)
    expected = reference_logits(case, prompt.tokens, inputs)[-1]
    assert np.abs(logits_after(case, prompt, 64) - expected).max() < TOLERANCE
    text = case.model.generate(prompt, max_tokens=10, num_draft_tokens=2, ignore_eos=True).tokens
    assert len(text) == 10
    assert_greedy(case, text, prompt.tokens, inputs)
