"""FastAPI application: OpenAI's and Anthropic's endpoints over a `Service`, health, metrics and a chat page."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp import __version__
from mlx_mtp.responses import GenerationResponse
from mlx_mtp.threads.job_thread import Job

from .answers import Answer, AnswerWriter, Tokens
from .anthropic_answers import MessagesWriter
from .anthropic_errors import DESCRIPTIONS, AnthropicErrors, is_anthropic
from .anthropic_errors import ERRORS as ANTHROPIC_ERRORS
from .anthropic_requests import MessagesRequest
from .http_entry import Entry
from .openai_answers import ChatWriter, CompletionWriter
from .openai_requests import ChatRequest, CompletionRequest, Request, ResponseRequest, Task
from .response_answers import ResponseWriter
from .service import ApiError, Prefill, Service, api_error
from .undeclared_fields import warn_once

T = TypeVar("T")
Items = Job[GenerationResponse | Prefill]

# This response header lists the parts of the request that the server does not know and ignores.
IGNORED_HEADER = "X-MLX-MTP-Ignored"
_MOST_NAMED = 20
# This response header lists the keywords of the request's schemas that the server does not enforce.
_NOT_ENFORCED = "X-MLX-MTP-Not-Enforced"
_HEADER_TEXT = " !#$&'()*+,/:;=?@[]"
_MOST_HEADER = 2000
# The chat page can connect to this server only.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """JSON body of an error response."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {**DESCRIPTIONS, 404: "There is no such model, or no such stored item."}.items()
}


@dataclass(frozen=True)
class Settings:
    """Settings of the HTTP server: API key, allowed hosts and origins, body size, keep-alive time.

    After `keep_alive` seconds without a token, a stream sends a sign of life.
    """

    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ("*",)
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 10_000_000
    keep_alive: float = 5.0


def create_app(service: Service, settings: Settings) -> FastAPI:
    """Build the application.

    If the settings have an API key, all endpoints require it except the chat page and `/health`.
    """
    app = FastAPI(
        title="mlx-mtp",
        version=__version__,
        docs_url=None,
        redoc_url=None,
    )
    tokens = Tokens(service.model)
    responses = _ERRORS if settings.api_key is not None else {k: v for k, v in _ERRORS.items() if k != 401}

    def answer(task: Task) -> Answer:
        return Answer(task.tools, service.metrics.unreadable_calls.inc)

    @app.post("/v1/chat/completions", responses=responses, response_class=Response, summary="An answer to messages.")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        def writer(task: Task) -> AnswerWriter:
            return ChatWriter(body, service.name, tokens, answer(task))

        return await _answer(http, body, body.task, writer)

    @app.post("/v1/completions", responses=responses, response_class=Response, summary="Text that goes on.")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await _answer(http, body, body.task, lambda _: CompletionWriter(body, service.name, tokens))

    @app.post("/v1/responses", responses=responses, response_class=Response, summary="An answer as a list of items.")
    async def answers(body: ResponseRequest, http: HttpRequest) -> Response:
        def writer(task: Task) -> AnswerWriter:
            return ResponseWriter(body, service.name, tokens, answer(task))

        return await _answer(http, body, body.task, writer)

    async def _answer(
        http: HttpRequest,
        body: Request,
        task: Callable[..., Task],
        make_writer: Callable[[Task], AnswerWriter],
        *,
        takes_any_model: bool = False,
    ) -> Response:
        if not takes_any_model and body.model not in (None, "", service.name):
            raise ApiError(
                404,
                f"the model {body.model!r} is not here: this server has {service.name!r}",
                code="model_not_found",
                param="model",
            )
        for name in body.ignored[:_MOST_NAMED]:
            warn_once(name)
        asked = task(service.options)
        writer = make_writer(asked)
        response = await _run(http, service.submit(asked), writer, body.stream, settings.keep_alive)
        if body.ignored:
            response.headers[IGNORED_HEADER] = ", ".join(
                quote(name[:100], safe="") or '""' for name in body.ignored[:_MOST_NAMED]
            )
        if asked.not_enforced:
            response.headers[_NOT_ENFORCED] = quote(", ".join(asked.not_enforced), safe=_HEADER_TEXT)[:_MOST_HEADER]
        return response

    @app.post("/v1/messages", responses=ANTHROPIC_ERRORS, response_class=Response, summary="Anthropic's messages.")
    async def messages(body: MessagesRequest, http: HttpRequest) -> Response:
        def writer(task: Task) -> AnswerWriter:
            return MessagesWriter(body, service.name, tokens, answer(task), task.options.max_tokens)

        # Anthropic's clients name a different model for each kind of task. This model answers all of them.
        return await _answer(http, body, body.task, writer, takes_any_model=True)

    @app.post("/v1/messages/count_tokens", responses=ANTHROPIC_ERRORS, summary="Tokens of a prompt.")
    async def count_tokens(body: MessagesRequest) -> dict[str, int]:
        prompt = await run_in_threadpool(service.encode, body.task(service.options))
        return {"input_tokens": len(prompt)}

    @app.get("/v1/models", responses={k: v for k, v in responses.items() if k in (401,)})
    async def models(http: HttpRequest) -> dict[str, Any]:
        found = _model(service, http)
        pages = {"has_more": False, "first_id": service.name, "last_id": service.name} if "type" in found else {}
        return {"object": "list", "data": [found]} | pages

    @app.get("/v1/models/{name:path}", responses={k: v for k, v in responses.items() if k in (401, 404)})
    async def model(name: str, http: HttpRequest) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(
                404, f"the model {name!r} is not here: this server has {service.name!r}", code="model_not_found"
            )
        return _model(service, http)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        worker = service.worker
        return {"status": "ok", "model": service.name, "running": worker.running, "waiting": worker.waiting}

    @app.get("/metrics", responses={k: v for k, v in responses.items() if k in (401,)}, response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    _add_error_handlers(app, service, settings.max_body_bytes)
    # The middleware that is added last sees a request first.
    app.add_middleware(_Guard, key=settings.api_key, most_bytes=settings.max_body_bytes)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Entry, hosts=settings.allowed_hosts)
    app.add_middleware(AnthropicErrors)
    return app


def _model(service: Service, http: HttpRequest) -> dict[str, Any]:
    """Return the model object of `/v1/models`. Clients of Anthropic's API get more fields."""
    found = {"id": service.name, "object": "model", "created": 0, "owned_by": "mlx-mtp"}
    if not is_anthropic(http.url.path, http.headers):
        return found
    dates = {"created_at": "1970-01-01T00:00:00Z", "lifecycle": "active"}
    limits = {"max_input_tokens": service.max_input_tokens}
    return found | {"type": "model", "display_name": service.name} | dates | limits


async def _run(http: HttpRequest, job: Items, writer: AnswerWriter, stream: bool, keep_alive: float) -> Response:
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


async def _next(job: Items, timeout: float | None) -> GenerationResponse | Prefill | None:
    """Return the next item of a job, or None if no item comes within `timeout` seconds."""
    try:
        return await job.next(timeout)
    except TimeoutError:
        return None


async def _consume(job: Items, first: GenerationResponse | Prefill | None, writer: AnswerWriter) -> None:
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
    job: Items, first: GenerationResponse | Prefill | None, writer: AnswerWriter, keep_alive: float
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

    def __init__(self, job: Items, events: AsyncIterator[str]) -> None:
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


def _add_error_handlers(app: FastAPI, service: Service, most_bytes: int) -> None:
    def answer(error: ApiError) -> Response:
        headers = {"Retry-After": str(service.retry_after())} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(_validation_error(error))

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:
            # FastAPI raises status 400 for a body that it cannot read.
            return answer(_unreadable(error, http.headers.get("content-encoding", "")))
        found = ApiError(error.status_code, f"{error.detail}: {http.method} {http.url.path}")
        response = answer(_too_large(most_bytes) if error.status_code == 413 else found)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RecursionError)
    async def too_deep(_: HttpRequest, error: Exception) -> Response:
        # The JSON parser accepts slightly deeper nesting than the code after it.
        return answer(ApiError(400, "the body is nested too deep", code="invalid_json"))

    async def failed(_: HttpRequest, error: Exception) -> Response:
        return answer(api_error(error))

    for kind in (ApiError, ValueError, RuntimeError, Exception):
        app.add_exception_handler(kind, failed)


def _unreadable(error: HTTPException, encoding: str) -> ApiError:
    """Return the error for a body that FastAPI cannot read. `encoding` is its Content-Encoding."""
    if encoding.strip().lower() not in ("", "identity"):
        reason = f"the body is encoded as {encoding[:100]!r}: send it as plain JSON"
    elif isinstance(error.__cause__, RecursionError):
        reason = "the body is not JSON that can be read: it is nested too deep"
    elif isinstance(error.__cause__, UnicodeError):
        reason = "the body is not JSON: it is not in UTF-8"
    else:
        reason = "the body is not JSON"
    return ApiError(400, reason, code="invalid_json")


def _validation_error(error: RequestValidationError) -> ApiError:
    """Return the most specific error in a request's fields."""
    # The longest path is the most specific. For a union, pydantic reports errors of the other types as well.
    path, found = max(((_path(one, error.body), one) for one in error.errors()), key=lambda pair: len(pair[0]))
    refused = found.get("ctx", {})
    if "param" in refused:
        return ApiError(refused["status"], refused["message"], code=found["type"], param=refused["param"])
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']}", code="invalid_json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    if not param:
        return ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
    if found["type"] == "missing":
        return ApiError(400, f"missing required parameter: {param!r}", code="missing_required_parameter", param=param)
    value = found.get("input")
    shown = f", found {str(value)[:100]!r}" if isinstance(value, str | int | float | None) else ""
    return ApiError(400, f"{param}: {_plain(found)}{shown}", code="invalid_value", param=param)


def _plain(error: Mapping[str, Any]) -> str:
    """Return the message of an error, without names of this package."""
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "expected an object"
    if error["type"] == "union_tag_not_found":
        return "expected an object with a type"
    if error["type"] == "union_tag_invalid":
        return f"expected the type {error['ctx']['expected_tags']}, found {error['ctx']['tag'][:100]!r}"
    return str(error["msg"])


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return the path of an error in the body.

    The path omits the parts of pydantic's location that only name a type of a union.
    """
    path: list[str | int] = []
    is_last_there = False
    for part in error["loc"][1:]:
        is_last_there = (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int))
        if is_last_there:
            body = body[part]
            path.append(part)
    # A missing field is not in the body, so the loop leaves out its name. A field with the value null is there already.
    return path if is_last_there or error["type"] != "missing" else [*path, *error["loc"][1:][-1:]]


class _Guard:
    """Middleware that rejects a wrong API key (constant-time compare) or too large a body, before the body is read."""

    _OPEN = ("/", "/health")

    def __init__(self, app: ASGIApp, key: str | None, most_bytes: int) -> None:
        self._app = app
        self._key = None if key is None else key.encode()
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, self._counted(receive), send)
            return
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        await JSONResponse(error.body(), error.status, headers)(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if not (self._key is None or scope["path"] in self._OPEN or _has_key(headers, self._key)):
            message = "the API key is missing or wrong: send it as a Bearer token, or as x-api-key"
            return ApiError(401, message, code="invalid_api_key")
        length = headers.get(b"content-length", b"")
        return _too_large(self._most_bytes) if length.isdigit() and int(length) > self._most_bytes else None

    def _counted(self, receive: Receive) -> Receive:
        """Return a `receive` that raises HTTPException with status 413 if the body gets too large.

        It covers bodies that do not declare their length. FastAPI's own limit would answer in plain text.
        """
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise HTTPException(413)
            return message

        return counted


def _has_key(headers: Mapping[bytes, bytes], key: bytes) -> bool:
    """Return whether the header `authorization` or `x-api-key` holds the key."""
    is_bearer = secrets.compare_digest(headers.get(b"authorization", b""), b"Bearer " + key)
    return secrets.compare_digest(headers.get(b"x-api-key", b""), key) or is_bearer


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"the body has more than {most_bytes} bytes", code="body_too_large")
