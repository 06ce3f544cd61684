"""The entry points of the commands: Ctrl-C ends a command from the first moment on.

This module imports nothing that takes time. A command imports it before any module that takes time.
"""

import os
import signal
import sys
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


# The modules of the commands, by name.
_COMMANDS = {
    "generate": "generate",
    "chat": "chat",
    "serve": "server.cli",
    "convert": "convert.cli",
    "bench": "bench.cli",
    "train": "train",
    "probe": "probe",
    "cache-prompt": "cache_prompt",
}


def main() -> int:
    """Run `mlx-mtp COMMAND ...`, which is also `python -m mlx_mtp COMMAND ...`. Return the exit status."""
    usage = f"usage: mlx-mtp {{{','.join(_COMMANDS)}}} ..."
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(f"{usage}\n\nmlx-mtp COMMAND --help describes the options of a command.")
        return 0
    if name not in _COMMANDS:
        found = f"found {name!r}" if name else "found none"
        print(f"{usage}\nerror: expected a command, {found}", file=sys.stderr)
        return 2
    del sys.argv[1]
    return run_command(_COMMANDS[name])


def bench() -> int:
    """Run the command `mlx-mtp-bench`."""
    return run_command(_COMMANDS["bench"])


def chat() -> int:
    """Run the command `mlx-mtp-chat`."""
    return run_command(_COMMANDS["chat"])


def convert() -> int:
    """Run the command `mlx-mtp-convert`."""
    return run_command(_COMMANDS["convert"])


def generate() -> int:
    """Run the command `mlx-mtp-generate`."""
    return run_command(_COMMANDS["generate"])


def probe() -> int:
    """Run the command `mlx-mtp-probe`."""
    return run_command(_COMMANDS["probe"])


def serve() -> int:
    """Run the command `mlx-mtp-server`."""
    return run_command(_COMMANDS["serve"])


def train() -> int:
    """Run the command `mlx-mtp-train`."""
    return run_command(_COMMANDS["train"])
