"""Signs of progress on a terminal: bars, and a note while the device takes its time."""

import sys
import time
from collections.abc import Iterator

import pytest

from mlx_mtp import command_line
from mlx_mtp.command_line import print_stream, progress_bar
from mlx_mtp.decoding.report import Stats
from mlx_mtp.responses import GenerationResponse

NOTE = "waiting for the device"


def responses(waits: list[float]) -> Iterator[GenerationResponse]:
    for wait in waits:
        time.sleep(wait)
        yield GenerationResponse(
            text="a",
            token=1,
            from_draft=False,
            prompt_tokens=1,
            generation_tokens=1,
            prompt_tps=1.0,
            generation_tps=1.0,
            peak_memory=0.0,
            finish_reason=None,
            stats=Stats(),
        )


@pytest.mark.parametrize(("terminal", "waits", "notes"), [(True, [0.6, 0.0, 0.6], 1), (False, [0.6], 0), (True, [], 0)])
def test_one_note_for_a_long_wait(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    waits: list[float],
    notes: int,
) -> None:
    monkeypatch.setattr(command_line, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    seen, interrupted = print_stream(responses(waits))
    assert len(seen) == len(waits)
    assert not interrupted
    output = capsys.readouterr()
    assert output.out == "a" * len(waits) + "\n"
    assert output.err.count(NOTE) == notes


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar("Loading", unit="B", mininterval=0) as on_load:
        on_load(1, 4)
        on_load(4, 4)
    assert ("Loading: 100%" in capsys.readouterr().err) == terminal
