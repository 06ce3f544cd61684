"""The entry points of the commands: Ctrl-C ends a command from the first moment on.

This module imports nothing that takes time. A command imports it before any module that takes time.
"""

import os
import signal
from importlib import import_module

# The exit status that a shell expects of a program that Ctrl-C ended.
INTERRUPTED = 130


def run_command(module: str) -> int:
    """Import a module of this package and run its `main`. Return the exit status; INTERRUPTED after Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    # The signal stays ignored if it is ignored, as in a background job of a shell.
    if handler is signal.default_int_handler:
        # Exit without an exception: there is nothing to save yet, and an imported package may catch the exception.
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    main = import_module(f"{__package__}.{module}").main
    signal.signal(signal.SIGINT, handler)
    try:
        status: int = main()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED


def bench() -> int:
    """Run the command `mlx-mtp-bench`."""
    return run_command("bench.cli")


def chat() -> int:
    """Run the command `mlx-mtp-chat`."""
    return run_command("chat")


def convert() -> int:
    """Run the command `mlx-mtp-convert`."""
    return run_command("convert.cli")


def generate() -> int:
    """Run the command `mlx-mtp-generate`."""
    return run_command("generate")


def probe() -> int:
    """Run the command `mlx-mtp-probe`."""
    return run_command("probe")


def serve() -> int:
    """Run the command `mlx-mtp-server`."""
    return run_command("server.cli")


def train() -> int:
    """Run the command `mlx-mtp-train`."""
    return run_command("train")
