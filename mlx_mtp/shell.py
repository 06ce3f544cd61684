"""The interface of a command to the shell: descriptors, encodings, one line for an error, an exit status."""

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
    """An argument parser that reports an error in one line, without the usage text that would hide it."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, and exit with status 2."""
        self.exit(2, f"error: {message}\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse arguments as argparse does, but take a negative number with an exponent as a value."""
        given: list[str] = []
        for argument in sys.argv[1:] if args is None else args:
            if (match := _DASHES.fullmatch(argument)) is not None:
                # argparse would drop the dashes and return an empty list.
                self.error(f"argument {match[1].rstrip('=')}: expected a value, found --")
            if given and given[-1].startswith("-") and _EXPONENT.fullmatch(argument):
                # argparse would take the number for an option.
                given[-1] += f"={argument}" if given[-1].startswith("--") else argument
            else:
                given.append(argument)
        return super().parse_args(given, namespace)


def exit_status(run: Callable[[], int]) -> int:
    """Run a command and return its exit status, 1 after an error, or 130 after Ctrl-C.

    An error is printed in one line. Warnings of the library go to stderr.
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
        # The program that reads the output has ended.
        return 1
    except OSError as error:
        print(f"error: {_describe(error)}", file=sys.stderr)
        return 1
    finally:
        library.removeHandler(handler)
        _drop_unwritable()


def _describe(error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is None:
        # Python raises this error when it looks up a current folder that was removed.
        return "the current folder is gone: change to another one"
    return str(error)


def prepare_streams() -> None:
    """Open closed standard descriptors on the null device, and make stdout escape unknown characters.

    MLX treats a file with descriptor 0 as a file that could not be opened. A character that stdout's encoding does not
    have is written as an escape sequence.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The new descriptor gets the lowest free number.
            os.open(os.devnull, os.O_RDWR)
    # A stream is None if its descriptor was closed when Python started.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # In UTF-8, the bytes of a path that are not text may be written unchanged.
    is_lenient = sys.stdout.errors == "surrogateescape" and sys.stdout.encoding.lower() == "utf-8"
    if isinstance(sys.stdout, io.TextIOWrapper) and not is_lenient:
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_unwritable() -> None:
    """Drop text that cannot be written to stdout. Otherwise Python would report it when the program ends."""
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
    """Print a report to stdout as one line of JSON.

    Characters are printed as they are. If stdout's encoding does not have one of them, all characters outside ASCII are
    escaped as in JSON.

    Raises the errors of `write_out`.
    """
    text = json.dumps(report, ensure_ascii=False)
    write_out(text if lacking(text) is None else json.dumps(report))


def lacking(text: str) -> str | None:
    """Return the first character of a text that stdout's encoding does not have, or None."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def text_argument(text: str) -> str:
    """Read a text argument for argparse, as UTF-8 if the locale does not know its bytes."""
    try:
        return read_escaped(text)
    except PromptError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_escaped(text: str) -> str:
    """Read a text as UTF-8 if Python escaped some of its bytes.

    Python escapes the bytes that the locale does not know. Raises PromptError if the bytes are not UTF-8.
    """
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
    """Return the prompt of an argument; "-" stands for all of stdin.

    Stdin is in UTF-8 unless the locale gives another encoding.

    Raises PromptError if the prompt is empty, if stdin is closed, or if stdin cannot be read in its encoding.
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
        # ASCII means the locale C, which says nothing about the encoding of the text.
        text = content.decode("utf-8-sig" if encoding in ("utf-8", "ascii", "ansi_x3.4-1968") else encoding)
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin: {_not_utf8(error)}") from None
    except OSError as error:
        raise PromptError(f"stdin cannot be read: {error.strerror}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_stdin() -> None:
    """Raise PromptError if stdin is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise PromptError("expected text on stdin, which is closed")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not {error.encoding.upper()}: byte 0x{error.object[error.start]:02x} at position {error.start}"
