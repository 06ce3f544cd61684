"""HTTP response of a generation: a stream of events, or the whole answer as JSON."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Protocol, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .answers import JsonObject
from .service import ApiError, Prefill, api_error

T = TypeVar("T")
Item_co = TypeVar("Item_co", covariant=True)
Item_contra = TypeVar("Item_contra", contravariant=True)


class Items(Protocol[Item_co]):
    """The items of a job, or of several jobs."""

    async def next(self, timeout: float | None = None) -> Item_co | Prefill:
        """Return the next item, see `Job.next`."""

    def cancel(self) -> None:
        """End the work."""


class Writer(Protocol[Item_contra]):
    """A writer of an answer, or of several answers to one request, see `AnswerWriter`."""

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""

    def add(self, item: Item_contra, /) -> Iterator[str]:
        """Add one token's response. Yield its events."""

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""

    def fail(self, error: JsonObject) -> Iterator[str]:
        """Yield the events of an error, in place of the end."""

    def alive(self, comment: str) -> str:
        """Return a sign of life for a stream without new tokens."""

    def whole(self) -> JsonObject:
        """Return the whole answer as one JSON object."""


async def job_response(
    http: HttpRequest, job: Items[T], writer: Writer[T], stream: bool, keep_alive: float
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


async def _next(job: Items[T], timeout: float | None) -> T | Prefill | None:
    """Return the next item of a job, or None if no item comes within `timeout` seconds."""
    try:
        return await job.next(timeout)
    except TimeoutError:
        return None


async def _consume(job: Items[T], first: T | Prefill | None, writer: Writer[T]) -> None:
    for _ in writer.begin():
        pass
    item = first
    with contextlib.suppress(StopAsyncIteration):
        while True:
            if item is not None and not isinstance(item, Prefill):
                for _ in writer.add(item):
                    pass
            item = await job.next()
    for _ in writer.end():
        pass


async def _events(job: Items[T], first: T | Prefill | None, writer: Writer[T], keep_alive: float) -> AsyncIterator[str]:
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

    def __init__(self, job: Items[object], events: AsyncIterator[str]) -> None:
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
