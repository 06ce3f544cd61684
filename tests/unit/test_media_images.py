"""Pictures to patches: sizes, kinds of files and pixels, and what is refused."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.pictures import chunk, encoded, png

from mlx_mtp.errors import MediaError, PromptError
from mlx_mtp.media.images import BUDGETS, FORMATS, Picture, fitted_size, read_image

Turn = Callable[[Image.Image], Image.Image]
# A picture of this side keeps its size at the budget of 280 soft tokens.
KEPT = 768


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def color(picture: Picture) -> tuple[int, ...]:
    """Return the color of a picture that has only one."""
    assert (picture.pixels == picture.pixels[0, 0]).all()
    return tuple(picture.pixels[0, 0].tolist())


@pytest.mark.parametrize(
    ("height", "width", "budget", "rows", "columns"),
    [
        (512, 600, 280, 15, 18),
        (451, 300, 280, 20, 13),
        (3, 900, 280, 1, 280),
        (900, 3, 280, 280, 1),
        (1, 1, 280, 16, 16),
        (768, 768, 280, 16, 16),
        (480, 480, 280, 16, 16),
        (1, 1, 70, 8, 8),
        (1, 1, 140, 11, 11),
        (1, 1, 560, 23, 23),
        (1, 1, 1120, 33, 33),
        (20, 900, 70, 1, 56),
        (10, 900, 70, 1, 70),
        (1, 90_000, 70, 1, 70),
        (5, 100, 280, 3, 74),
        (8000, 8000, 1120, 33, 33),
    ],
)
def test_sizes(height: int, width: int, budget: int, rows: int, columns: int) -> None:
    assert fitted_size(height, width, budget) == (48 * rows, 48 * columns)
    if height * width < 10**6:
        picture = read_image(Image.new("L", (width, height)), budget=budget)
        assert picture.pixels.shape == (48 * rows, 48 * columns, 3)
        assert picture.tokens == rows * columns


def test_no_size_exceeds_its_budget() -> None:
    rng = np.random.default_rng(1)
    for height, width in np.exp(rng.uniform(0, 9, (400, 2))).astype(int).tolist():
        for budget in BUDGETS:
            tokens = np.prod([side // 48 for side in fitted_size(height, width, budget)])
            assert 0.75 * budget / 2 < tokens <= budget


def test_values_are_the_pixels() -> None:
    pixels = noise(672, 864)
    picture = read_image(pixels)
    assert np.array_equal(picture.pixels, pixels)
    assert picture.values.dtype == np.float32
    assert np.array_equal(picture.values, (pixels / 255).astype(np.float32))


def transparent_palette() -> bytes:
    image = Image.new("P", (60, 60), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(image, "PNG", transparency=1)


def grey16(value: int, extra: bytes = b"") -> bytes:
    return png(40, 30, depth=16, color=0, rows=(b"\0" + struct.pack(">H", value) * 40) * 30, extra=extra)


RED = (255, 0, 0)
KINDS: dict[str, tuple[bytes | Image.Image, tuple[int, ...]]] = {
    "PNG": (encoded(Image.new("RGB", (60, 40), RED), "PNG"), RED),
    "GIF": (encoded(Image.new("RGB", (60, 40), RED), "GIF"), RED),
    "BMP": (encoded(Image.new("RGB", (60, 40), RED), "BMP"), RED),
    "TIFF": (encoded(Image.new("RGB", (60, 40), RED), "TIFF"), RED),
    "compressed TIFF": (encoded(Image.new("RGB", (60, 40), RED), "TIFF", compression="tiff_lzw"), RED),
    "WebP": (encoded(Image.new("RGB", (60, 40), RED), "WEBP", lossless=True), RED),
    "JPEG": (encoded(Image.new("RGB", (60, 40), (90, 90, 90)), "JPEG"), (90, 90, 90)),
    "grey": (encoded(Image.new("L", (60, 40), 77), "PNG"), (77, 77, 77)),
    "grey JPEG": (encoded(Image.new("L", (60, 40), 77), "JPEG"), (77, 77, 77)),
    "one bit": (encoded(Image.new("1", (60, 40), 1), "PNG"), (255, 255, 255)),
    "alpha": (encoded(Image.new("RGBA", (60, 40), (255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "alpha WebP": (encoded(Image.new("RGBA", (60, 40), (9, 9, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "grey alpha": (encoded(Image.new("LA", (60, 40), (0, 51)), "PNG"), (204, 204, 204)),
    "transparent color": (encoded(Image.new("RGB", (60, 40), RED), "PNG", transparency=RED), (255, 255, 255)),
    "other transparent color": (encoded(Image.new("RGB", (60, 40), RED), "PNG", transparency=(0, 255, 0)), RED),
    "palette": (encoded(Image.new("RGB", (60, 40), (200, 100, 50)).quantize(4), "PNG"), (200, 100, 50)),
    "transparent palette": (transparent_palette(), (255, 255, 255)),
    "transparent GIF": (encoded(Image.new("P", (60, 40), 0), "GIF", transparency=0), (255, 255, 255)),
    "16 bit": (grey16(0x8012), (128, 128, 128)),
    "16 bit, dark": (grey16(0x00FF), (0, 0, 0)),
    "16 bit, transparent": (grey16(0x8012, chunk(b"tRNS", b"\x80\x12")), (255, 255, 255)),
    "16 bit, other transparent": (grey16(0x8012, chunk(b"tRNS", b"\x80\x13")), (128, 128, 128)),
    "16 bit TIFF": (encoded(Image.fromarray(np.full((30, 40), 0x4200, np.uint16)), "TIFF"), (66, 66, 66)),
    "16 bit color": (
        png(8, 8, depth=16, color=2, rows=(b"\0" + struct.pack(">HHH", 65535, 256, 512) * 8) * 8),
        (255, 1, 2),
    ),
    "16 bit color and alpha": (
        png(8, 8, depth=16, color=6, rows=(b"\0" + struct.pack(">HHHH", 65535, 0, 0, 32896) * 8) * 8),
        (255, 127, 127),
    ),
    "CMYK TIFF": (encoded(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK JPEG": (encoded(Image.new("CMYK", (60, 40), (255, 255, 255, 0)), "JPEG"), (0, 0, 0)),
    "YCbCr image": (Image.new("YCbCr", (60, 40), (128, 128, 128)), (128, 128, 128)),
    "premultiplied image": (Image.new("RGBA", (60, 40), (255, 0, 0, 128)).convert("RGBa"), (255, 127, 127)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pictures(kind: str) -> None:
    data, expected = KINDS[kind]
    assert color(read_image(data)) == expected


@pytest.mark.parametrize(
    "stored",
    [
        lambda image: image,
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.transpose(Image.Transpose.ROTATE_180),
        lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        lambda image: image.transpose(Image.Transpose.ROTATE_90),
        lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        lambda image: image.transpose(Image.Transpose.ROTATE_270),
    ],
    ids=range(1, 9),
)
def test_pictures_are_turned_upright(stored: Turn, request: pytest.FixtureRequest) -> None:
    upright = Image.fromarray(noise(30, 50, seed=4))
    exif = Image.Exif()
    exif[0x0112] = int(request.node.callspec.id)
    for format in ("PNG", "TIFF"):
        assert read_image(encoded(stored(upright), format, exif=exif)).digest == read_image(upright).digest


def test_ways_to_give_a_picture(tmp_path: Path) -> None:
    """A PIL image stays as it was."""
    pixels = noise(50, 70)
    data = encoded(Image.fromarray(pixels), "PNG")
    file = tmp_path / "picture with another ending.jpg"
    file.write_bytes(data)
    with Image.open(file) as lazy:
        digests = {read_image(given).digest for given in (pixels, data, file, str(file), lazy, lazy.copy())}
        assert len(digests) == 1
        assert (lazy.size, lazy.mode) == ((70, 50), "RGB")
        assert np.array_equal(np.asarray(lazy), pixels)


def test_a_photograph_with_previews_is_one_picture() -> None:
    first, second = (Image.fromarray(noise(40, 60, seed=seed)) for seed in (1, 2))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    with Image.open(BytesIO(data)) as image:
        assert image.format == "MPO"
    assert read_image(data).digest == read_image(encoded(first, "JPEG")).digest


def test_the_hash_covers_kind_shape_values_and_budget() -> None:
    pixels = noise(KEPT, KEPT)
    changed = pixels.copy()
    changed[-1, -1, -1] ^= 1
    digests = {
        read_image(pixels).digest,
        read_image(changed).digest,
        read_image(pixels, budget=560).digest,
        read_image(np.zeros((672, 864, 3), np.uint8)).digest,
        read_image(np.zeros((864, 672, 3), np.uint8)).digest,
    }
    assert len(digests) == 5
    assert read_image(pixels.copy()).digest in digests
    # Both budgets give the same pixels.
    one, other = (read_image(Image.new("L", (90_000, 1)), budget=budget) for budget in (70, 140))
    assert one.digest != other.digest


def frames(format: str) -> bytes:
    first, second = (Image.fromarray(noise(20, 20, seed=seed)) for seed in (1, 2))
    return encoded(first, format, save_all=True, append_images=[second])


def truncated(format: str, **options: object) -> bytes:
    data = encoded(Image.fromarray(noise(100, 100)), format, **options)
    return data[: len(data) // 2]


def bomb(width: int, height: int) -> bytes:
    return png(width, height, depth=8, color=2, rows=bytes(1000))


def float_tiff(mode: str) -> bytes:
    return encoded(Image.new(mode, (20, 20), 1), "TIFF")


REFUSED: dict[str, tuple[object, str]] = {
    "no bytes": (b"", "image: expected the bytes of a file, found 0 bytes"),
    "text": (b"hello" * 100, "image: format: expected one of PNG, JPEG, WEBP, GIF, BMP, TIFF, found other"),
    "another format": (encoded(Image.new("RGB", (9, 9)), "PPM"), "image: format: expected one of PNG"),
    "another type": (3, "image: expected a path, bytes, a PIL image or an array of uint8, found int"),
    "floats": (np.zeros((9, 9, 3), np.float32), r"array: expected .* of uint8, found \[9, 9, 3\] of float32"),
    "channel first": (np.zeros((3, 9, 9), np.uint8), r"array: expected .* found \[3, 9, 9\] of uint8"),
    "grey array": (np.zeros((9, 9), np.uint8), r"array: expected .* found \[9, 9\] of uint8"),
    "empty array": (np.zeros((0, 9, 3), np.uint8), r"array: expected .* found \[0, 9, 3\]"),
    "empty image": (Image.new("RGB", (0, 9)), "size: expected 1 to 64000000 pixels, found 0 x 9 = 0"),
    "large": (bomb(9000, 9000), "image: size: expected 1 to 64000000 pixels, found 9000 x 9000 = 81000000"),
    "larger": (bomb(10_000, 10_000), "image: size: expected 1 to 64000000 pixels, found 10000 x 10000"),
    "bomb": (bomb(40_000, 25_000), "image: size: expected 1 to 64000000 pixels, found 1000000000$"),
    "animated GIF": (frames("GIF"), "frames: expected one picture, found an animation or several pages"),
    "animated WebP": (frames("WEBP"), "frames: expected one picture"),
    "animated PNG": (frames("PNG"), "frames: expected one picture"),
    "pages": (frames("TIFF"), "frames: expected one picture"),
    "32 bit": (float_tiff("I"), "pixels: expected 8 or 16 bits a channel, found 32"),
    "floats in a file": (float_tiff("F"), "pixels: expected 8 or 16 bits a channel, found 32"),
    **{
        f"truncated {format}": (
            truncated(format),
            "image: expected data that can be decoded, found damaged",
        )
        for format in FORMATS
    },
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    data, message = REFUSED[what]
    with pytest.raises(MediaError, match=f"^{message}" if message.startswith("image") else message) as caught:
        read_image(data)  # type: ignore[arg-type]
    assert isinstance(caught.value, PromptError)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_large_picture_is_refused_when_warnings_are_errors() -> None:
    with pytest.raises(MediaError, match=r"expected 1 to 64000000 pixels, found 100000000$"):
        read_image(bomb(10_000, 10_000))


def test_large_pictures_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(MediaError, match="expected 1 to 64000000 pixels"):
        read_image(bomb(9000, 9000))
    with pytest.raises(MediaError, match="decoded"):
        read_image(bomb(9, 9))


@pytest.mark.parametrize("budget", [0, 100, 281, -70, "280", None])
def test_budgets_outside_the_list_are_refused(budget: int) -> None:
    with pytest.raises(MediaError, match=r"^image: max_soft_tokens: expected one of 70, 140, 280, 560, 1120, found "):
        read_image(noise(9, 9), budget=budget)


def test_paths_that_are_refused(tmp_path: Path) -> None:
    empty, pointer, link = tmp_path / "empty.png", tmp_path / "pointer.png", tmp_path / "link.png"
    empty.touch()
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    link.symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for file, reason in (
        (tmp_path / "missing.png", "no such file"),
        (empty, "truncated: an empty file"),
        (pointer, "a git-lfs pointer"),
        (link, "a link to .*nothing, which is not there"),
        (tmp_path, "expected a file, found a folder or a device"),
        (tmp_path / "pipe", "expected a file, found a folder or a device"),
        (tmp_path / ("a" * 400), "cannot be opened: File name too long"),
    ):
        with pytest.raises(MediaError, match=reason) as caught:
            read_image(file, place="messages[0].content[1]")
        assert str(caught.value).startswith(f"messages[0].content[1]: {tmp_path}")
        assert len(str(caught.value)) < 500
    with pytest.raises(MediaError, match="text with a null character"):
        read_image("a\0b")


def test_errors_name_the_place() -> None:
    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[1\]: format: expected"):
        read_image(b"hello", place="messages[0].content[1]")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MediaError, match=r"^image: needs Pillow: pip install 'mlx-mtp\[media\]'$"):
        read_image(noise(9, 9))


def test_importing_imports_no_decoder() -> None:
    code = "import sys, mlx_mtp.media.images, mlx_mtp.media.audio, mlx_mtp.media.video; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"PIL", "soundfile", "soxr", "av"} & set(result.stdout.split())
