"""The example app: a complete run without a window, as a process, and its bridge."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp

APP = Path(__file__).parents[2] / "examples" / "python_app"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(APP / "src"), *sys.path])
    command = [sys.executable, "-m", "mlx_mtp_app", "--headless", *args]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


def test_its_whole_life_without_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    result = run("--prompt", "def add(a, b):")
    assert result.returncode == 0, result.stderr
    before, loaded, after = (
        float(re.search(rf"^memory {when}: ([\d.]+) MB$", result.stdout, re.M).group(1))  # type: ignore[union-attr]
        for when in ("before", "loaded", "after")
    )
    assert before == after < 0.1 < 7 < loaded
    assert [int(n) for n in re.findall(r"^load: (\d+) %$", result.stdout, re.M)] == list(range(0, 101, 10))
    # The sampled text depends on the measured costs of rounds, so it can be short.
    shape = r"^answer: prefill: 100 %\n(.+)\nstopped after (\d+) pieces\nmemory after"
    found = re.search(shape, result.stdout, re.M | re.S)
    assert found is not None, result.stdout
    assert 1 <= int(found.group(2)) <= 10
    # The app enabled the library's log messages. There is no other output.
    logged = [line.split(":")[1] for line in result.stderr.splitlines()]
    assert logged == ["mlx_mtp.loading", "mlx_mtp.decoding.calibration", "mlx_mtp.loaded_model"]


def test_an_error_is_said_in_one_line() -> None:
    result = run("--model", "absent")
    assert result.returncode == 1
    assert result.stderr == "error: absent: no such folder\n"


def test_loading_can_be_cancelled_and_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(APP / "src"))
    from mlx_mtp_app.bridge import Bridge

    before = mx.get_active_memory()
    seen: list[int] = []

    async def main() -> None:
        bridge = Bridge(lambda what, done, total: seen.append(done) if what == "load" else None)
        task = asyncio.create_task(bridge.load())
        while not seen:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await bridge.close()
        await bridge.load()
        answer = bridge.ask("def f():")
        assert isinstance(await anext(answer), str)
        await bridge.close()
        with pytest.raises(mlx_mtp.ClosedError):
            async for _ in answer:
                pass

    asyncio.run(main())
    assert mx.get_active_memory() - before < 4096


def test_everything_compiles() -> None:
    """The window's toolkit is not installed for tests."""
    for file in APP.rglob("*.py"):
        compile(file.read_text(), file, "exec")
