"""How a command begins: Ctrl-C ends it from the first moment on.

Imports nothing that takes time, and is imported before anything that does.
"""

import os
import signal
from importlib import import_module

# What a shell expects of a program ended by Ctrl-C.
INTERRUPTED = 130


def run_command(module: str) -> int:
    """Import a module of this package and run its `main`. Returns the exit status, INTERRUPTED after Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    # Not where it is ignored, as in what a shell runs in the background.
    if handler is signal.default_int_handler:
        # Without unwinding: there is nothing to save yet, and an imported package may catch the exception.
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    main = import_module(f"{__package__}.{module}").main
    signal.signal(signal.SIGINT, handler)
    try:
        status: int = main()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED


def bench() -> int:
    return run_command("bench.cli")


def chat() -> int:
    return run_command("chat")


def convert() -> int:
    return run_command("convert.cli")


def generate() -> int:
    return run_command("generate")


def probe() -> int:
    return run_command("probe")


def serve() -> int:
    return run_command("server.cli")


def train() -> int:
    return run_command("train")
