"""A server of this package for tests: in this process, or in a process of its own."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import uvicorn
from prometheus_client.metrics import MetricWrapperBase
from support.checked_answers import Checked

from mlx_mtp import GenerationOptions, Model
from mlx_mtp.scheduler import Scheduler
from mlx_mtp.server.app import Settings, create_app
from mlx_mtp.server.service import Service
from mlx_mtp.threads.job_thread import Worker

# The first answer waits for the compiler: longer than the five seconds that httpx waits.
post = partial(httpx.post, timeout=60)


@dataclass
class Served:
    """The address of a server, and its service."""

    url: str
    service: Service

    @property
    def v1(self) -> str:
        """The address of OpenAI's paths."""
        return f"{self.url}/v1"


@contextmanager
def serve(
    load: Callable[[], Model],
    options: GenerationOptions | None = None,
    *,
    name: str = "pair",
    max_waiting: int = 32,
    max_prompt_tokens: int | None = None,
    concurrency: int = 8,
    **settings: Any,
) -> Iterator[Served]:
    """Serve a model in a thread of this process. The worker loads it, and `Checked` checks the answers."""
    scheduler = Scheduler(concurrency)
    worker = Worker("model", max_waiting, scheduler, concurrency)
    model = worker.run(load)
    service = Service(model, worker, scheduler, name, options or GenerationOptions(), max_prompt_tokens)
    app = create_app(service, Settings(**settings))
    server = uvicorn.Server(uvicorn.Config(Checked(app), port=0, log_level="warning", timeout_graceful_shutdown=1))
    started = threading.Event()
    startup = server.startup

    async def and_say(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = and_say  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(30)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join()
        worker.close()


def value(metric: MetricWrapperBase) -> float:
    """Return the value of a metric, or of a metric with labels."""
    (family,) = metric.collect()
    return family.samples[0].value


@contextmanager
def process(*arguments: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run `python -m mlx_mtp.server --port 0` with these arguments. Yield its address and the process."""
    command = [sys.executable, "-m", "mlx_mtp.server", "--port", "0", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {})
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            assert url.startswith("http://"), server.stderr.read() if server.stderr else ""
            yield url, server
        finally:
            server.kill()


def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds, for some seconds at most."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "never"
        time.sleep(0.01)
