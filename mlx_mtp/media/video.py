"""From a video to up to 32 pictures with their times: a folder of frames, an animation, or an mp4 or mov file."""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mtp.errors import MediaError

from .images import Picture, check_size, make_picture, open_image, read_image
from .sources import FileData, decoding, open_source, require, source_name

# The largest number of frames that a network sees, and the budget of soft tokens of each.
MOST_FRAMES = 32
FRAME_BUDGET = 70
# The frames per second of a video that does not tell them.
DEFAULT_FPS = 24.0

# Pillow's names of the formats that can hold an animation.
_ANIMATIONS = ("GIF", "WEBP", "PNG")
# The endings of the pictures in a folder of frames.
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# The types of the box that begins an mp4 or mov file. They follow the box's length, which has 4 bytes.
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")

# A chosen frame, and its time in seconds.
_Frame = tuple[Picture, float]


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, at most 32. `times` are their times in seconds. `digest` is the hash of the content."""

    frames: tuple[Picture, ...]
    times: tuple[float, ...]
    digest: str


def read_video(data: FileData, *, fps: float = DEFAULT_FPS, place: str = "") -> Video:
    """Read up to 32 frames of a video, equally far apart, as pictures of up to 70 soft tokens.

    `data` is a folder of pictures, in the order of the numbers in their names; an animation in GIF, WebP or PNG; or an
    mp4 or mov file, as a path or as bytes. `fps`, the frames per second, counts for folders, and for files that do not
    tell their times. `place` is the place of the video in a request, for errors. Raises MediaError if the video cannot
    be read or has no frames, and as `read_image` does for its frames.
    """
    name = source_name(data, place, "video")
    if not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise MediaError(f"{name}: fps: expected a positive number, found {fps!r}")
    if isinstance(data, str | Path) and os.path.isdir(data):
        return _video(_folder_frames(Path(data), fps, place, name))
    with open_source(data, name) as file, decoding(name):
        start = file.read(8)
        file.seek(0)
        read = _container_frames if start[4:] in _FIRST_BOXES else _animation_frames
        return _video(read(file, fps, name))


def chosen_frames(total: int) -> list[int]:
    """Return the indices of the frames that a network sees: all, or 32 of them, equally far apart."""
    count = min(MOST_FRAMES, total)
    return [index * total // count for index in range(count)]


def _video(found: Iterator[_Frame]) -> Video:
    """Put frames and times together."""
    frames, times = zip(*found, strict=True)
    digest = hashlib.sha256(f"video {times}\n".encode())
    for frame in frames:
        digest.update(bytes.fromhex(frame.digest))
    return Video(frames, times, digest.hexdigest())


def _folder_frames(folder: Path, fps: float, place: str, name: str) -> Iterator[_Frame]:
    """Yield the chosen pictures of a folder. Raises MediaError if it has none. Hidden files do not count."""
    try:
        names = [file for file in os.listdir(folder) if file.lower().endswith(_ENDINGS) and file[0] != "."]
    except OSError as error:
        raise MediaError(f"{name}: the folder cannot be read: {error.strerror}") from None
    if not names:
        raise MediaError(f"{name}: frames: expected pictures that end in {', '.join(_ENDINGS)}, found none")
    names.sort(key=_by_numbers)
    for index in chosen_frames(len(names)):
        yield read_image(folder / names[index], budget=FRAME_BUDGET, place=place), index / fps


def _by_numbers(name: str) -> list[str | int]:
    """Return a key that sorts names by the numbers in them: frame 2 before frame 10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _animation_frames(file: BinaryIO, fps: float, name: str) -> Iterator[_Frame]:
    """Yield the chosen frames of an animation. Formats for animations tell how long each frame is shown."""
    with open_image(file, _ANIMATIONS, name) as image:
        check_size(image.width, image.height, name)
        # The first picture of a PNG file can be a substitute that is not part of the animation.
        first = 1 if image.info.get("default_image") else 0
        # Pillow's PNG, GIF and WebP images have this attribute, and its class of all images has not.
        chosen = chosen_frames(getattr(image, "n_frames", 1) - first)
        milliseconds, untold = 0, 0
        for index in range(chosen[-1] + 1):
            image.seek(first + index)
            # A frame of a GIF file can be larger than those before it.
            check_size(image.width, image.height, name)
            image.load()
            if index in chosen:
                yield make_picture(image, FRAME_BUDGET, name), milliseconds / 1000 + untold / fps
            duration = image.info.get("duration", 0)
            milliseconds, untold = milliseconds + duration, untold + (not duration)


def _container_frames(file: BinaryIO, fps: float, name: str) -> Iterator[_Frame]:
    """Yield the chosen frames of an mp4 or mov file. Raises MediaError if it has none, or was cut off."""
    av = require("av", "PyAV", "video", name)
    require("PIL.Image", "Pillow", "media", name)
    # The format keeps other kinds of files away, among them lists of addresses.
    with av.open(file, format="mov") as container:
        if not container.streams.video:
            raise MediaError(f"{name}: expected a video, found none in the file")
        stream = container.streams.video[0]
        chosen = chosen_frames(_count_frames(container, stream, name))
        check_size(stream.width, stream.height, name)
        container.seek(0)
        yield from _decoded_frames(container, stream, chosen, float(stream.average_rate or fps), name)


def _count_frames(container: Any, stream: Any, name: str) -> int:
    """Count the frames of a stream without decoding them. Raises MediaError if there are none, or if one is cut off."""
    count = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise MediaError(f"{name}: frames: expected whole ones, found one without its end: truncated data")
        # Packets without data end the stream. Frames before and after a cut are marked, and are not part of the video.
        count += bool(packet.size and not packet.is_discard)
    if not count:
        raise MediaError(f"{name}: frames: expected at least 1, found 0")
    return count


def _decoded_frames(container: Any, stream: Any, chosen: list[int], fps: float, name: str) -> Iterator[_Frame]:
    """Yield the chosen frames of a stream, upright. Raises MediaError if the stream ends before the last of them."""
    index = -1
    for index, frame in enumerate(container.decode(stream)):
        if index in chosen:
            check_size(frame.width, frame.height, name)
            # Telephones store how a picture is to be turned. Pillow turns by right angles without loss.
            upright = frame.to_image().rotate(frame.rotation, expand=True)
            yield make_picture(upright, FRAME_BUDGET, name), index / fps
        if index == chosen[-1]:
            return
    raise MediaError(f"{name}: frames: expected more than {chosen[-1]}, found {index + 1}: damaged or truncated data")
