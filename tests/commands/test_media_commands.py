"""`generate` and `chat` with pictures, sounds and videos, as a user runs them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from support.commands import Finished, run

import mlx_mtp

TinyMedia = Callable[[str], Path]
OPTIONS = ("--temp", "0", "--num-draft-tokens", "0")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, a sound, an animation, and a folder of frames."""
    folder = tmp_path_factory.mktemp("my files")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (90, 160, 3), np.uint8)) for _ in range(3)]
    pictures[0].save(folder / "cat.jpg")
    pictures[0].save(folder / "clip.gif", save_all=True, append_images=pictures[1:], duration=1000)
    (folder / "frames").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / "frames" / f"{number}.png")
    soundfile.write(folder / "bird.wav", rng.normal(0, 0.1, 22_050), 44_100)
    return folder


def generate(model: Path, *args: object, code: int = 0) -> Finished:
    return run("generate", "--model", model, "-p", "what is it?", "-m", "6", *OPTIONS, *args, code=code)


def tokens(finished: Finished) -> list[int]:
    report: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    found: list[int] = report["tokens"]
    return found


def expected(model: Path, *parts: dict[str, Any], system: str | None = None) -> list[int]:
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]})
    with mlx_mtp.load(model, None) as loaded:
        return loaded.generate(messages, max_tokens=6, num_draft_tokens=0).tokens


def test_generate(tiny_media: TinyMedia, files: Path) -> None:
    model = tiny_media("e2b")
    media = ("--image", files / "cat.jpg", "--image", files / "cat.jpg", "--audio", files / "bird.wav")
    result = generate(model, *media, "--image-tokens", "70", "--system-prompt", "be brief", "--json")
    image = {"type": "image", "path": files / "cat.jpg", "max_soft_tokens": 70}
    parts = (image, image, {"type": "audio", "path": files / "bird.wav"})
    assert tokens(result) == expected(model, *parts, system="be brief")
    # 60 soft tokens of a picture of 90 x 160, twice, and 13 of half a second.
    assert json.loads(result.stdout.splitlines()[-1])["prompt_tokens"] > 2 * 60 + 13


@pytest.mark.parametrize("name", ["clip.gif", "frames"])
def test_generate_with_a_video(tiny_media: TinyMedia, files: Path, name: str) -> None:
    model = tiny_media("31b")
    result = generate(model, "--video", files / name, "--json")
    assert tokens(result) == expected(model, {"type": "video", "path": files / name})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image", "absent.png"], "error: --image: absent.png: no such file"),
        (["--image-tokens", "70"], "error: --image-tokens: there is no --image"),
        (
            ["--image", "HTTPS://example.org/cat.png"],
            "error: --image: HTTPS://example.org/cat.png: expected a file or data, found an address: nothing is "
            "fetched",
        ),
        (
            ["--image", "cat.jpg", "--ignore-chat-template"],
            "error: --image: media need a whole turn of the chat template: leave out --ignore-chat-template",
        ),
        (
            ["--audio", "bird.wav"],
            "error: --audio: found audio, but this checkpoint reads only text, image, video (the model has no other "
            "parts, or mlx-mtp convert --modalities left them out)",
        ),
        (
            ["--image", "bird.wav"],
            "error: --image: bird.wav: format: expected one of PNG, JPEG, WEBP, GIF, BMP, TIFF, found "
            "other or damaged data",
        ),
    ],
)
def test_refusals(
    tiny_media: TinyMedia, files: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(files)
    result = generate(tiny_media("31b"), *args, code=1)
    assert result.stderr.splitlines()[-1] == message
    assert result.stdout == ""


def test_chat(tiny_media: TinyMedia, files: Path) -> None:
    model = tiny_media("e2b")
    # Terminals write the path of a dropped file with quotes or backslashes.
    dropped = str(files / "cat.jpg").replace(" ", "\\ ")
    lines = (
        f"/image '{files / 'cat.jpg'}'",
        "what is it?",
        "/reset",
        f"{dropped} what is it?",
        "/reset",
        f"'{files / 'bird.wav'}'",
        "what is it?",
        "/image absent.png",
        "/image",
        "/exit",
    )
    result = run("chat", "--model", model, "-m", "6", *OPTIONS, stdin="\n".join(lines))
    image, sound = (
        {"type": kind, "path": files / name} for kind, name in (("image", "cat.jpg"), ("audio", "bird.wav"))
    )
    with mlx_mtp.load(model, None) as loaded:
        texts = [
            loaded.generate(
                [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}],
                max_tokens=6,
                num_draft_tokens=0,
            ).text
            for part in (image, image, sound)
        ]
    assert result.stdout == "".join(f"{text}\n" for text in texts)
    added = [line for line in result.stderr.splitlines() if line.startswith("added ")]
    assert added[0] == added[1] == f"added {files / 'cat.jpg'}, 264 tokens; now type a message"
    assert added[2].startswith(f"added {files / 'bird.wav'}, 13 tokens")
    assert "error: /image: absent.png: no such file; nothing is added" in result.stderr
    assert "/image needs a file" in result.stderr


def test_text_imports_no_media_package(tiny_media: TinyMedia) -> None:
    """Text needs neither the packages of the extra `media` nor their memory. transformers imports Pillow by itself."""
    code = (
        "import sys, mlx_mtp\n"
        f"model = mlx_mtp.load({str(tiny_media('e2b'))!r}, None)\n"
        "model.generate([{'role': 'user', 'content': 'hello'}], max_tokens=2, num_draft_tokens=0)\n"
        "print([name for name in ('soundfile', 'soxr', 'av') if name in sys.modules])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_mark_in_a_prompt_is_refused(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """Where the tokenizer knows the mark as a token, the prompt would have the place of a picture without a picture."""
    folder = shutil.copytree(tiny_media("e2b"), tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    # The id of "e" in the tiny tokenizer stands for the mark.
    with mlx_mtp.load(folder, None) as model:
        config["image_token_id"] = model.encode("e")[-1]
    (folder / "config.json").write_text(json.dumps(config))
    result = run("generate", "--model", folder, "-p", "e", "-m", "2", *OPTIONS, code=1)
    expected = f"error: the prompt holds token {config['image_token_id']}, the place of a medium: give messages with"
    assert result.stderr.splitlines()[-1].startswith(expected)
