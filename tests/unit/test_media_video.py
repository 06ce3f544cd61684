"""Videos to pictures with times: folders, animations, and mp4 and mov files."""

import struct
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from support.pictures import encoded, png

from mlx_mtp.errors import MediaError
from mlx_mtp.media.images import read_image
from mlx_mtp.media.video import Video, chosen_frames, read_video


def grey(index: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Return a frame whose brightness tells its index, up to 60."""
    return Image.new("RGB", size, (4 * index + 8,) * 3)


def indices(video: Video) -> list[int]:
    """Return the indices of the frames that a video has, by their brightness."""
    return [round((float(frame.pixels.mean()) - 8) / 4) for frame in video.frames]


def animation(count: int, format: str, duration: int | list[int] = 100, **options: Any) -> bytes:
    rest = [grey(index) for index in range(1, count)]
    return encoded(grey(0), format, save_all=True, append_images=rest, duration=duration, **options)


def container(
    count: int, format: str = "mp4", rate: int | Fraction = 10, frame: Any = grey, codec: str = "mpeg4", **options: str
) -> bytes:
    """Return an mp4 or mov file of `count` frames. `options` are those of the codec."""
    stream = BytesIO()
    with av.open(stream, "w", format=format) as file:
        encode(file, count, rate, frame, codec, options)
    return stream.getvalue()


def encode(file: Any, count: int, rate: int | Fraction, frame: Any, codec: str, options: dict[str, str]) -> None:
    video = file.add_stream(codec, rate=rate, options=options)
    video.width, video.height = frame(0).size
    video.pix_fmt, video.bit_rate = "yuv420p", 10**7
    for index in range(count):
        picture = np.asarray(frame(index).convert("RGB"))
        file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    file.mux(video.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(12):
        grey(index).save(tmp_path / f"frame {index}.png")
    (tmp_path / ".hidden.png").write_bytes(b"hello")
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path


def test_frames_are_chosen_equally_far_apart() -> None:
    assert chosen_frames(1) == [0]
    assert chosen_frames(32) == list(range(32))
    assert chosen_frames(64) == list(range(0, 64, 2))
    assert chosen_frames(33) == list(range(32))
    assert chosen_frames(100)[:6] == [0, 3, 6, 9, 12, 15]
    assert chosen_frames(100)[-1] == 96


def test_a_folder_of_frames(folder: Path) -> None:
    video = read_video(folder)
    assert indices(video) == list(range(12))
    assert video.times == tuple(index / 24 for index in range(12))
    assert read_video(str(folder), fps=2).times == tuple(index / 2 for index in range(12))
    assert {frame.budget for frame in video.frames} == {70}
    assert video.frames[3].digest == read_image(grey(3), budget=70).digest


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations(format: str, tmp_path: Path) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = animation(6, format, [100, 200, 300, 400, 500, 600], **options)
    video = read_video(data)
    assert indices(video) == list(range(6))
    assert video.times == (0, 0.1, 0.3, 0.6, 1.0, 1.5)
    (tmp_path / "video").write_bytes(data)
    assert read_video(tmp_path / "video", fps=3).digest == video.digest


def test_a_long_animation_has_32_frames() -> None:
    video = read_video(animation(50, "GIF"))
    assert indices(video) == chosen_frames(50)
    assert video.times == tuple(index / 10 for index in chosen_frames(50))


def test_an_animation_without_times() -> None:
    data = animation(5, "WEBP", 0, lossless=True)
    assert read_video(data, fps=4).times == (0, 0.25, 0.5, 0.75, 1)
    assert read_video(data).times == tuple(index / 24 for index in range(5))


def test_a_substitute_for_an_animation_is_not_one_of_its_frames() -> None:
    data = encoded(grey(9), "PNG", save_all=True, append_images=[grey(1), grey(2)], default_image=True, duration=100)
    assert indices(read_video(data)) == [1, 2]


def test_transparent_frames_are_on_white() -> None:
    images = [Image.new("RGBA", (20, 20), (0, 0, 0, alpha)) for alpha in (0, 51)]
    video = read_video(encoded(images[0], "WEBP", save_all=True, append_images=images[1:], lossless=True))
    assert [frame.pixels.max() for frame in video.frames] == [255, 204]


def test_a_still_picture_is_a_video_of_one_frame() -> None:
    video = read_video(encoded(grey(5), "PNG"))
    assert (indices(video), video.times) == ([5], (0,))


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "mpeg4"), ("mov", "mpeg4"), ("mp4", "libx264"), ("mov", "libx264")]
)
def test_containers(format: str, codec: str, tmp_path: Path) -> None:
    data = container(50, format, codec=codec)
    video = read_video(data, fps=3)
    assert indices(video) == chosen_frames(50)
    assert video.times == tuple(index / 10 for index in chosen_frames(50))
    (tmp_path / "video").write_bytes(data)
    assert read_video(tmp_path / "video").digest == video.digest


def test_a_rate_that_is_no_whole_number() -> None:
    assert read_video(container(3, rate=Fraction(30000, 1001))).times == pytest.approx((0, 0.0333667, 0.0667333))


def test_frames_with_references_to_later_ones() -> None:
    data = container(40, codec="libx264", bf="3", g="12")
    assert indices(read_video(data)) == chosen_frames(40)


def rotated(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Write the matrix of a track's header: how a player is to turn the pictures."""
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    return data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :]


def test_pictures_of_a_telephone_are_turned_upright() -> None:
    """The upper left quarter is bright. Clockwise by 90 degrees, it comes to the right."""

    def quarter(_: int) -> Image.Image:
        image = Image.new("RGB", (128, 64))
        image.paste((255, 255, 255), (0, 0, 64, 32))
        return image

    data = container(2, frame=quarter)

    def bright(video: Video) -> tuple[bool, bool, bool, bool]:
        pixels = video.frames[0].pixels
        height, width, _ = pixels.shape
        rows, columns = (height // 4, height - height // 4), (width // 4, width - width // 4)
        first, second, third, last = (bool(pixels[row, column, 0] > 128) for row in rows for column in columns)
        return first, second, third, last

    assert bright(read_video(data)) == (True, False, False, False)
    turned = read_video(rotated(data, (0, 1, -1, 0)))
    assert bright(turned) == (False, True, False, False)
    height, width, _ = turned.frames[0].pixels.shape
    assert height > width
    assert bright(read_video(rotated(data, (-1, 0, 0, -1)))) == (False, False, False, True)
    assert bright(read_video(rotated(data, (0, -1, 1, 0)))) == (False, False, True, False)


def test_the_hash_covers_frames_and_times() -> None:
    data = animation(4, "GIF")
    assert read_video(data).digest == read_video(data).digest
    others = (animation(4, "GIF", 110), animation(3, "GIF"), animation(5, "GIF"))
    assert len({read_video(one).digest for one in (data, *others)}) == 4


def sound_only() -> bytes:
    stream = BytesIO()
    with av.open(stream, "w", format="mp4") as file:
        audio = file.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(audio.encode(frame))
        file.mux(audio.encode())
    return stream.getvalue()


def large_frame() -> bytes:
    """Return a GIF file whose second frame is larger than the first: 9000 x 9000."""
    data = bytearray(animation(2, "GIF", interlace=0))
    # The image descriptor: a comma, the place, the size.
    second = data.index(b",\0\0\0\0\x40\0\x30\0", data.index(b",\0\0\0\0\x40\0\x30\0") + 1)
    data[second + 5 : second + 9] = struct.pack("<HH", 9000, 9000)
    return bytes(data)


REFUSED: dict[str, tuple[Any, str]] = {
    "no bytes": (b"", "expected the bytes of a file, found 0 bytes"),
    "text": (b"hello" * 100, "format: expected one of GIF, WEBP, PNG, found other or damaged data"),
    "a picture of another format": (encoded(grey(0), "JPEG"), "format: expected one of GIF, WEBP, PNG"),
    "another type": (3, "expected a path or bytes, found int"),
    "half an mp4": (container(20)[:1000], "expected data that can be decoded, found damaged or truncated data: .*"),
    "half a GIF": (animation(20, "GIF")[:-200], "expected data that can be decoded, found damaged or truncated data"),
    "half a WebP": (animation(20, "WEBP")[:-200], ".*damaged"),
    "an mp4 of sound": (sound_only(), "expected a video, found none in the file"),
    "a large picture": (png(9000, 9000, depth=8, color=2, rows=bytes(100)), "size: expected 1 to 64000000 pixels"),
    "a large frame": (large_frame(), "size: expected 1 to 64000000 pixels, found 9000 x 9000"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    data, message = REFUSED[what]
    with pytest.raises(MediaError, match=f"^video: {message}"):
        read_video(data)


def test_folders_that_are_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(
        MediaError, match=f"^{folder}/empty: frames: expected pictures that end in .png, .*, found none$"
    ):
        read_video(folder / "empty")
    (folder / "frame 3.png").write_bytes(b"hello")
    with pytest.raises(MediaError, match=rf"^content\[0\]: {folder}/frame 3.png: format: expected one of"):
        read_video(folder, place="content[0]")
    with pytest.raises(MediaError, match=f"^{folder}x: no such file$"):
        read_video(f"{folder}x")


def test_a_file_that_ends_within_a_frame_is_refused(tmp_path: Path) -> None:
    """The index of this file is at its beginning. The last bytes belong to the last frame."""
    file = tmp_path / "video.mp4"
    with av.open(str(file), "w", options={"movflags": "faststart"}) as new:
        encode(new, 40, 10, grey, "mpeg4", {})
    data = file.read_bytes()
    assert indices(read_video(data)) == chosen_frames(40)
    for end in (-3, -100, -200):
        with pytest.raises(MediaError, match=r"^video: frames: expected whole ones, found one without its end"):
            read_video(data[:end])


@pytest.mark.parametrize("fps", [0, -1, float("inf"), float("nan")])
def test_rates_that_are_refused(fps: float, folder: Path) -> None:
    with pytest.raises(MediaError, match=f"^{folder}: fps: expected a positive number, found {fps}$"):
        read_video(folder, fps=fps)


@pytest.mark.parametrize(("package", "name", "extra"), [("av", "PyAV", "video"), ("PIL.Image", "Pillow", "media")])
def test_a_missing_package_is_named(package: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = container(2)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MediaError, match=rf"^video: needs {name}: pip install 'mlx-mtp\[{extra}\]'$"):
        read_video(data)
