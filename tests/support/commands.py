"""Run a command as a user does: in this process, which saves the start time, or in a process of its own."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from unittest.mock import patch


@dataclass(frozen=True)
class Finished:
    """The exit status and the output of a command."""

    returncode: int
    stdout: str
    stderr: str


def run(module: str, *args: object, stdin: str = "", code: int | None = 0) -> Finished:
    """Run `python -m mlx_mtp.MODULE` in this process. Check its exit status unless `code` is None."""
    out, err, given = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(3))
    given.write(stdin)
    given.seek(0)
    main = import_module(f"mlx_mtp.{module}").main
    with patch("sys.stdin", given), redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as ending:
            status = ending.code or 0
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
    return _checked(Finished(status, stdout, stderr), code)


def run_process(module: str, *args: object, stdin: str = "", code: int | None = 0) -> Finished:
    """Run `python -m mlx_mtp.MODULE` in a process of its own. Check its exit status unless `code` is None."""
    command = [sys.executable, "-m", f"mlx_mtp.{module}", *map(str, args)]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True)
    return _checked(Finished(result.returncode, result.stdout, result.stderr), code)


def _checked(finished: Finished, code: int | None) -> Finished:
    assert code is None or finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    assert "RuntimeWarning" not in finished.stderr
    return finished
