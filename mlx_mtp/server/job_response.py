"""HTTP response of a generation: a stream of events, or the whole answer as JSON."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_mtp.responses import GenerationResponse

from .answers import AnswerWriter
from .service import ApiError, GenerationJob, Prefill, api_error

T = TypeVar("T")


async def job_response(
    http: HttpRequest, job: GenerationJob, writer: AnswerWriter, stream: bool, keep_alive: float
) -> Response:
    """Return the response of a job: a stream of events, or the whole answer as JSON.

    An error of a whole answer gets its own HTTP status. In a stream, only an error before the first item and within
    `keep_alive` seconds gets a status. A later error becomes an event of the stream.
    """
    try:
        first = await _unless_gone(http, _next(job, keep_alive if stream else None))
        if stream:
            return _Stream(job, _events(job, first, writer, keep_alive))
        await _unless_gone(http, _consume(job, first, writer))
    except BaseException:
        job.cancel()
        raise
    return JSONResponse(writer.whole())


async def _next(job: GenerationJob, timeout: float | None) -> GenerationResponse | Prefill | None:
    """Return the next item of a job, or None if no item comes within `timeout` seconds."""
    try:
        return await job.next(timeout)
    except TimeoutError:
        return None


async def _consume(job: GenerationJob, first: GenerationResponse | Prefill | None, writer: AnswerWriter) -> None:
    for _ in writer.begin():
        pass
    item = first
    with contextlib.suppress(StopAsyncIteration):
        while True:
            if isinstance(item, GenerationResponse):
                for _ in writer.add(item):
                    pass
            item = await job.next()
    for _ in writer.end():
        pass


async def _events(
    job: GenerationJob, first: GenerationResponse | Prefill | None, writer: AnswerWriter, keep_alive: float
) -> AsyncIterator[str]:
    """Yield the events of a stream.

    Signs of life fill the time without tokens, so that no reader considers the stream dead.
    """
    try:
        for event in writer.begin():
            yield event
        item = first
        while True:
            if item is None:
                yield writer.alive("keep-alive")
            elif isinstance(item, Prefill):
                yield writer.alive(f"prefill {item.done}/{item.total}")
            else:
                for event in writer.add(item):
                    yield event
            try:
                item = await _next(job, keep_alive)
            except StopAsyncIteration:
                break
        for event in writer.end():
            yield event
    except Exception as error:
        for event in writer.fail(api_error(error).body()):
            yield event


class _Stream(StreamingResponse):
    """Response of server-sent events. It cancels its job when the connection ends."""

    def __init__(self, job: GenerationJob, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _unless_gone(http: HttpRequest, result: Awaitable[T]) -> T:
    """Wait for the result while the client stays connected.

    Raises ApiError with status 499 if the client disconnects first, as nobody reads the result then.
    """

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    wanted, lost = asyncio.ensure_future(result), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([wanted, lost], return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise ApiError(499, "the client has disconnected")
        return wanted.result()
    finally:
        for task in (wanted, lost):
            task.cancel()
