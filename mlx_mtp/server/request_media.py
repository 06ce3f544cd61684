"""Pictures and sounds in requests.

Their data is base64 in the request itself, and is decoded here. So no address of a request is fetched, and no path of a
request is opened.
"""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from mlx_mtp.text.media_parts import DETAILS

from .field_types import RequestPart

# The number of characters of an address that errors show.
_SHOWN = 100


@dataclass(frozen=True)
class Medium:
    """A picture or sound of a message: the bytes of its file, and its place in the request, for errors.

    `max_soft_tokens` is the budget of a picture, or None for the default.
    """

    kind: Literal["image", "audio"]
    data: bytes
    place: str
    max_soft_tokens: int | None = None

    @property
    def part(self) -> dict[str, Any]:
        """The part of a message for `Model.prepare`."""
        budget = {} if self.max_soft_tokens is None else {"max_soft_tokens": self.max_soft_tokens}
        return {"type": self.kind, self.kind: self.data, "place": self.place} | budget


def _refusal(message: str) -> PydanticCustomError:
    return PydanticCustomError("medium", "{message}", {"message": message})


def base64_bytes(text: Any) -> Any:
    """Return the bytes of a text in base64. Raises PydanticCustomError if it is not base64 or is empty."""
    if not isinstance(text, str):
        return text
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    # The text may also have characters outside ASCII.
    except ValueError as error:
        raise _refusal(f"expected base64: {error}") from None
    if not data:
        raise _refusal("expected the bytes of a file in base64, found 0 bytes")
    return data


def _image_url_bytes(url: Any) -> Any:
    """Return the bytes of a `data:` URL of a picture. Raises PydanticCustomError for any other URL."""
    if not isinstance(url, str):
        return url
    head, comma, text = url.partition(",")
    kind = head.lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise _refusal("expected data:image/...;base64,... (nothing is fetched, and no file is opened)")
    return base64_bytes(text)


def _refuse_loose_media(value: Any) -> None:
    """Return None for an empty value. Raises PydanticCustomError for others."""
    if value:
        raise _refusal("expected media as parts of the content")


def check_image_type(media_type: str) -> str:
    """Return the media type. Raises PydanticCustomError if it is not that of a picture."""
    if not media_type.lower().startswith("image/"):
        raise _refusal("expected image/...")
    return media_type


# These fields are strings in a request, and bytes once they are read.
Base64Data = Annotated[bytes, BeforeValidator(base64_bytes, json_schema_input_type=str)]
ImageUrlData = Annotated[bytes, BeforeValidator(_image_url_bytes, json_schema_input_type=str)]
Detail: TypeAlias = Literal["low", "auto", "high", "original"]


_LooseMedia = Annotated[None, BeforeValidator(_refuse_loose_media, json_schema_input_type=None)]


class MediaInContent(RequestPart):
    """Message without fields of other APIs for media, which must not be lost in silence."""

    image: _LooseMedia = None
    images: _LooseMedia = None
    videos: _LooseMedia = None


class ImageUrl(RequestPart):
    """Picture as a `data:` URL."""

    url: ImageUrlData
    detail: Detail | None = None


def _as_image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(RequestPart):
    """Picture of a user's message. `detail` decides its number of tokens."""

    type: Literal["image_url", "input_image"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_image_url, json_schema_input_type=str | ImageUrl)]
    detail: Detail | None = None

    def medium(self, place: str) -> Medium:
        """Return the picture. `place` is the place of the part in the request."""
        return Medium("image", self.image_url.url, place, DETAILS[self.image_url.detail or self.detail or "auto"])


class InputAudio(RequestPart):
    """Sound: a file in base64. Its own header decides the format, not the field."""

    data: Base64Data
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "aiff"] | None = None


class AudioPart(RequestPart):
    """Sound of a user's message."""

    type: Literal["input_audio"]
    input_audio: InputAudio

    def medium(self, place: str) -> Medium:
        """Return the sound. `place` is the place of the part in the request."""
        return Medium("audio", self.input_audio.data, place)
