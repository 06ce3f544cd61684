"""Sounds to frames: files of several formats, resampling, log-mel frames, and what is refused."""

import math
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from mlx_mtp.errors import MediaError
from mlx_mtp.media.audio import AudioData, log_mel, read_audio

RATE = 16_000
Samples = NDArray[np.float32]


def noise(count: int, rate: int = RATE) -> Samples:
    """Return noise without frequencies above 2 kHz, from -0.5 to 0.5."""
    spectrum = np.fft.rfft(np.random.default_rng(count).standard_normal(count))
    spectrum[np.fft.rfftfreq(count, 1 / rate) > 2000] = 0
    values = np.fft.irfft(spectrum, count)
    scaled: Samples = (0.5 * values / np.abs(values).max()).astype(np.float32)
    return scaled


def tone(frequency: float, seconds: float, rate: int) -> Samples:
    values: Samples = (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)
    return values


def difference(found: Samples, expected: Samples) -> float:
    """Return the root mean square of the difference, relative to the expected samples.

    A delay by one sample makes it 0.45 for `noise`.
    """
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def encoded(samples: Samples, rate: int, format: str, subtype: str | None = None) -> bytes:
    stream = BytesIO()
    soundfile.write(stream, samples, rate, format=format, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("format", "subtype", "error"),
    [
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "PCM_16", 2e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_U8", 0.05),
        ("WAV", "ULAW", 0.02),
        ("AIFF", "PCM_16", 2e-4),
        ("FLAC", "PCM_16", 2e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.25),
        ("OGG", "OPUS", 0.25),
        ("MP3", None, 0.25),
    ],
)
def test_formats_give_the_samples_back(format: str, subtype: str | None, error: float) -> None:
    samples = noise(RATE)
    clip = read_audio(encoded(samples, RATE, format, subtype))
    assert clip.samples.dtype == np.float32
    assert clip.samples.shape == (RATE,)
    assert difference(clip.samples, samples) <= error


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_what_both_rates_can_hold(rate: int) -> None:
    clip = read_audio((tone(1000, 1, rate), rate))
    assert clip.samples.shape == (RATE,)
    # The edges are rounded off.
    inside = slice(500, -500)
    assert np.abs(clip.samples - tone(1000, 1, RATE))[inside].max() < 1e-3


def test_resampling_removes_what_16_khz_cannot_hold() -> None:
    clip = read_audio((tone(10_000, 1, 48_000), 48_000))
    assert np.abs(clip.samples)[500:-500].max() < 1e-4


def test_channels_are_mixed() -> None:
    left, right = noise(3000), noise(3000)[::-1]
    both = np.stack([left, right, right], axis=1)
    expected = both.mean(axis=1)
    for data in ((both, RATE), encoded(both, RATE, "WAV", "FLOAT"), (both.astype(np.float64), RATE)):
        assert np.array_equal(read_audio(data).samples, expected)


def test_a_long_file_is_decoded_whole() -> None:
    """The file is decoded in several blocks."""
    samples = np.stack([noise(200_000), noise(200_000)], axis=1)
    assert np.array_equal(read_audio(encoded(samples, RATE, "WAV", "FLOAT")).samples, samples[:, 0])


def test_ways_to_give_a_sound(tmp_path: Path) -> None:
    samples = np.round(noise(4000) * 32767).astype(np.int16)
    data = encoded(samples, RATE, "WAV", "PCM_16")  # type: ignore[arg-type]
    file = tmp_path / "sound"
    file.write_bytes(data)
    floats = samples.astype(np.float64) / 32768
    given: list[AudioData] = [data, file, str(file), (samples, RATE), (floats, RATE), (floats[:, None], RATE)]
    given.append((samples, np.int16(RATE)))  # type: ignore[arg-type]
    assert len({read_audio(one).digest for one in given}) == 1
    samples[0] += 1
    assert read_audio((samples, RATE)).digest != read_audio(data).digest


def test_a_file_that_was_cut_off_has_no_samples_of_its_own() -> None:
    """Decoders accept such an mp3 file, and give the samples that they have."""
    samples = noise(3 * RATE)
    whole = encoded(samples, RATE, "MP3")
    cut = read_audio(whole[: len(whole) // 2]).samples
    assert RATE < len(cut) < 2 * RATE
    assert difference(cut[:-2000], samples[: len(cut) - 2000]) < 0.25
    assert np.abs(cut).max() < 0.6


@pytest.mark.parametrize(
    ("samples", "frames", "mel_tokens", "raw_tokens"),
    [
        (161, 1, 1, 1),
        (640, 3, 1, 1),
        (641, 4, 1, 2),
        (801, 5, 2, 2),
        (16_000, 99, 25, 25),
        (16_001, 100, 25, 26),
        (480_000, 2999, 750, 750),
    ],
)
def test_counts(samples: int, frames: int, mel_tokens: int, raw_tokens: int) -> None:
    clip = read_audio((np.zeros(samples, np.float32), RATE))
    assert clip.log_mel().shape == (frames, 128)
    assert clip.mel_tokens == mel_tokens == math.ceil(math.ceil(frames / 2) / 2)
    assert clip.raw_frames().shape == (raw_tokens, 640)
    assert clip.raw_tokens == raw_tokens


def test_no_frame_below_161_samples() -> None:
    assert log_mel(np.zeros(160, np.float32)).shape == (0, 128)
    assert log_mel(np.zeros(0, np.float32)).shape == (0, 128)


def test_raw_frames_end_in_zeros() -> None:
    samples = noise(1000)
    frames = read_audio((samples, RATE)).raw_frames()
    assert frames.dtype == np.float32
    assert np.array_equal(frames.reshape(-1)[:1000], samples)
    assert not frames.reshape(-1)[1000:].any()


@pytest.mark.parametrize("frequency", [300, 1000, 4000, 7000])
def test_a_tone_is_loudest_in_its_mel_bin(frequency: float) -> None:
    """The middles of the bins are equally far apart on the mel scale, 129 steps to 8 kHz."""
    frames = read_audio((tone(frequency, 1, RATE), RATE)).log_mel()
    expected = np.log10(1 + frequency / 700) / np.log10(1 + 8000 / 700) * 129 - 1
    assert abs(frames[50].argmax() - expected) <= 1
    # The bins far away have the smallest value, the logarithm of 0.001, and what the window lets through.
    assert frames[50].min() < np.log(0.0015)


def test_a_frame_computed_by_its_definition() -> None:
    """Frame 3 begins 160 * 3 - 160 samples after the beginning."""
    samples = noise(2000)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(320) / 320)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(320)) / 512)
    spectrum = np.abs(waves @ (samples[320:640] * window))

    def mel(frequency: NDArray[np.float64] | float) -> Any:
        return 2595 * np.log10(1 + np.asarray(frequency) / 700)

    corners = 700 * (10 ** (np.arange(130) * mel(8000.0) / 129 / 2595) - 1)
    frequencies = np.arange(257) * 31.25
    energies = [np.interp(frequencies, corners[i : i + 3], [0, 1, 0]) @ spectrum for i in range(128)]
    assert np.allclose(np.exp(log_mel(samples)[3]) - 0.001, energies, rtol=1e-5, atol=2e-6)


SILENCE = np.zeros(8000, np.float32)
REFUSED: dict[str, tuple[Any, str]] = {
    "no bytes": (b"", "expected the bytes of a file, found 0 bytes"),
    "text": (b"hello" * 100, "expected a sound in a format of libsndfile, .*, found other or damaged data"),
    "another type": (3, "expected a path or bytes, found int"),
    "truncated FLAC": (encoded(noise(20_000), RATE, "FLAC")[:5000], "expected a sound in a format .* lost sync"),
    "truncated Ogg": (encoded(noise(20_000), RATE, "OGG")[:2000], "expected a sound in a format of libsndfile"),
    "truncated WAV": (encoded(noise(20_000), RATE, "WAV")[:5000], "expected 40044 bytes, .* found 5000: .* truncated"),
    "truncated AIFF": (
        encoded(noise(20_000), RATE, "AIFF")[:5000],
        "expected 400.. bytes, .* found 5000: the file is truncated",
    ),
    "truncated header": (
        encoded(SILENCE, RATE, "WAV")[:30],
        "expected 16044 bytes, .* found 30: the file is truncated",
    ),
    "short": ((SILENCE[:160], RATE), "length: expected at least 161 samples at 16 kHz, found 160"),
    "short at 48 kHz": ((SILENCE[:480], 48_000), "length: expected at least 161 samples at 16 kHz, found 160"),
    "empty": ((SILENCE[:0], RATE), "length: expected at least 161 samples at 16 kHz, found 0"),
    "empty file": (encoded(SILENCE[:0], RATE, "WAV"), "length: expected at least 161 samples at 16 kHz, found 0"),
    "long": ((np.zeros(480_001, np.float32), RATE), "length: expected at most 30 seconds, found 30.00"),
    "long at 8 kHz": ((np.zeros(240_001, np.float32), 8000), "length: expected at most 30 seconds"),
    "long file": (encoded(np.zeros(48_000 * 31, np.float32), 48_000, "FLAC"), "length: .* at most 30 .* found 31.00"),
    "not a number": ((np.full(800, np.nan), RATE), "samples: expected finite values, found nan"),
    "infinite": ((np.append(SILENCE, -np.inf), RATE), "samples: expected finite values, found -inf"),
    "infinite in float32": ((np.full(800, 1e300), RATE), "samples: expected finite values, found inf"),
    "not a number at 8 kHz": ((np.full(8000, np.nan), 8000), "samples: expected finite values, found nan"),
    "not a number in a file": (
        encoded(np.full(800, np.nan, np.float32), RATE, "WAV", "FLOAT"),
        "samples: .* found nan",
    ),
    "32-bit integers": ((np.zeros(800, np.int32), RATE), "samples: expected floats .* or int16, found int32"),
    "swapped axes": ((np.zeros((2, 800)), RATE), r"samples: expected the shape \[n\] or .*, found \[2, 800\]"),
    "no channels": ((np.zeros((800, 0)), RATE), r"samples: expected the shape .*, found \[800, 0\]"),
    "three axes": ((np.zeros((800, 1, 1)), RATE), r"samples: expected the shape .*, found \[800, 1, 1\]"),
    "rate of 0": ((SILENCE, 0), "rate: expected 1000 to 384000 Hz, found 0"),
    "high rate": (encoded(SILENCE, 400_000, "WAV"), "rate: expected 1000 to 384000 Hz, found 400000"),
    "text as rate": ((SILENCE, "16k"), "rate: expected 1000 to 384000 Hz, found '16k'"),
    "no rate": ((SILENCE,), "expected a path, bytes or .samples, rate., found a tuple of 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    data, message = REFUSED[what]
    with pytest.raises(MediaError, match=f"^audio: {message}"):
        read_audio(data)


def test_files_that_are_too_long_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(MediaError, match="at most 30 seconds"):
        read_audio(encoded(np.zeros(31 * 8000, np.float32), 8000, "OGG"))
    with pytest.raises(MediaError, match="decoded"):
        read_audio(encoded(SILENCE, RATE, "OGG"))


def test_thirty_seconds_are_not_too_long() -> None:
    for rate in (8000, 11_025, 16_000, 44_100):
        assert len(read_audio((np.zeros(30 * rate, np.float32), rate)).samples) == 480_000


def test_errors_name_the_place_and_the_path(tmp_path: Path) -> None:
    file = tmp_path / "sound.raw"
    file.write_bytes(b"hello" * 100)
    with pytest.raises(MediaError, match=rf"^messages\[0\]\.content\[2\]: {file}: "):
        read_audio(file, place="messages[0].content[2]")
    with pytest.raises(MediaError, match=rf"^{file}x: no such file$"):
        read_audio(f"{file}x")


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MediaError, match=rf"^audio: needs {package}: pip install 'mlx-mtp\[media\]'$"):
        read_audio(encoded(SILENCE, 8000, "WAV"))
