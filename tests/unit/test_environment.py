"""The machine and the models that the reports of `bench` and `probe` name."""

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from support.commands import run

import mlx_mtp
from mlx_mtp.bench.environment import environment, models

TinyPair = Callable[[str], Path]


def test_a_mac_is_named_by_its_chip_and_its_system(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"device_name": "Apple M4 Max", "memory_size": 64 * 2**30}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.6", ("", "", ""), "arm64"))
    found = environment()
    assert (found["chip"], found["memory"], found["os"]) == ("Apple M4 Max", 64 * 2**30, "macOS 15.6")


def test_a_cuda_device_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "NVIDIA H200", "total_memory": 141 * 2**30})
    found = environment()
    assert (found["chip"], found["memory"]) == ("NVIDIA H200", 141 * 2**30)


def test_a_system_without_a_release_file_is_named_by_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dict[str, str]:
        raise OSError

    monkeypatch.setattr(platform, "mac_ver", lambda: ("", ("", "", ""), ""))
    monkeypatch.setattr(platform, "freedesktop_os_release", missing)
    assert environment()["os"] == f"{platform.system()} {platform.release()}"


def test_a_model_of_the_hub_is_named_by_its_id(tiny_pair: TinyPair, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--google--gemma-4-E2B-it" / "snapshots" / "0123456789abcdef"
    shutil.copytree(tiny_pair("e2b") / "target", snapshot)
    found = models(mlx_mtp.load(snapshot, drafter=tiny_pair("e2b") / "target-assistant"))
    assert (found["target"], found["drafter"]) == ("google/gemma-4-E2B-it", "target-assistant")


def test_the_demo_pair_and_a_model_without_a_drafter() -> None:
    found = models(mlx_mtp.load(mlx_mtp.DEMO_PAIR, drafter="none"))
    assert found == {
        "target": "demo pair",
        "target_quantization": None,
        "drafter": None,
        "drafter_quantization": None,
    }


def test_the_quantization_of_a_converted_pair(tiny_pair: TinyPair, tmp_path: Path) -> None:
    output = tmp_path / "tiny-8bit"
    run("convert.cli", "--hf-path", tiny_pair("31b") / "target", "--mlx-path", output, "-q", "--q-bits", "8")
    found = models(mlx_mtp.load(output))
    assert (found["target"], found["drafter"]) == ("tiny-8bit", "drafter")
    assert found["target_quantization"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert found["drafter_quantization"] == {"bits": 4, "group_size": 64, "mode": "affine"}
