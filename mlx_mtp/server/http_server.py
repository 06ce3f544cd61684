"""Uvicorn's server, with a printed address and an end for the generations when a signal stops it."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mlx_mtp.errors import ClosedError, GroupError, OutputError
from mlx_mtp.model import Model
from mlx_mtp.shell import write_out
from mlx_mtp.threads.job_thread import Worker

# Uvicorn waits this many seconds after the generations are cancelled.
_LAST_WORDS = 3


async def serve_until_stopped(
    app: FastAPI, model: Model, worker: Worker, listener: socket.socket, patience: float, log_level: str
) -> None:
    """Serve the application until SIGINT or SIGTERM arrives.

    The generations may then go on for `patience` seconds. A second signal ends them at once.

    Raises OutputError or OSError if the address cannot be printed, and GroupError if a machine that shares the model
    was lost.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=log_level,
        timeout_graceful_shutdown=int(patience + _LAST_WORDS),
        server_header=False,
        ws="none",
    )
    logging.getLogger("uvicorn.access").addFilter(_is_no_health_check)
    server = _Server(config, worker, listener, patience)
    model.target.when_lost(server.lose)
    await server.serve([listener])
    if server.failure is not None:
        raise server.failure


def _is_no_health_check(record: logging.LogRecord) -> bool:
    """Return whether a request belongs in the log. Apps and the chat page ask for the state again and again."""
    return "GET /health " not in record.getMessage()


class _Server(uvicorn.Server):
    """Uvicorn's server that also prints its address, and ends the generations when a signal stops it."""

    def __init__(self, config: uvicorn.Config, worker: Worker, listener: socket.socket, patience: float) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._worker = worker
        self._listener = listener
        self._patience = patience
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        try:
            write_out(_address(self._listener))
        except (OutputError, OSError) as error:
            # Raise the error only after the shutdown, because uvicorn would log the tasks that it cancels.
            self.failure = error
            self.should_exit = True

    def lose(self, reason: str) -> None:
        """End all generations with an error, and stop, because a machine was lost. Any thread may call it."""
        self.failure = GroupError(reason)
        self._worker.cancel(self.failure)
        # Uvicorn answers the requests at hand first.
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            # Uvicorn would raise the signals again here. A stop is the normal end of a server.
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_first = not self.should_exit
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._end_generations, self._patience if is_first else 0)

    def _end_generations(self, seconds: float) -> None:
        self._worker.cancel(ClosedError("the server is shutting down"), waiting_only=True)
        self._loop.call_later(seconds, self._worker.cancel, ClosedError("the server is shutting down"))


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
