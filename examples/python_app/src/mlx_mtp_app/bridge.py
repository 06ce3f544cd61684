"""A model for whoever has an event loop, which is never blocked: load, ask, stop, close."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

import mlx_mtp

# Called on the event loop with "download", "load" or "prefill", how much of it is done, and how much there is.
Report = Callable[[str, int, int], None]
MAX_TOKENS = 200


class Bridge:
    """Holds one model. Several questions at once are answered one after the other."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._model: mlx_mtp.Model | None = None

    async def load(self, name: str | Path = mlx_mtp.DEMO_PAIR) -> None:
        """Load a folder or a hub repository. Cancelling the task ends it. Raises mlx_mtp.MTPError kinds."""
        self._model = await mlx_mtp.aload(
            name, on_download=partial(self._report, "download"), on_load=partial(self._report, "load")
        )

    async def ask(self, question: str) -> AsyncGenerator[str, None]:
        """The answer, piece by piece. Closing it, or cancelling the task that waits for it, ends it."""
        assert self._model is not None, "load a model first"
        messages = [{"role": "user", "content": question}]
        async with aclosing(
            self._model.astream_generate(
                messages,
                max_tokens=MAX_TOKENS,
                sampling=self._model.default_sampling,
                on_prefill=partial(self._report, "prefill"),
            )
        ) as responses:
            async for response in responses:
                if response.text:
                    yield response.text

    async def close(self) -> None:
        """Give the model's memory back; an answer that is under way ends with mlx_mtp.ClosedError."""
        if self._model is not None:
            # It waits for the round that is being computed.
            await asyncio.to_thread(self._model.close)
            self._model = None
