"""Prompts with media: the prompt cache by content, chunks, K/V quantization, sampling, and all that is refused."""

import base64
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.distributions import chi_square
from support.tiny import make_drafter

import mlx_mtp
from mlx_mtp import MediaError, PromptError, Sampling
from mlx_mtp.decoding.prompt_media import PreparedPrompt
from mlx_mtp.errors import ContextLengthError

RATE = 16_000
CHOICES = [100, 200, 300, 400]


@pytest.fixture(scope="module")
def models(
    tiny_media: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], mlx_mtp.Model]]:
    """Return a function from a variant to a loaded pair with media. Each call begins with an empty prompt cache."""
    loaded: dict[str, mlx_mtp.Model] = {}

    def load(variant: str) -> mlx_mtp.Model:
        if variant not in loaded:
            drafter = make_drafter(tmp_path_factory.mktemp(variant), variant)
            loaded[variant] = mlx_mtp.load(tiny_media(variant), drafter)
        loaded[variant].prompt_cache.clear()
        return loaded[variant]

    yield load
    for model in loaded.values():
        model.close()


def picture(seed: int, side: int = 300) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def image(seed: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed), "max_soft_tokens": 70}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def clip(samples: int = 16_000) -> tuple[NDArray[np.float32], int]:
    return np.sin(np.arange(samples) / 10).astype(np.float32), RATE


def answer(model: mlx_mtp.Model, prompt: Any, **changes: Any) -> mlx_mtp.GenerationResult:
    return model.generate(prompt, max_tokens=12, ignore_eos=True, **({"num_draft_tokens": 2} | changes))


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_another_picture_of_the_same_size_is_another_prompt(
    models: Callable[[str], mlx_mtp.Model], variant: str
) -> None:
    model = models(variant)
    prompts = [[user("look: ", image(seed), "what is it?")] for seed in (0, 1)]
    alone = []
    for prompt in prompts:
        model.prompt_cache.clear()
        alone.append(answer(model, prompt))
    first, second = (model.prepare(prompt) for prompt in prompts)
    assert first.tokens == second.tokens
    assert alone[0].tokens != alone[1].tokens

    model.prompt_cache.clear()
    start = first.media.spans[0].start
    for seed in (0, 1, 0):
        found = answer(model, prompts[seed])
        assert found.tokens == alone[seed].tokens
        assert found.last.cached_tokens in (0, start, len(first.tokens) - 1)
    # The first picture's prompt was still in the cache, to its last token but one.
    assert found.last.cached_tokens == len(first.tokens) - 1


def test_the_second_turn_reuses_the_picture(models: Callable[[str], mlx_mtp.Model]) -> None:
    model = models("31b")
    messages = [user(image(0), "what is it?")]
    first = answer(model, messages)
    messages += [{"role": "assistant", "content": first.text}, user("and its colour?")]
    second = answer(model, messages)
    assert second.last.cached_tokens > model.prepare(messages).media.spans[0].end
    assert second.tokens == answer(model, messages, reuse_prompt=False).tokens


def test_a_picture_is_encoded_once(models: Callable[[str], mlx_mtp.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("31b")
    towers = model.parts.media.towers
    encoded: list[tuple[int, ...]] = []
    vision = towers.vision
    assert vision is not None

    def counted(pixels: mx.array) -> mx.array:
        encoded.append(pixels.shape)
        return vision(pixels)

    monkeypatch.setattr(towers, "vision", counted)
    for question in ("what is it?", "where?"):
        answer(model, [user(question, image(7))], reuse_prompt=False, prefill_step_size=32)
    assert len(encoded) == 1


def test_text_loads_no_tower(models: Callable[[str], mlx_mtp.Model]) -> None:
    model = models("12b")
    answer(model, [user("only text")])
    assert "towers" not in vars(model.parts.media)


@pytest.mark.parametrize("start", [0, 20, 1000])
def test_quantized_kv(models: Callable[[str], mlx_mtp.Model], start: int) -> None:
    """Quantization that should begin inside a picture begins at its end, whatever the chunks and drafts are."""
    model = models("31b")
    prompt = model.prepare([user("hello ", image(0), "what is it?", image(1))])
    span = prompt.media.spans[0]
    assert span.start < 20 < span.end or start != 20
    texts = {
        (k, step): answer(
            model,
            prompt,
            num_draft_tokens=k,
            prefill_step_size=step,
            kv_bits=8,
            kv_group_size=32,
            quantized_kv_start=start,
            reuse_prompt=False,
        ).tokens
        for k in (0, 3)
        for step in (512, 40, 16)
    }
    assert len({tuple(text) for text in texts.values()}) == 1


def test_scores_of_a_picture_are_computed_in_parts(
    models: Callable[[str], mlx_mtp.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture is one chunk, however long the context is. Its attention scores are kept below the limit."""
    model = models("31b")
    prompt = model.prepare([user("hello " * 30, image(0), "what is it?")])
    whole = answer(model, prompt, reuse_prompt=False, num_draft_tokens=0)
    rows: list[int] = []
    attention = mx.fast.scaled_dot_product_attention

    def counted(queries: mx.array, *args: Any, **options: Any) -> mx.array:
        rows.append(queries.shape[2])
        return attention(queries, *args, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    monkeypatch.setattr("mlx_mtp.gemma4.layers.SCORE_BYTES", 1)
    parts = answer(model, prompt, reuse_prompt=False, num_draft_tokens=0)
    assert parts.tokens == whole.tokens
    assert max(rows[: len(model.config.text.layers)]) <= 32


def test_sampled_text_has_the_target_s_distribution(models: Callable[[str], mlx_mtp.Model]) -> None:
    """The first three tokens after a picture: one of plain decoding, and two of a round with drafts."""
    model = models("e2b")
    prompt = model.prepare([user(image(0), "what is it?")])
    sampling = Sampling(temperature=1.0, logit_bias=dict.fromkeys(CHOICES, 60.0))
    expected = joint_distribution(model, prompt, sampling)
    draws = []
    accepted = 0
    for seed in range(400):
        result = model.generate(
            prompt,
            max_tokens=3,
            num_draft_tokens=2,
            ignore_eos=True,
            sampling=Sampling(temperature=1.0, logit_bias=sampling.logit_bias, seed=seed),
        )
        draws.append([CHOICES.index(token) for token in result.tokens])
        accepted += result.last.stats.accepted
    assert accepted > 80
    assert chi_square(np.array(draws), expected.reshape(-1), 4) < 1


def joint_distribution(model: mlx_mtp.Model, prompt: PreparedPrompt, sampling: Sampling) -> NDArray[np.float64]:
    """Return the chances of the sequences of three tokens, [4, 4, 4], from log probabilities of plain decoding."""

    def chances(before: list[int]) -> NDArray[np.float64]:
        after = PreparedPrompt(prompt.tokens + before, prompt.media)
        last = model.generate(
            after, max_tokens=1, num_draft_tokens=0, ignore_eos=True, sampling=sampling, logprobs=512
        ).last
        assert last.logprobs is not None
        found = dict(last.logprobs.top)
        # The log probabilities are those of the model, without the bias.
        shares: NDArray[np.float64] = np.exp([found[token] for token in CHOICES])
        shares /= shares.sum()
        return shares

    table = np.zeros((4, 4, 4))
    start = chances([])
    for i, first in enumerate(CHOICES):
        second = chances([first])
        for j, then in enumerate(CHOICES):
            table[i, j] = start[i] * second[j] * chances([first, then])
    return table


def test_values_of_parts(models: Callable[[str], mlx_mtp.Model], tmp_path: Path) -> None:
    """The same picture as a path, bytes, a data URL, a PIL image and an array is the same prompt."""
    model = models("31b")
    file = tmp_path / "picture.png"
    Image.fromarray(picture(3)).save(file)
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": value} for value in (picture(3), file, file.read_bytes(), Image.open(file), url)
    ]
    parts += [{"type": "image", "path": str(file)}, {"type": "image", "url": url}]
    parts += [{"type": "image_url", "image_url": {"url": url}}, {"type": "input_image", "image_url": url}]
    prompts = [model.prepare([user(part, "what is it?")]) for part in parts]
    assert {tuple(prompt.media.keys(prompt.tokens)) for prompt in prompts} == {
        tuple(prompts[0].media.keys(prompts[0].tokens))
    }
    assert model.encode([user(parts[0], "what is it?")]) == prompts[0].tokens
    detailed = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    assert model.prepare([user(detailed)]).media.spans[0].count <= 70 < prompts[0].media.spans[0].count <= 280


def test_video_is_frames_with_times(models: Callable[[str], mlx_mtp.Model], tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(seed)) for seed in range(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=61_000)
    model = models("31b")
    prompt = model.prepare([user({"type": "video", "video": tmp_path / "clip.gif"}, "what happens?")])
    assert len(prompt.media.spans) == 3
    assert all(span.count <= 70 for span in prompt.media.spans)
    tokens = [token for token in prompt.tokens if token < 500]
    assert "00:00  01:01  02:02 what" in model.tokenizer.decode(tokens)
    answer(model, prompt)


def test_processor_config_has_the_default_budget(tiny_media: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_media("31b"), tmp_path / "target")
    (folder / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 140}}')
    with mlx_mtp.load(folder, None) as model:
        (span,) = model.prepare([user({"type": "image", "image": picture(0)})]).media.spans
        assert 70 < span.count <= 140


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "image", "image": 5}], r"messages\[0\]\.content\[0\]: expected a path, bytes, a PIL image"),
        (["hi", {"type": "image", "path": "no.png"}], r"messages\[0\]\.content\[1\]: no\.png: "),
        ([{"type": "image"}], r"messages\[0\]\.content\[0\]: expected exactly one of the fields image, path, url"),
        ([{"type": "image", "image": b"GIF", "path": "x"}], r"expected exactly one of the fields image, path, url"),
        ([image(0) | {"max_soft_tokens": 100}], r"max_soft_tokens: expected one of 70, 140, 280, 560, 1120, found 100"),
        ([{"type": "image", "url": "https://example.org/a.png"}], r"found an address: nothing is fetched"),
        ([{"type": "image", "url": "data:image/png;base64,????"}], r"not base64"),
        ([{"type": "image_url", "image_url": {"url": ""}}], r"image_url: expected the data of a medium"),
        ([{"type": "image_url", "image_url": {"url": "x", "detail": "best"}}], r"detail: expected one of low, auto"),
        ([{"type": "audio", "audio": clip(100)}], r"expected at least 161 samples"),
        ([{"type": "audio", "audio": clip(500_000)}], r"expected at most 30 seconds"),
        (
            [{"type": "Image", "image": b"GIF"}],
            r"content\[0\]: expected text, or a part whose type is one of text, image",
        ),
        ([5], r"content\[0\]: expected text, or a part whose type is one of .*found 5"),
        ([{"type": "image", "image": ""}], r"content\[0\]: expected a path, found an empty text"),
        (["see <|image|>"], r"messages\[0\]: <\|image\|> stands for media"),
        (["see <|im", "age|>"], r"the prompt: <\|image\|> stands for media"),
        ([image(0), "<|ima", "ge>"], r"the prompt: <\|image> stands for media"),
        ([image(0) | {"max_soft_token": 70}], r"content\[0\]: expected the fields type, .* found 'max_soft_token'"),
        (
            [{"type": "audio", "audio": clip(), "max_soft_tokens": 70}],
            r"expected the fields .* found 'max_soft_tokens'",
        ),
        ([{"type": "video", "video": b"GIF", "fps": "a"}], r"fps: expected a positive number, found 'a'"),
        ([{"type": "video", "video": b"GIF", "fps": 0}], r"fps: expected a positive number, found 0"),
    ],
)
def test_refused_parts(models: Callable[[str], mlx_mtp.Model], parts: list[Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        models("e2b").prepare([user(*parts)])


def test_content_of_another_type(models: Callable[[str], mlx_mtp.Model]) -> None:
    """A picture in it would be lost."""
    with pytest.raises(PromptError, match=r"messages\[0\]\.content: expected text or a list of parts, found generator"):
        models("e2b").prepare([{"role": "user", "content": (part for part in [image(0)])}])


def test_refused_uses(models: Callable[[str], mlx_mtp.Model], tmp_path: Path) -> None:
    model = models("31b")
    with pytest.raises(PromptError, match=r"found audio, but this checkpoint reads only text, image, video"):
        model.prepare([user({"type": "audio", "audio": clip()})])
    with pytest.raises(PromptError, match=r"messages\[0\].content\[0\]: media must be in a user's message"):
        model.prepare([{**user(image(0)), "role": "assistant"}])
    with pytest.raises(PromptError, match=r"the prompt: <image\|> stands for media"):
        model.prepare("a <image|> b")
    with pytest.raises(PromptError, match=r"the prompt holds token \d+, the place of a medium"):
        model.generate(model.encode([user(image(0))]))
    with pytest.raises(PromptError, match=r"the prompt has media that another model has read"):
        models("e2b").generate(model.prepare([user(image(0))]))
    with pytest.raises(PromptError, match="a prompt with media cannot be saved"):
        model.save_prompt([user(image(0))], tmp_path / "prompt.safetensors")
    with pytest.raises(ContextLengthError):
        answer(model, [user(*[image(0)] * 70)])


def test_a_template_without_media(tiny_media: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_media("31b"), tmp_path / "target")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['role'] }}")
    with mlx_mtp.load(folder, None) as model, pytest.raises(PromptError, match="the chat template wrote places for"):
        model.prepare([user(image(0))])


def test_a_checkpoint_of_text_reads_marks_as_text(tiny_pair: Callable[[str], Path]) -> None:
    with mlx_mtp.load(tiny_pair("31b") / "target", None) as model:
        assert model.encode([user("see <|image|>")])
        with pytest.raises(PromptError, match=r"found image, but this checkpoint reads only text"):
            model.prepare([user(image(0))])


def test_parts_without_tensors_are_not_there(tiny_media: Callable[[str], Path], tmp_path: Path) -> None:
    """mlx-lm's conversions have the config of the parts, and not their tensors."""
    folder = shutil.copytree(tiny_media("e2b"), tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "vision" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with mlx_mtp.load(folder, None) as model:
        assert model.prepare([user({"type": "audio", "audio": clip()})]).media.spans
        with pytest.raises(PromptError, match="found image, but this checkpoint reads only text, audio"):
            model.prepare([user(image(0))])


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json"])
def test_token_ids_need_no_files(tiny_media: Callable[[str], Path], tmp_path: Path, gone: str) -> None:
    folder = shutil.copytree(tiny_media("31b"), tmp_path / "target")
    with mlx_mtp.load(folder, None) as model:
        (folder / gone).unlink()
        assert model.generate([2, 100, 200], max_tokens=2, num_draft_tokens=0, ignore_eos=True).tokens


def test_a_broken_picture_is_named(models: Callable[[str], mlx_mtp.Model], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(MediaError, match=r"messages\[0\]\.content\[0\]: .*broken\.png: "):
        models("31b").prepare([user({"type": "image", "path": tmp_path / "broken.png"})])


@pytest.mark.parametrize("variant", ["e2b", "12b", "26b", "31b"])
def test_texts_with_media_decode_together(models: Callable[[str], mlx_mtp.Model], variant: str) -> None:
    """Each text is what it is alone: pictures of one size, several of them, a sound, and none."""
    model = models(variant)
    sound = {"type": "audio", "audio": clip()}
    prompts: list[Any] = [
        [user("look: ", image(0), "what is it?")],
        [user("look: ", image(1), "what is it?")],
        "def read_config(path):",
        [user(image(1), "and ", image(2), "differ?")],
        [user("hear: ", sound if variant in ("e2b", "12b") else image(3), "who is it?")],
    ]
    coupled = Sampling(temperature=0.8, acceptance="coupled", seed=4)
    lengths: list[tuple[int | Literal["auto"], Sampling]]
    lengths = [(2, Sampling()), (0, coupled), ("auto", Sampling()), (8, coupled), (3, Sampling())]
    options = [
        mlx_mtp.GenerationOptions(max_tokens=12, ignore_eos=True, num_draft_tokens=k, sampling=sampling)
        for k, sampling in lengths
    ]
    alone = []
    for prompt, chosen in zip(prompts, options, strict=True):
        model.prompt_cache.clear()
        alone.append(model.generate(prompt, chosen).tokens)
    assert alone[0] != alone[1]
    for concurrency in (3, 5):
        model.prompt_cache.clear()
        results = model.generate_batch(prompts, options, concurrency=concurrency)
        assert [result.tokens for result in results] == alone
