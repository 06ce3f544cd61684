"""The machine, the software and the models of a measurement, for the reports of `bench` and `probe`.

Reports are sent to others. So they have the names of models, and no paths of the machine.
"""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.config import Quantization
from mlx_mtp.loading import DEMO_PAIR
from mlx_mtp.memory_plan import memory_size
from mlx_mtp.model import Model

_PACKAGES = ("mlx-mtp", "mlx", "mlx-lm", "numpy")


def environment() -> dict[str, Any]:
    """Return the chip, its memory in bytes, the operating system, and the versions of Python and the packages.

    The chip is the device that computes: a Mac's chip, a CUDA device, or a processor. A CUDA device has memory of its
    own, and its size is the memory's size.
    """
    info = mx.device_info()
    machine = {
        "chip": info.get("device_name") or platform.machine(),
        "memory": int(info.get("total_memory") or memory_size()),
        "cores": os.cpu_count(),
        "device": str(mx.default_device()),
        "os": _operating_system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    return machine | {name: version(name) for name in _PACKAGES}


def _operating_system() -> str:
    """Return the name and version of the operating system, such as "macOS 15.6" or "Debian GNU/Linux 12 (bookworm)"."""
    if macos := platform.mac_ver()[0]:
        return f"macOS {macos}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return f"{platform.system()} {platform.release()}"


def models(model: Model) -> dict[str, Any]:
    """Return the names of the target and the drafter, and the quantization of their weights. None: no drafter.

    `machines` describes how several machines share the target, if they do.
    """
    target, drafter = model.config, model.drafter_config
    return {
        "target": _name(target.path.parent),
        "target_quantization": _quantization(target.quantization),
        "drafter": None if drafter is None else _name(drafter.path.parent),
        "drafter_quantization": None if drafter is None else _quantization(drafter.quantization),
    } | ({} if model.target.sharing is None else {"machines": model.target.sharing})


def _name(folder: Path) -> str:
    """Return the hub id of a folder in the hub's cache (`models--OWNER--NAME/snapshots/REVISION`), else its name."""
    folder = folder.resolve()
    if folder == DEMO_PAIR.resolve():
        return "demo pair"
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _quantization(quantization: Quantization | None) -> dict[str, Any] | None:
    if quantization is None:
        return None
    return {"bits": quantization.bits, "group_size": quantization.group_size, "mode": quantization.mode}
