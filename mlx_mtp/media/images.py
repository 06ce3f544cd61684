"""From a picture to patches: decoding, upright, on white, and resized to the budget of soft tokens."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlx_mtp.errors import MediaError

from .sources import content_hash, decoding, open_source, require, source_name

if TYPE_CHECKING:
    from PIL import Image

    ImageData = str | Path | bytes | Image.Image | NDArray[np.uint8]

# The largest numbers of soft tokens that a picture may take.
BUDGETS = (70, 140, 280, 560, 1120)
DEFAULT_BUDGET = 280
# Pillow's names of the formats that are read.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# The largest number of pixels of a picture before resizing.
MOST_PIXELS = 64_000_000
# The side in pixels of the square of a soft token.
TOKEN_SIDE = 48


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture after resizing.

    `pixels` has the shape [height, width, 3] and type uint8; both sides are multiples of 48. `budget` is the largest
    number of soft tokens that it was resized for. `digest` is the hash of all this.
    """

    pixels: NDArray[np.uint8]
    budget: int
    digest: str

    @property
    def tokens(self) -> int:
        """Return the number of soft tokens."""
        height, width, _ = self.pixels.shape
        tokens: int = (height // TOKEN_SIDE) * (width // TOKEN_SIDE)
        return tokens

    @property
    def values(self) -> NDArray[np.float32]:
        """The pixels as the networks take them, [height, width, 3] of values from 0 to 1."""
        values = self.pixels.astype(np.float32)
        values /= 255
        return values


def read_image(data: "ImageData", *, budget: int = DEFAULT_BUDGET, place: str = "") -> Picture:
    """Read one picture and resize it to a budget of soft tokens.

    `data` is a path, the bytes of a file, a PIL image, or an array [height, width, 3] of uint8. `place` is the place of
    the picture in a request, for errors. Raises MediaError if the picture cannot be read, has more than 64 million
    pixels or several frames, or if the budget is not one of `BUDGETS`.
    """
    name = source_name(data, place, "image")
    if budget not in BUDGETS:
        raise MediaError(f"{name}: max_soft_tokens: expected one of {', '.join(map(str, BUDGETS))}, found {budget!r}")
    with decoding(name), _opened(data, name) as image:
        check_size(image.width, image.height, name)
        _check_single(image, name)
        return make_picture(image, budget, name)


def open_image(file: BinaryIO, formats: Sequence[str], name: str) -> "Image.Image":
    """Read the header of a picture. Raises MediaError if its format is none of `formats`, or if it is too large."""
    pillow = require("PIL.Image", "Pillow", "media", name)
    try:
        image: Image.Image = pillow.open(file, formats=formats)
    except pillow.UnidentifiedImageError:
        expected = ", ".join(formats)
        raise MediaError(f"{name}: format: expected one of {expected}, found other or damaged data") from None
    # Pillow's own limit is higher, and Python can be told to raise the warning, which is for smaller pictures.
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        found = next(iter(re.findall(r"\d+", str(error))), "more")
        raise MediaError(f"{name}: size: expected 1 to {MOST_PIXELS} pixels, found {found}") from None
    return image


def check_size(width: int, height: int, name: str) -> None:
    """Raise MediaError if a picture has no pixels, or more than 64 million."""
    if not 0 < width * height <= MOST_PIXELS:
        found = f"{width} x {height} = {width * height}"
        raise MediaError(f"{name}: size: expected 1 to {MOST_PIXELS} pixels, found {found}")


def make_picture(image: "Image.Image", budget: int, name: str) -> Picture:
    """Turn a PIL image upright, put it on white, and resize it. Raises MediaError if its pixels have no 8-bit values.

    The resize of Pillow, in 8 bits, is that of transformers' `Gemma4ImageProcessorPil`.
    """
    from PIL import Image, ImageOps

    colors = _on_white(ImageOps.exif_transpose(image), name)
    height, width = fitted_size(colors.height, colors.width, budget)
    pixels = np.asarray(colors.resize((width, height), Image.Resampling.BICUBIC))
    return Picture(pixels, budget, content_hash("image", pixels, budget))


def fitted_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """Return the height and width in pixels that a picture is resized to, as transformers computes them.

    Both are multiples of 48, and the picture takes at most `budget` soft tokens. Small pictures are enlarged. The
    ratio of the sides stays nearly the same. A side that would be 0 becomes 48.
    """
    factor = math.sqrt(budget * TOKEN_SIDE**2 / (height * width))
    rows, columns = (math.floor(factor * side / TOKEN_SIDE) for side in (height, width))
    # The other side is then more than `budget` times as long, and takes the whole budget.
    if rows == 0:
        rows, columns = 1, budget
    elif columns == 0:
        rows, columns = budget, 1
    return rows * TOKEN_SIDE, columns * TOKEN_SIDE


@contextmanager
def _opened(data: object, name: str) -> "Iterator[Image.Image]":
    """Yield a PIL image of the data, whose pixels may not be decoded yet. Raises MediaError for data of other types."""
    pillow = require("PIL.Image", "Pillow", "media", name)
    if isinstance(data, pillow.Image):
        yield data
    elif isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or not data.size:
            found = f"{list(data.shape)} of {data.dtype}"
            raise MediaError(f"{name}: array: expected [height, width, 3] of uint8, found {found}")
        yield pillow.fromarray(data)
    elif isinstance(data, str | Path | bytes):
        with open_source(data, name) as file, open_image(file, FORMATS, name) as image:
            yield image
    else:
        found = type(data).__name__
        raise MediaError(f"{name}: expected a path, bytes, a PIL image or an array of uint8, found {found}")


def _check_single(image: "Image.Image", name: str) -> None:
    """Raise MediaError if a picture has several frames.

    The other pictures in a JPEG file of a camera (Pillow calls the format MPO) are previews or depths of the first.
    """
    # Pillow defines the attribute only for formats that can have several frames.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise MediaError(f"{name}: frames: expected one picture, found an animation or several pages")


def _on_white(image: "Image.Image", name: str) -> "Image.Image":
    """Convert an image to RGB, with its transparent parts on white. Raises MediaError for more than 16 bits."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = _in_eight_bits(image)
    if image.mode in ("I", "F"):
        raise MediaError(f"{name}: pixels: expected 8 or 16 bits a channel, found 32 (Pillow's mode {image.mode})")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    # `convert` would copy an image that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_eight_bits(image: "Image.Image") -> "Image.Image":
    """Convert a grey image of 16 bits to 8 bits. The value that means transparent becomes white."""
    from PIL import Image

    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
