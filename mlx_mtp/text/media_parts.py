"""Media in the messages of a conversation: the parts of a message's content that are not text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mlx_mtp.errors import PromptError

MediaKind = Literal["image", "audio", "video"]

# The text that chat templates write in the place of a medium.
PLACEHOLDERS: dict[str, MediaKind] = {"<|image|>": "image", "<|audio|>": "audio", "<|video|>": "video"}
# Texts must not have these marks: they stand for media, or are before and after them.
_MARKS = (*PLACEHOLDERS, "<|image>", "<image|>", "<|audio>", "<audio|>")
_ANY_MARK = re.compile("|".join(map(re.escape, _MARKS)))

# The types of parts, with the names of their data. The first name is this package's, which Hugging Face has too.
_OWN_TYPES: dict[str, MediaKind] = {"image": "image", "audio": "audio", "video": "video"}
_DATA_NAMES = ("path", "url")
# The options of a part, by its kind.
_OPTIONS: dict[MediaKind, tuple[str, ...]] = {"image": ("max_soft_tokens",), "audio": (), "video": ("fps",)}
# OpenAI's types of parts.
_OPENAI_TYPES: dict[str, MediaKind] = {"image_url": "image", "input_image": "image", "input_audio": "audio"}
# Soft tokens of a picture for the values of OpenAI's field `detail`.
DETAILS: dict[str, int | None] = {"low": 70, "auto": None, "high": 560, "original": 1120}


class MediaPart(NamedTuple):
    """A medium of a message: a file or array, as `read_image`, `read_audio` or `read_video` takes it.

    `place` is its place in the messages, for errors. `max_soft_tokens` is the budget of a picture, or None for the
    default. `fps` is the number of frames per second of a video that does not tell it, or None.
    """

    kind: MediaKind
    data: Any
    place: str
    max_soft_tokens: int | None = None
    fps: float | None = None


def take_media(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[MediaPart]]:
    """Return the messages without the data of their media, and the media in order.

    A part of type `image`, `audio` or `video` has its data under the name of the type, `path` or `url`. The parts
    `image_url`, `input_image` and `input_audio` of OpenAI's API are read too. Errors name the place of a part: its
    field `place`, or else where it is in the messages.

    Raises PromptError if a medium is in a message of another role than user, or has no data, and if a user's message
    has parts of other types.
    """
    stripped: list[Mapping[str, Any]] = []
    media: list[MediaPart] = []
    for index, message in enumerate(messages):
        content, where = message.get("content"), f"messages[{index}].content"
        is_user = message.get("role") == "user"
        if isinstance(content, list | tuple) and (is_user or any(map(_kind, content))):
            taken = [_taken(part, f"{where}[{number}]", message["role"]) for number, part in enumerate(content)]
            media += [medium for _, medium in taken if medium is not None]
            message = {**message, "content": [part for part, _ in taken]}
        elif is_user and not isinstance(content, str | None):
            raise PromptError(f"{where}: expected text or a list of parts, found {type(content).__name__}")
        stripped.append(message)
    return stripped, media


def _taken(part: Any, place: str, role: str) -> tuple[dict[str, Any], MediaPart | None]:
    """Return a part of a message for the chat template, and its medium if it is one."""
    kind = _kind(part)
    if kind is not None:
        place = part.get("place") or place
        if role != "user":
            raise PromptError(f"{place}: media must be in a user's message, found role {role!r}")
        return {"type": kind}, _media_part(kind, part, place)
    is_text = isinstance(part, Mapping) and part.get("type") in ("text", "input_text")
    text = part.get("text") if is_text else part
    if not isinstance(text, str):
        types = ", ".join(("text", *_OWN_TYPES, *_OPENAI_TYPES))
        raise PromptError(f"{place}: expected text, or a part whose type is one of {types}, found {part!r}"[:300])
    return {"type": "text", "text": text}, None


def find_mark(prompt: str | Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return the place of the first mark of media in the texts of a prompt, and the mark; None if there is none.

    The model would see a picture or sound there that was not given.
    """
    named = (
        [("the prompt", prompt)] if isinstance(prompt, str) else [(f"messages[{i}]", m) for i, m in enumerate(prompt)]
    )
    for place, value in named:
        for text in _strings(value):
            if found := _ANY_MARK.search(text):
                return place, found[0]
    return None


def split_at_media(text: str, media: Sequence[MediaPart]) -> list[str]:
    """Return the texts around the media of a rendered conversation: one more than there are media.

    Raises PromptError if the chat template has not written one placeholder for each medium, in their order.
    """
    texts = re.split("|".join(map(re.escape, PLACEHOLDERS)), text)
    found = [PLACEHOLDERS[mark] for mark in re.findall("|".join(map(re.escape, PLACEHOLDERS)), text)]
    wanted = [part.kind for part in media]
    if found != wanted:
        raise PromptError(f"the chat template wrote places for {found} where the messages have {wanted}")
    return texts


def _kind(part: Any) -> MediaKind | None:
    """Return the kind of a part of a message's content, or None if it is no medium."""
    name = part.get("type") if isinstance(part, Mapping) else None
    return {**_OWN_TYPES, **_OPENAI_TYPES}.get(name) if isinstance(name, str) else None


def _media_part(kind: MediaKind, part: Mapping[str, Any], place: str) -> MediaPart:
    if part["type"] in _OPENAI_TYPES:
        return _openai_part(kind, part, place)
    known = ("type", "place", kind, *_DATA_NAMES, *_OPTIONS[kind])
    # Datasets write null for the fields that other parts have.
    unknown = [name for name, value in part.items() if name not in known and value is not None]
    if unknown:
        raise PromptError(f"{place}: expected the fields {', '.join(known)}, found {unknown[0]!r}")
    names = [name for name in (kind, *_DATA_NAMES) if part.get(name) is not None]
    if len(names) != 1:
        expected = ", ".join((kind, *_DATA_NAMES))
        raise PromptError(f"{place}: expected exactly one of the fields {expected}, found {names or sorted(part)}")
    return MediaPart(kind, part[names[0]], place, part.get("max_soft_tokens"), part.get("fps"))


def _openai_part(kind: MediaKind, part: Mapping[str, Any], place: str) -> MediaPart:
    """Read a part of OpenAI's form. Its field has the name of its type, except in `input_image`."""
    name = "image_url" if kind == "image" else "input_audio"
    value = part.get(name)
    inner = value if isinstance(value, Mapping) else {"url" if kind == "image" else "data": value}
    data = inner.get("url" if kind == "image" else "data")
    if not isinstance(data, str) or not data:
        raise PromptError(f"{place}.{name}: expected the data of a medium, found {value!r}"[:300])
    if kind == "audio":
        return MediaPart(kind, f"data:audio/{inner.get('format', 'wav')};base64,{data}", place)
    detail = inner.get("detail") or part.get("detail") or "auto"
    if detail not in DETAILS:
        raise PromptError(f"{place}.detail: expected one of {', '.join(DETAILS)}, found {detail!r}")
    return MediaPart(kind, data, place, DETAILS[detail])


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
