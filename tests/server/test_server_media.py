"""Pictures and sounds in requests, with the official clients: the answers are those of the model itself."""

import asyncio
import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
import soundfile
from PIL import Image
from support.pictures import encoded
from support.serving import Served, post, serve
from support.tiny import FIRST_TEXT_ID
from support.tiny_media import random_pixels

import mlx_mtp
from mlx_mtp import DEMO_PAIR, GenerationOptions, Model, media_reader
from mlx_mtp.media import images, sources

MAX_TOKENS = 12
QUESTION = {"type": "text", "text": "What is this?"}
RATE = 16_000
KEY = "any"
# Marks of thoughts, calls and turns would not be in the text of an answer, so they are never chosen.
WORDS_ONLY = mlx_mtp.Sampling(logit_bias=dict.fromkeys(range(FIRST_TEXT_ID), -1000.0))
OPTIONS = GenerationOptions(max_tokens=MAX_TOKENS, sampling=WORDS_ONLY)


def picture(seed: int, height: int = 40, width: int = 60) -> bytes:
    pixels = (255 * random_pixels(height, width, seed)).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def sound(format: str) -> bytes:
    stream = BytesIO()
    wave = 0.3 * np.sin(np.arange(4000) / RATE * 2 * np.pi * 440)
    soundfile.write(stream, wave, RATE, format=format)
    return stream.getvalue()


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64_text(data)}"


PICTURE = picture(0)
IMAGE_URL: dict[str, Any] = {"type": "image_url", "image_url": {"url": url_of(PICTURE), "detail": "low"}}
INPUT_IMAGE: dict[str, Any] = {"type": "input_image", "image_url": url_of(PICTURE), "detail": "low"}
IMAGE_BLOCK: dict[str, Any] = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": base64_text(PICTURE)},
}
# The same parts for the model itself. Anthropic's API has no field for the detail.
OWN_LOW = {"type": "image", "image": PICTURE, "max_soft_tokens": 70}
OWN_DEFAULT = {"type": "image", "image": PICTURE}


@pytest.fixture(scope="module")
def folder(tiny_media: Callable[[str], Path]) -> Path:
    # This variant is fast: it has no network of its own for pictures.
    return tiny_media("12b")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serve(lambda: mlx_mtp.load(folder), OPTIONS, max_waiting=60, max_body_bytes=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with mlx_mtp.load(folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.v1, api_key=KEY, max_retries=0) as found:
        yield found


def own_answer(model: Model, *parts: Any, tokens: int = MAX_TOKENS) -> tuple[str, int]:
    """Return the model's own answer to one message, and the number of prompt tokens."""
    prompt = model.prepare([{"role": "user", "content": list(parts)}])
    return model.generate(prompt, OPTIONS, max_tokens=tokens, reuse_prompt=False).text, len(prompt.tokens)


def ask(client: openai.OpenAI, *parts: Any, **options: Any) -> tuple[str, int]:
    messages: Any = [{"role": "user", "content": list(parts)}]
    answer = client.chat.completions.create(model="pair", messages=messages, **options)
    assert answer.usage is not None
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens


def test_a_chat_about_a_picture(client: openai.OpenAI, model: Model) -> None:
    answer = ask(client, IMAGE_URL, QUESTION)
    assert answer == own_answer(model, OWN_LOW, QUESTION)
    assert answer[0] != ask(client, QUESTION)[0]
    plain = {"type": "image_url", "image_url": url_of(PICTURE)}
    assert ask(client, QUESTION, plain) == own_answer(model, QUESTION, OWN_DEFAULT)


def test_pictures_and_texts_keep_their_order(client: openai.OpenAI, model: Model) -> None:
    other = {"type": "image_url", "image_url": {"url": url_of(picture(1, 90, 30)), "detail": "low"}}
    own = {"type": "image", "image": picture(1, 90, 30), "max_soft_tokens": 70}
    first, second = ({"type": "text", "text": text} for text in ("One: ", "Two: "))
    assert ask(client, first, IMAGE_URL, second, other) == own_answer(model, first, OWN_LOW, second, own)


@pytest.mark.parametrize(("detail", "budget"), [("low", 70), ("auto", 280), ("high", 560), ("original", 1120)])
def test_the_detail_decides_the_tokens(client: openai.OpenAI, detail: str, budget: int) -> None:
    """A square picture takes nearly the whole budget: 8 x 8, 16 x 16, 23 x 23 and 33 x 33 tokens."""
    square = url_of(picture(0, 48, 48))
    part = {"type": "image_url", "image_url": {"url": square, "detail": detail}}
    without = ask(client, QUESTION, max_tokens=1)[1]
    # The marks before and after the picture are two more tokens.
    assert ask(client, part, QUESTION, max_tokens=1)[1] - without - 2 == int(budget**0.5) ** 2


@pytest.mark.parametrize("format", ["wav", "mp3"])
def test_a_chat_about_a_sound(client: openai.OpenAI, model: Model, format: str) -> None:
    data = sound(format.upper())
    part = {"type": "input_audio", "input_audio": {"data": base64_text(data), "format": format}}
    own = {"type": "audio", "audio": data}
    assert ask(client, part, QUESTION) == own_answer(model, own, QUESTION)


def test_a_stream(client: openai.OpenAI, model: Model) -> None:
    messages: Any = [{"role": "user", "content": [IMAGE_URL, QUESTION]}]
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="pair", messages=messages, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expected, count = own_answer(model, OWN_LOW, QUESTION)
    assert text == expected
    assert chunks[-1].usage.prompt_tokens == count


def test_a_later_question_reads_the_picture_from_the_cache(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [IMAGE_URL, QUESTION]}]
    first = client.chat.completions.create(model="pair", messages=messages)
    messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model="pair", messages=messages)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    # The cache goes back to the last snapshot at most, which is after the picture.
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens - 1


def test_responses(client: openai.OpenAI, model: Model) -> None:
    text = {"type": "input_text", "text": QUESTION["text"]}
    items: Any = [{"role": "user", "content": [INPUT_IMAGE, text]}]
    answer = client.responses.create(model="pair", input=items)
    assert answer.usage is not None
    assert (answer.output_text, answer.usage.input_tokens) == own_answer(model, OWN_LOW, QUESTION)
    clip = {"type": "input_audio", "input_audio": {"data": base64_text(sound("WAV")), "format": "wav"}}
    answer = client.responses.create(model="pair", input=[{"role": "user", "content": [clip, text]}])  # type: ignore[misc,list-item]
    assert answer.output_text == own_answer(model, {"type": "audio", "audio": sound("WAV")}, QUESTION)[0]


def test_anthropic(served: Served, model: Model) -> None:
    by_url = {"type": "image", "source": {"type": "url", "url": url_of(PICTURE)}}
    expected, count = own_answer(model, OWN_DEFAULT, QUESTION)
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as asker:
        for block in (IMAGE_BLOCK, by_url):
            messages: Any = [{"role": "user", "content": [block, QUESTION]}]
            answer = asker.messages.create(model="any", max_tokens=MAX_TOKENS, messages=messages)
            assert answer.content[0].text == expected  # type: ignore[union-attr]
            assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == count
            assert asker.messages.count_tokens(model="any", messages=messages).input_tokens == count
        # The texts of a turn are lines, also beside a picture. The answer continues a given beginning.
        messages = [
            {"role": "user", "content": [QUESTION, QUESTION, IMAGE_BLOCK]},
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "content": "It"},
        ]
        answer = asker.messages.create(model="any", max_tokens=MAX_TOKENS, messages=messages)
    lines = {"type": "text", "text": f"{QUESTION['text']}\n{QUESTION['text']}"}
    prompt = model.prepare([{"role": "user", "content": [lines, OWN_DEFAULT, {"type": "text", "text": "Well?"}]}])
    prompt = prompt.with_tokens(model.tokenizer.encode("It", add_special_tokens=False))
    assert answer.content[0].text == model.generate(prompt, OPTIONS).text  # type: ignore[union-attr]


def test_50_at_once(served: Served, model: Model) -> None:
    """No picture is mixed up with another one of the same size."""
    pictures = [picture(seed) for seed in range(50)]
    expected = [own_answer(model, OWN_LOW | {"image": data}, QUESTION, tokens=6)[0] for data in pictures]
    assert len(set(expected)) > 40

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.v1, api_key=KEY, max_retries=0) as client:

            async def one(data: bytes) -> str:
                part = {"type": "image_url", "image_url": {"url": url_of(data), "detail": "low"}}
                messages: Any = [{"role": "user", "content": [part, QUESTION]}]
                answer = await client.chat.completions.create(model="pair", messages=messages, max_tokens=6)
                return answer.choices[0].message.content or ""

            return await asyncio.gather(*map(one, pictures))

    assert asyncio.run(ask_all()) == expected


def image_url(url: str, **other: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **other}}


def audio(data: Any, **other: Any) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, **other}}


NOTHING_IS_FETCHED = "expected data:image/...;base64,... (nothing is fetched, and no file is opened), found "
URL_PLACE = "messages[0].content[1].image_url.url"
AUDIO_PLACE = "messages[0].content[1].input_audio.data"
DETAILS = "Input should be 'low', 'auto', 'high' or 'original', found "
# The second part of a user's message, the named field, and the message about it.
BAD_PARTS: list[tuple[dict[str, Any], str, str]] = [
    (image_url("https://example.com/a.png"), URL_PLACE, f"{NOTHING_IS_FETCHED}'https://example.com/a.png'"),
    (image_url("file:///etc/passwd"), URL_PLACE, NOTHING_IS_FETCHED),
    (image_url("/etc/passwd"), URL_PLACE, NOTHING_IS_FETCHED),
    (image_url(""), URL_PLACE, NOTHING_IS_FETCHED),
    (image_url("data:text/plain;base64,aGVsbG8="), URL_PLACE, NOTHING_IS_FETCHED),
    (image_url("data:image/png,hello"), URL_PLACE, NOTHING_IS_FETCHED),
    (image_url("data:image/png;base64,a"), URL_PLACE, "expected base64: "),
    (image_url("data:image/png;base64,%%%%"), URL_PLACE, "expected base64: "),
    (image_url("data:image/png;base64,äöü"), URL_PLACE, "expected base64: "),
    (image_url("data:image/png;base64,"), URL_PLACE, "expected the bytes of a file in base64, found 0 bytes"),
    (image_url(url_of(PICTURE), detail="best"), "messages[0].content[1].image_url.detail", DETAILS + "'best'"),
    ({"type": "image_url", "image_url": "/etc/passwd"}, "messages[0].content[1].image_url", NOTHING_IS_FETCHED),
    ({"type": "image_url", "image_url": {"url": 1}}, URL_PLACE, "Input should be a valid bytes, found '1'"),
    (audio("a"), AUDIO_PLACE, "expected base64: "),
    (audio(""), AUDIO_PLACE, "expected the bytes of a file in base64, found 0 bytes"),
    (audio("/etc/passwd"), AUDIO_PLACE, "expected base64: "),
    (audio("aGVsbG8=", format="wma"), "messages[0].content[1].input_audio.format", "Input should be 'wav', 'mp3'"),
]


@pytest.mark.parametrize(("part", "param", "message"), BAD_PARTS)
def test_bad_parts(served: Served, part: Any, param: str, message: str) -> None:
    error = refused(served, "chat/completions", {"messages": [{"role": "user", "content": [QUESTION, part]}]})
    assert (error["code"], error["param"]) == ("invalid_value", param)
    assert error["message"].startswith(f"{param}: {message}")


def refused(served: Served, path: str, body: dict[str, Any], status: int = 400) -> Any:
    answer = post(f"{served.v1}/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


# The second part of a user's message whose data is read only when the prompt is, and the message about it.
UNREADABLE: list[tuple[dict[str, Any], str]] = [
    (image_url(url_of(b"hello")), "format: expected one of "),
    (image_url(url_of(PICTURE[: len(PICTURE) // 2])), "expected data that can be decoded, found damaged or truncated"),
    (image_url(url_of(b"<svg/>").replace("png", "svg+xml")), "format: expected one of "),
    (audio(base64_text(b"hello")), "expected a sound in a format of libsndfile"),
    (audio(base64_text(PICTURE), format="mp3"), "expected a sound in a format of libsndfile"),
]


@pytest.mark.parametrize(("part", "message"), UNREADABLE)
@pytest.mark.parametrize("stream", [False, True])
def test_unreadable_data(served: Served, part: Any, message: str, stream: bool) -> None:
    """The place is that in the request, also where the model's own messages have other indices."""
    system = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}]
    asked = {"role": "user", "content": [QUESTION, part]}
    error = refused(served, "chat/completions", {"messages": [*system, asked], "stream": stream})
    assert (error["code"], error["param"]) == ("invalid_value", "messages")
    assert error["message"].startswith(f"messages[2].content[1]: {message}")
    if part["type"] == "image_url":
        part = {"type": "input_image", "image_url": part["image_url"]["url"]}
    items = [{"type": "reasoning"}, {"role": "user", "content": [part]}]
    error = refused(served, "responses", {"input": items, "instructions": "A", "stream": stream})
    assert (error["code"], error["param"]) == ("invalid_value", "input")
    assert error["message"].startswith(f"input[1].content[0]: {message}")


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
@pytest.mark.parametrize("part", [IMAGE_URL, audio(base64_text(sound("WAV")))], ids=["image", "audio"])
def test_only_users_have_media(served: Served, role: str, part: Any) -> None:
    message = {"role": role, "content": ["x", part], "tool_call_id": "c"}
    error = refused(served, "chat/completions", {"messages": [message]})
    assert error["param"] == "messages[0]"
    expected = "content[1]: expected text, as only user messages have media, found role"
    assert f"{expected} {role}" in error["message"]
    if role != "tool":
        item = {"role": role, "content": [part]}
        error = refused(served, "responses", {"input": [item]})
        assert error["param"] == "input[0]"
        assert f"only user messages have media, found role {role}" in error["message"]


@pytest.mark.parametrize(("path", "name"), [("chat/completions", "messages"), ("responses", "input")])
def test_parts_of_unknown_types(served: Served, path: str, name: str) -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGk="}}
    error = refused(served, path, {name: [{"role": "user", "content": [part]}]})
    assert error["param"] == f"{name}[0].content[0]"
    assert error["message"] == (
        f"{name}[0].content[0]: expected the type 'text', 'input_text', 'output_text', 'image_url', 'input_image', "
        "'input_audio', 'refusal', 'thinking', 'reasoning', 'redacted_thinking', found 'video_url'"
    )


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
@pytest.mark.parametrize("field", ["image", "images", "videos"])
def test_media_beside_the_content_are_not_lost(served: Served, path: str, field: str) -> None:
    name = "input" if path == "responses" else "messages"
    body = {name: [{"role": "user", "content": "x", field: ["aGk="]}], "max_tokens": 4}
    answer = post(f"{served.v1}/{path}", json=body)
    assert answer.status_code == 400
    assert f"{name}[0].{field}: expected media as parts of the content" in answer.json()["error"]["message"]
    assert post(f"{served.v1}/{path}", json={**body, name: [{"role": "user", "content": "x", field: []}]}).is_success


def test_results_of_calls_have_no_media(served: Served) -> None:
    output = {"type": "function_call_output", "call_id": "c", "output": [INPUT_IMAGE]}
    assert refused(served, "responses", {"input": [output]})["param"] == "input[0].output[0].type"


SOURCE = "messages[0].content[0].source"
IN_TEXT_ONLY = "expected text, or an image in a user's message outside tool results, found a block of type image"
CALL = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE_BLOCK]}
HALF = base64_text(PICTURE[:99])


def source(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image", "source": fields}]}]}


# A picture that is cut off.
HALF_BLOCK = {"type": "image", "source": IMAGE_BLOCK["source"] | {"data": HALF}}


BAD_BLOCKS: list[tuple[dict[str, Any], str]] = [
    (source(type="url", url="https://example.com/a.png"), f"{SOURCE}.url: {NOTHING_IS_FETCHED}"),
    (source(type="file", file_id="f"), f"{SOURCE}: expected the type 'base64', 'url', found 'file'"),
    (source(type="base64", media_type="text/plain", data="aGk="), f"{SOURCE}.media_type: expected image/..., found "),
    (source(type="base64", media_type="image/png", data="a"), f"{SOURCE}.data: expected base64: "),
    (source(type="base64", media_type="image/png", data=""), f"{SOURCE}.data: expected the bytes of a file in base64"),
    (source(type="base64", media_type="image/png"), f"missing required parameter: '{SOURCE}.data'"),
    (source(type="base64", media_type="image/png", data="aGVsbG8="), "messages[0].content[0]: format: expected one of"),
    (
        {
            "system": "A",
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "user", "content": [QUESTION, HALF_BLOCK]},
            ],
        },
        "messages[1].content[1]: expected",
    ),
    ({"messages": [{"role": "user", "content": "x"}, CALL, {"role": "user", "content": [RESULT]}]}, IN_TEXT_ONLY),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": [IMAGE_BLOCK]}]}, IN_TEXT_ONLY),
    (
        {"messages": [{"role": "assistant", "content": [IMAGE_BLOCK]}, {"role": "user", "content": "x"}]},
        "messages[0].content[0]: a block of type image cannot be in a message of role assistant",
    ),
    ({"system": [IMAGE_BLOCK], "messages": [{"role": "user", "content": "x"}]}, "system[0].type: "),
]


@pytest.mark.parametrize(("body", "message"), BAD_BLOCKS)
@pytest.mark.parametrize("path", ["messages", "messages/count_tokens"])
def test_bad_blocks(served: Served, body: Any, message: str, path: str) -> None:
    error = refused(served, path, {"max_tokens": 5} | body)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


def test_a_large_body(served: Served) -> None:
    large = image_url("data:image/png;base64," + "A" * 100_000)
    error = refused(served, "chat/completions", {"messages": [{"role": "user", "content": [large]}]}, status=413)
    assert error["code"] == "body_too_large"
    assert error["message"] == "the body has more than 100000 bytes"


def test_without_the_packages(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(sources, "import_module", missing)
    asked = {"messages": [{"role": "user", "content": [image_url(url_of(PICTURE))]}]}
    error = refused(served, "chat/completions", asked)
    assert error["message"] == "messages[0].content[0]: needs Pillow: pip install 'mlx-mtp[media]'"


def test_a_prompt_that_is_too_long(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts the tokens of media too."""
    monkeypatch.setattr(served.service, "max_prompt_tokens", 60)
    error = refused(served, "chat/completions", {"messages": [{"role": "user", "content": [IMAGE_URL]}]})
    assert error["code"] == "context_length_exceeded"
    assert error["message"].endswith("but at most 60 are taken here")


def test_many_pictures_are_not_all_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of some kilobytes can have thousands of pictures, each of which is enlarged."""
    read: list[str] = []

    def and_note(*args: Any, place: str, **options: Any) -> Any:
        read.append(place)
        return images.read_image(*args, place=place, **options)

    monkeypatch.setattr(media_reader, "read_image", and_note)
    tiny = image_url(url_of(picture(0, 1, 1)), detail="original")
    error = refused(served, "chat/completions", {"messages": [{"role": "user", "content": [tiny] * 300}]})
    context = served.service.model.max_context
    assert len(read) == context // 1089 + 1 < 300
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(f"{read[-1]}: the media up to here take {1089 * len(read)} tokens, but the ")


def test_other_endpoints_take_text(served: Served) -> None:
    for prompt in (IMAGE_URL, [IMAGE_URL], [[IMAGE_URL]]):
        assert refused(served, "completions", {"prompt": prompt})["code"] == "invalid_value"


def test_modalities(served: Served, tiny_media: Callable[[str], Path]) -> None:
    def of(url: str) -> Any:
        return httpx.get(f"{url}/models").json()["data"][0]["architecture"]

    assert of(served.v1) == {"input_modalities": ["text", "image", "audio"], "output_modalities": ["text"]}
    with serve(lambda: mlx_mtp.load(tiny_media("26b"))) as pictures:
        assert of(pictures.v1)["input_modalities"] == ["text", "image"]
        error = refused(pictures, "chat/completions", {"messages": [{"role": "user", "content": [audio("aGk=")]}]})
        assert error["message"] == (
            "messages[0].content[0]: found audio, but this checkpoint reads only text, image, video (the model has no "
            "other parts, or mlx-mtp convert --modalities left them out)"
        )
    with serve(lambda: mlx_mtp.load(DEMO_PAIR)) as texts:
        assert of(texts.v1)["input_modalities"] == ["text"]
        error = refused(texts, "chat/completions", {"messages": [{"role": "user", "content": [IMAGE_URL]}]})
        assert error["message"] == (
            "messages[0].content[0]: found image, but this checkpoint reads only text (the model has no other parts, "
            "or mlx-mtp convert --modalities left them out)"
        )
