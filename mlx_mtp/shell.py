"""What a shell gives to a command and expects of it: descriptors, encodings, one line for an error, an exit status."""

import argparse
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .commands import INTERRUPTED
from .errors import MTPError, OutputError, PromptError

_EXPONENT = re.compile(r"-(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_DASHES = re.compile(r"(--[\w-]+=|-\w)--")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage that would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse does, but a negative number with an exponent is a value, as one without is."""
        given: list[str] = []
        for argument in sys.argv[1:] if args is None else args:
            if (match := _DASHES.fullmatch(argument)) is not None:
                # argparse drops the dashes and makes a list of nothing.
                self.error(f"argument {match[1].rstrip('=')}: expected a value, found --")
            if given and given[-1].startswith("-") and _EXPONENT.fullmatch(argument):
                # argparse takes it for an option.
                given[-1] += f"={argument}" if given[-1].startswith("--") else argument
            else:
                given.append(argument)
        return super().parse_args(given, namespace)


def exit_status(run: Callable[[], int]) -> int:
    """Run a command: its own exit status, 1 after an error, which is printed in one line, or 130 after Ctrl-C.

    Warnings of the library go to stderr.
    """
    prepare_streams()
    handler = logging.lastResort
    assert handler is not None
    library = logging.getLogger(__package__)
    library.addHandler(handler)
    try:
        status = run()
        write_out("", end="")
        return status
    except MTPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone.
        return 1
    except OSError as error:
        print(f"error: {_describe(error)}", file=sys.stderr)
        return 1
    finally:
        library.removeHandler(handler)
        _drop_unwritable()


def _describe(error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is None:
        # What asking for the current folder raises.
        return "the current folder is gone: change to another one"
    return str(error)


def prepare_streams() -> None:
    """Open the standard descriptors that are closed, for nothing: MLX takes a file with descriptor 0 for one that could
    not be opened. What stdout's encoding lacks is written as an escape sequence."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Gets the lowest number that is free.
            os.open(os.devnull, os.O_RDWR)
    # None where they were closed when Python began.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # In UTF-8, bytes of a path that are no text may go through as they came.
    is_lenient = sys.stdout.errors == "surrogateescape" and sys.stdout.encoding.lower() == "utf-8"
    if isinstance(sys.stdout, io.TextIOWrapper) and not is_lenient:
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_unwritable() -> None:
    """Drop what cannot be written to stdout: Python would complain about it at the end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_out(text: str, end: str = "\n") -> None:
    """Print to stdout at once. Raises OutputError if it cannot be written, BrokenPipeError if nobody reads it."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written: {error.strerror}") from None


def write_json(report: dict[str, Any]) -> None:
    """Print a line of JSON to stdout: characters as they are, escaped as JSON has it where stdout's encoding lacks one.
    Raises what `write_out` does."""
    text = json.dumps(report, ensure_ascii=False)
    write_out(text if lacking(text) is None else json.dumps(report))


def lacking(text: str) -> str | None:
    """The first character of a text that stdout's encoding does not have."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def text_argument(text: str) -> str:
    """For argparse: an argument that is a text, in UTF-8 where the locale does not know its bytes."""
    try:
        return read_escaped(text)
    except PromptError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_escaped(text: str) -> str:
    """A text in which Python escaped the bytes that the locale does not know, read as UTF-8. Raises PromptError if it
    is no such text."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise PromptError(_not_utf8(error)) from None


def read_prompt(prompt: str) -> str:
    """A prompt given as an argument: "-" stands for all of stdin, in UTF-8 unless the locale says otherwise.

    Raises PromptError for an empty prompt, and if stdin is closed or is no such text.
    """
    text = prompt if prompt != "-" else _read_stdin()
    if not text:
        raise PromptError("the prompt is empty: expected some text")
    return text


def _read_stdin() -> str:
    check_stdin()
    encoding = sys.stdin.encoding.lower()
    try:
        content = sys.stdin.buffer.read()
        # ASCII is the locale C, which says nothing about the text.
        text = content.decode("utf-8-sig" if encoding in ("utf-8", "ascii", "ansi_x3.4-1968") else encoding)
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin: {_not_utf8(error)}") from None
    except OSError as error:
        raise PromptError(f"stdin cannot be read: {error.strerror}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_stdin() -> None:
    """Raises PromptError if stdin is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise PromptError("expected text on stdin, which is closed")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not {error.encoding.upper()}: byte 0x{error.object[error.start]:02x} at position {error.start}"
