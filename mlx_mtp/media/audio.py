"""From a sound to frames: decoding, mixed to one channel, resampled to 16 kHz, and cut into the frames of a network."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_mtp.errors import MediaError

from .sources import content_hash, decoding, open_source, require, source_name

Samples = NDArray[np.float32]
# A file, or samples [n] or [n, channels] with their rate in Hz. Samples are floats from -1 to 1, or int16.
AudioData = str | Path | bytes | tuple[NDArray[np.generic], int]

# The rate of all networks in Hz, and the lengths of clips in samples of that rate: 30 seconds, and one log-mel frame.
RATE = 16_000
MOST_SAMPLES = 30 * RATE
LEAST_SAMPLES = 161
# The rates of files in Hz that are resampled. Others would take much time or memory, and no recorder writes them.
LOWEST_RATE, HIGHEST_RATE = 1_000, 384_000
# The samples of a frame for the embedder of the 12B model, which takes them as they are.
RAW_FRAME = 640

# A log-mel frame takes 320 samples (20 ms) every 160, and one sample more must exist. The sound begins in the middle of
# the first frame.
_WINDOW, MEL_STEP = 320, 160
_FFT_LENGTH = 512
MEL_BINS = 128
# What is added to the energies before the logarithm.
_FLOOR = 1e-3
# Programs that record to a pipe write such a size or a larger one into the header.
_UNKNOWN_SIZE = 0x7F000000
# The number of samples per channel that are decoded at a time.
_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class Clip:
    """A sound: `samples` [n] of float32, 16 kHz, one channel. `digest` is the hash of its content."""

    samples: Samples
    digest: str

    @property
    def mel_tokens(self) -> int:
        """Return the number of soft tokens of the audio tower, which halves the number of log-mel frames twice."""
        frames = (len(self.samples) - LEAST_SAMPLES) // MEL_STEP + 1
        return -(-frames // 4)

    @property
    def raw_tokens(self) -> int:
        """Return the number of soft tokens of the 12B model."""
        return -(-len(self.samples) // RAW_FRAME)

    def log_mel(self) -> NDArray[np.float32]:
        """Return the log-mel frames of the audio tower [frames, 128]."""
        return log_mel(self.samples)

    def raw_frames(self) -> NDArray[np.float32]:
        """Return the frames of the 12B model [n, 640]. Zeros fill the last one."""
        padded = np.pad(self.samples, (0, -len(self.samples) % RAW_FRAME))
        return padded.reshape(-1, RAW_FRAME)


def read_audio(data: AudioData, *, place: str = "") -> Clip:
    """Read a sound, mix it to one channel, and resample it to 16 kHz.

    `place` is the place of the sound in a request, for errors. Raises MediaError if it cannot be read, is longer than
    30 seconds or shorter than 161 samples, or has values that are not finite. The mean of the channels and soxr's
    quality HQ are what transformers uses to load a sound.
    """
    name = source_name(data, place, "audio")
    if isinstance(data, tuple) and len(data) != 2:
        raise MediaError(f"{name}: expected a path, bytes or (samples, rate), found a tuple of {len(data)}")
    with decoding(name):
        mono, rate = _given(*data, name) if isinstance(data, tuple) else _decoded(data, name)
        if rate != RATE:
            mono = require("soxr", "soxr", "media", name).resample(mono, rate, RATE, quality="HQ")
    if len(mono) < LEAST_SAMPLES:
        raise MediaError(f"{name}: length: expected at least {LEAST_SAMPLES} samples at 16 kHz, found {len(mono)}")
    if not np.isfinite(mono).all():
        raise MediaError(f"{name}: samples: expected finite values, found {mono[~np.isfinite(mono)][0]}")
    return Clip(mono, content_hash("audio", mono))


def log_mel(samples: Samples) -> NDArray[np.float32]:
    """Return the log-mel frames [(n - 161) // 160 + 1, 128] of samples [n] at 16 kHz, none below 161 samples.

    The values are those of transformers' `Gemma4AudioFeatureExtractor`, bit for bit.
    """
    padded = np.pad(samples, (_WINDOW // 2, 0))
    if len(padded) <= _WINDOW:
        return np.zeros((0, MEL_BINS), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW + 1)[::MEL_STEP, :-1]
    energies = np.abs(np.fft.rfft(frames * _hann(), n=_FFT_LENGTH)) @ _mel_filters()
    return np.log(energies + _FLOOR).astype(np.float32)


@cache
def _hann() -> NDArray[np.float32]:
    """Return the periodic Hann window [320]."""
    return np.hanning(_WINDOW + 1)[:-1].astype(np.float32)


@cache
def _mel_filters() -> NDArray[np.float64]:
    """Return triangles over the frequencies [257, 128], equally wide on the HTK mel scale from 0 to 8000 Hz."""
    highest = RATE / 2
    mels = np.linspace(0, 2595 * np.log10(1 + highest / 700), MEL_BINS + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)
    frequencies = np.linspace(0, highest, _FFT_LENGTH // 2 + 1)[:, None]
    widths = np.diff(corners)
    rising = (frequencies - corners[:-2]) / widths[:-1]
    falling = (corners[2:] - frequencies) / widths[1:]
    filters: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    return filters


def _decoded(data: object, name: str) -> tuple[Samples, int]:
    """Decode a file. Returns its samples, mixed to one channel, and its rate.

    An MP3 that was cut off gives the samples that it still has, because its length is written nowhere.
    """
    soundfile = require("soundfile", "soundfile", "media", name)
    try:
        with open_source(data, name) as file:
            _check_whole(file, name)
            with soundfile.SoundFile(file) as sound:
                _check_length(sound.frames, sound.samplerate, name)
                return np.concatenate([np.zeros(0, np.float32), *_mixed_blocks(sound)]), sound.samplerate
    except soundfile.LibsndfileError as error:
        expected = "a sound in a format of libsndfile, such as WAV, FLAC, Ogg or MP3"
        raise MediaError(f"{name}: expected {expected}, found other or damaged data: {error.error_string}") from None


def _check_whole(file: BinaryIO, name: str) -> None:
    """Raise MediaError if a WAV or AIFF file is shorter than its header says. The decoder would read what is there."""
    head = file.read(12)
    order: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"FORM": "big"}
    size = int.from_bytes(head[4:8], order[head[:4]]) + 8 if head[:4] in order else 0
    found = file.seek(0, os.SEEK_END)
    file.seek(0)
    # Some programs leave out the byte after data of an odd size.
    if found + 1 < size < _UNKNOWN_SIZE:
        raise MediaError(f"{name}: expected {size} bytes, as its header says, found {found}: the file is truncated")


def _mixed_blocks(sound: Any) -> Iterator[Samples]:
    """Decode a sound block by block, each mixed to one channel: 1000 channels take no more memory than one."""
    # `SoundFile.blocks` would return memory that nothing was written to where a file ends early.
    while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
        yield block.mean(axis=1)


def _given(samples: NDArray[np.generic], rate: int, name: str) -> tuple[Samples, int]:
    """Check samples that a caller gives. Returns them, mixed to one channel, and their rate."""
    values = np.asarray(samples)
    if values.dtype != np.int16 and not np.issubdtype(values.dtype, np.floating):
        raise MediaError(f"{name}: samples: expected floats from -1 to 1 or int16, found {values.dtype}")
    # More channels than samples are swapped axes.
    if values.ndim not in (1, 2) or (values.ndim == 2 and not 0 < values.shape[1] <= values.shape[0]):
        raise MediaError(f"{name}: samples: expected the shape [n] or [n, channels], found {list(values.shape)}")
    _check_length(len(values), rate, name)
    # Values that float32 cannot hold become infinite, which the caller refuses.
    with np.errstate(over="ignore"):
        floats: Samples = values.astype(np.float32)
    if values.dtype == np.int16:
        floats /= 32768
    return floats if floats.ndim == 1 else floats.mean(axis=1), int(rate)


def _check_length(samples: int, rate: int, name: str) -> None:
    """Raise MediaError if a rate cannot be resampled, or if a sound is longer than 30 seconds."""
    if not isinstance(rate, int | np.integer) or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise MediaError(f"{name}: rate: expected {LOWEST_RATE} to {HIGHEST_RATE} Hz, found {rate!r}")
    if samples * RATE > MOST_SAMPLES * int(rate):
        raise MediaError(f"{name}: length: expected at most 30 seconds, found {samples / rate:.2f}")
