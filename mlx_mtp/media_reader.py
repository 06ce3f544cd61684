"""From the media of a prompt to rows of the text decoder: files are read, and networks turn them into features."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import mlx.core as mx

from mlx_mtp.checkpoints.config import TargetConfig, read_json
from mlx_mtp.checkpoints.layouts import audio_names, vision_names
from mlx_mtp.checkpoints.media_config import MediaConfig, UnifiedAudioConfig, read_media_config
from mlx_mtp.checkpoints.tensors import read_checkpoint
from mlx_mtp.decoding.prompt_media import MediaSpan
from mlx_mtp.gemma4.media_towers import MediaTowers
from mlx_mtp.media.audio import Clip, read_audio
from mlx_mtp.media.images import DEFAULT_BUDGET, Picture, read_image
from mlx_mtp.media.video import DEFAULT_FPS, read_video
from mlx_mtp.text.media_parts import MediaKind, MediaPart

from .errors import ConfigError, ContextLengthError, WeightsError

# The features of the last media are kept up to this size. A picture of 280 soft tokens takes 0.9 to 3 MB.
_KEPT_BYTES = 128_000_000

# A function that returns the token ids of a text.
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, eq=False)
class _Soft:
    """Soft tokens of a medium. `digest` and `features` are those of `MediaSpan`."""

    kind: MediaKind
    count: int
    digest: str
    features: Callable[[], mx.array]


class MediaReader:
    """The media parts of a model. Networks are read from the folder when a prompt has the first picture or sound.

    The features of the last media are kept by the hash of their content. The media of a prompt may take `max_context`
    tokens.
    """

    def __init__(self, target: TargetConfig, max_context: int) -> None:
        self._target = target
        self._max_context = max_context
        self._features: OrderedDict[str, mx.array] = OrderedDict()

    @cached_property
    def config(self) -> MediaConfig:
        """The media parts of config.json. Raises ConfigError if they are incomplete or not supported."""
        return read_media_config(self._target)

    @cached_property
    def towers(self) -> MediaTowers:
        """The networks, whose tensors are read at their first use."""
        return MediaTowers(self._target, self.config)

    @cached_property
    def _image_budget(self) -> int:
        """The default budget of a picture: that of processor_config.json, or 280."""
        file = self._target.path.parent / "processor_config.json"
        found = read_json(file).get("image_processor") if file.is_file() else None
        budget = found.get("max_soft_tokens") if isinstance(found, dict) else None
        return budget if isinstance(budget, int) else DEFAULT_BUDGET

    @cached_property
    def _marks(self) -> dict[MediaKind, tuple[int, int, int]]:
        """The tokens before, at and after the soft tokens of each kind of media that the checkpoint reads.

        mlx-lm leaves out the tensors of media parts, and not their config.
        """
        ids, vision, audio = self.config.ids, self.config.vision, self.config.audio
        keys = read_checkpoint(self._target.path.parent)
        sees = vision is not None and any(vision_names(key, vision) for key in keys)
        hears = audio is not None and any(audio_names(key, audio) for key in keys)
        named: dict[MediaKind, tuple[int | None, ...]] = {
            "image": (ids.image_start, ids.image, ids.image_end),
            "video": (ids.image_start, ids.video, ids.image_end),
            "audio": (ids.audio_start, ids.audio, ids.audio_end),
        }
        found: dict[MediaKind, tuple[int, int, int]] = {}
        for kind, (before, token, after) in named.items():
            has_part = hears if kind == "audio" else sees
            if has_part and before is not None and token is not None and after is not None:
                found[kind] = before, token, after
        return found

    @cached_property
    def placeholders(self) -> frozenset[int]:
        """The ids of soft tokens. There are none if the media parts cannot be used, or if their files are gone."""
        try:
            return frozenset(token for _, token, _ in self._marks.values())
        except (ConfigError, WeightsError):
            return frozenset()

    @property
    def kinds(self) -> tuple[MediaKind, ...]:
        """The kinds of media that the checkpoint reads. Raises ConfigError as `config` does."""
        return tuple(self._marks)

    def encode(
        self, texts: Sequence[str], parts: Sequence[MediaPart], encode: Encode
    ) -> tuple[list[int], list[MediaSpan]]:
        """Return the token ids of texts with media between them, and the spans of the media.

        `texts` has one more item than `parts`, which are of the checkpoint's kinds. Raises MediaError if a medium
        cannot be read, and ContextLengthError if the media do not fit the context.
        """
        pieces: list[str | _Soft] = [texts[0]]
        count = 0
        for part, text in zip(parts, texts[1:], strict=True):
            read = [*self._read(part), text]
            # Files of a few bytes can be thousands of large pictures, so the others are not read then.
            count += sum(piece.count for piece in read if not isinstance(piece, str))
            if count > self._max_context:
                found = f"the media up to here take {count} tokens, but the context holds {self._max_context}"
                raise ContextLengthError(f"{part.place}: {found}")
            pieces += read
        tokens: list[int] = []
        spans: list[MediaSpan] = []
        for piece in _joined(pieces):
            if isinstance(piece, str):
                tokens += encode(piece)
                continue
            before, token, after = self._marks[piece.kind]
            both = self.config.sees_both_ways and piece.kind != "audio"
            spans.append(MediaSpan(len(tokens) + 1, piece.count, piece.digest, piece.features, both))
            tokens += [before, *[token] * piece.count, after]
        return tokens, spans

    def _read(self, part: MediaPart) -> "Iterator[str | _Soft]":
        """Yield the soft tokens of a medium, and the texts that belong to it."""
        if part.kind == "audio":
            clip = read_audio(part.data, place=part.place)
            count = clip.raw_tokens if self._hears_samples else clip.mel_tokens
            yield _Soft("audio", count, clip.digest, partial(self._kept, clip.digest, partial(self._hear, clip)))
        elif part.kind == "image":
            budget = self._image_budget if part.max_soft_tokens is None else part.max_soft_tokens
            yield self._soft_picture("image", read_image(part.data, budget=budget, place=part.place))
        else:
            video = read_video(part.data, fps=DEFAULT_FPS if part.fps is None else part.fps, place=part.place)
            for number, (frame, seconds) in enumerate(zip(video.frames, video.times, strict=True)):
                minutes, rest = divmod(int(seconds), 60)
                yield f"{' ' if number else ''}{minutes:02d}:{rest:02d} "
                yield self._soft_picture("video", frame)

    def _soft_picture(self, kind: MediaKind, picture: Picture) -> "_Soft":
        features = partial(self._kept, picture.digest, partial(self._see, picture))
        return _Soft(kind, picture.tokens, picture.digest, features)

    @property
    def _hears_samples(self) -> bool:
        return isinstance(self.config.audio, UnifiedAudioConfig)

    def _see(self, picture: "Picture") -> mx.array:
        vision = self.towers.vision
        assert vision is not None
        return vision(mx.array(picture.values))

    def _hear(self, clip: "Clip") -> mx.array:
        audio = self.towers.audio
        assert audio is not None
        return audio(mx.array(clip.raw_frames() if self._hears_samples else clip.log_mel()))

    def _kept(self, digest: str, compute: Callable[[], mx.array]) -> mx.array:
        """Return the features of a medium, computed or kept."""
        if digest not in self._features:
            features = compute()
            # An array that is not evaluated belongs to this thread's stream and cannot be used on another thread.
            mx.eval(features)
            self._features[digest] = features
            while len(self._features) > 1 and sum(kept.nbytes for kept in self._features.values()) > _KEPT_BYTES:
                self._features.popitem(last=False)
        self._features.move_to_end(digest)
        return self._features[digest]


def _joined(pieces: Sequence[str | _Soft]) -> Iterator[str | _Soft]:
    """Yield the pieces with neighbouring texts joined, so that a tokenizer reads them at once."""
    for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, str)):
        if is_text:
            yield "".join(piece for piece in run if isinstance(piece, str))
        else:
            yield from run
