"""FastAPI application: OpenAI's and Anthropic's endpoints over a `Service`, health, metrics and a chat page."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from mlx_mtp import __version__

from .answers import Answer, AnswerWriter, Tokens
from .anthropic_answers import MessagesWriter
from .anthropic_errors import ANTHROPIC_ERRORS, AnthropicErrorMiddleware, is_anthropic
from .anthropic_requests import MessagesRequest
from .choices import ChoicesJob, ChoicesWriter
from .http_entry import AccessMiddleware, EntryMiddleware
from .http_errors import ERRORS, add_error_handlers
from .job_response import job_response
from .openai_answers import ChatWriter, CompletionWriter
from .openai_requests import ChatRequest, CompletionRequest, Request, ResponseRequest, Task
from .response_answers import ResponseWriter
from .service import ApiError, Service
from .undeclared_fields import warn_once

# The responses of an endpoint, for the OpenAPI description.
Responses = dict[int | str, dict[str, Any]]

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


@dataclass(frozen=True)
class Settings:
    """Settings of the HTTP server: API key, allowed hosts and origins, body size, keep-alive time.

    After `keep_alive` seconds without a token, a stream sends a sign of life.
    """

    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ("*",)
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 32_000_000
    keep_alive: float = 5.0


def create_app(service: Service, settings: Settings) -> FastAPI:
    """Build the application.

    If the settings have an API key, all endpoints require it except the chat page and `/health`.
    """
    app = FastAPI(title="mlx-mtp", version=__version__, docs_url=None, redoc_url=None)
    errors = {status: error for status, error in ERRORS.items() if status != 401 or settings.api_key is not None}
    endpoints = _Endpoints(service, settings.keep_alive)
    _add_openai_routes(app, endpoints, errors)
    _add_anthropic_routes(app, endpoints)
    _add_server_routes(app, endpoints, errors)
    add_error_handlers(app, service, settings.max_body_bytes)
    _add_middleware(app, settings)
    return app


def _add_openai_routes(app: FastAPI, endpoints: "_Endpoints", errors: Responses) -> None:
    for path, endpoint, summary in (
        ("/v1/chat/completions", endpoints.chat, "Answer the messages of a conversation."),
        ("/v1/completions", endpoints.completions, "Continue a text."),
        ("/v1/responses", endpoints.answers, "Answer with a list of items."),
    ):
        app.post(path, responses=errors, response_class=Response, summary=summary)(endpoint)


def _add_anthropic_routes(app: FastAPI, endpoints: "_Endpoints") -> None:
    summary = "Answer the messages of a conversation, in Anthropic's API."
    add = app.post("/v1/messages", responses=ANTHROPIC_ERRORS, response_class=Response, summary=summary)
    add(endpoints.messages)
    summary = "Count the tokens of a prompt."
    app.post("/v1/messages/count_tokens", responses=ANTHROPIC_ERRORS, summary=summary)(endpoints.count_tokens)


def _add_server_routes(app: FastAPI, endpoints: "_Endpoints", errors: Responses) -> None:
    """Add the routes of the models, the state of the server and the chat page."""
    wrong_key: Responses = {status: error for status, error in errors.items() if status == 401}
    app.get("/v1/models", responses=wrong_key)(endpoints.models)
    no_model: Responses = {status: error for status, error in errors.items() if status in (401, 404)}
    app.get("/v1/models/{name:path}", responses=no_model)(endpoints.model)
    app.get("/health")(endpoints.health)
    app.get("/metrics", responses=wrong_key, response_class=Response)(endpoints.metrics)
    app.get("/", include_in_schema=False)(endpoints.chat_page)


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    # The middleware that is added last sees a request first.
    app.add_middleware(AccessMiddleware, key=settings.api_key, most_bytes=settings.max_body_bytes)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(EntryMiddleware, hosts=settings.allowed_hosts)
    app.add_middleware(AnthropicErrorMiddleware)


class _Endpoints:
    """Functions of the endpoints. The names of the parameters and their types are a part of the OpenAPI description."""

    def __init__(self, service: Service, keep_alive: float) -> None:
        self._service = service
        self._keep_alive = keep_alive
        self._tokens = Tokens(service.model)
        self._page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        self._check_model(body)
        task = self._task(body)
        writers = [ChatWriter(body, self._service.name, self._tokens, self._answer(task)) for _ in range(body.n)]
        return await self._respond_choices(http, body, task, writers)

    async def completions(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self._check_model(body)
        writers = [CompletionWriter(body, self._service.name, self._tokens) for _ in range(body.n)]
        return await self._respond_choices(http, body, self._task(body), writers)

    async def answers(self, body: ResponseRequest, http: HttpRequest) -> Response:
        self._check_model(body)
        task = self._task(body)
        writer = ResponseWriter(body, self._service.name, self._tokens, self._answer(task))
        return await self._respond(http, body, task, writer)

    async def messages(self, body: MessagesRequest, http: HttpRequest) -> Response:
        # Anthropic's clients name a different model for each kind of task. This model answers all of them.
        task = self._task(body)
        most = task.options.max_tokens
        writer = MessagesWriter(body, self._service.name, self._tokens, self._answer(task), most)
        return await self._respond(http, body, task, writer)

    async def count_tokens(self, body: MessagesRequest) -> dict[str, int]:
        prompt = await run_in_threadpool(self._service.prepare, body.task(self._service.options))
        return {"input_tokens": len(prompt.tokens)}

    async def models(self, http: HttpRequest) -> dict[str, Any]:
        name = self._service.name
        found = self._model(http)
        pages = {"has_more": False, "first_id": name, "last_id": name} if "type" in found else {}
        return {"object": "list", "data": [found]} | pages

    async def model(self, name: str, http: HttpRequest) -> dict[str, Any]:
        if name != self._service.name:
            raise self._no_model(name)
        return self._model(http)

    async def health(self) -> dict[str, Any]:
        worker, rows = self._service.worker, self._service.metrics.last_rows
        found = {"status": "ok", "model": self._service.name, "running": worker.running, "waiting": worker.waiting}
        return found | {"last_pass": {"rows": sum(rows), "without_drafts": rows.count(1)}}

    async def metrics(self) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def chat_page(self) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": _PAGE_POLICY})

    def _model(self, http: HttpRequest) -> dict[str, Any]:
        """Return the model object of `/v1/models`. Clients of Anthropic's API get more fields."""
        kinds = {"input_modalities": self._service.modalities, "output_modalities": ["text"]}
        found = {"id": self._service.name, "object": "model", "created": 0, "owned_by": "mlx-mtp"}
        found["architecture"] = kinds
        if not is_anthropic(http.url.path, http.headers):
            return found
        dates = {"created_at": "1970-01-01T00:00:00Z", "lifecycle": "active"}
        limits = {"max_input_tokens": self._service.max_input_tokens}
        return found | {"type": "model", "display_name": self._service.name} | dates | limits

    def _check_model(self, body: Request) -> None:
        """Check the model of a request. Raises ApiError for another model."""
        if body.model not in (None, "", self._service.name):
            raise self._no_model(body.model, param="model")

    def _no_model(self, name: str | None, param: str | None = None) -> ApiError:
        message = f"the model {name!r} is not here: this server has {self._service.name!r}"
        return ApiError(404, message, code="model_not_found", param=param)

    def _task(self, body: Request) -> Task:
        """Return the task of a request. Log the parts of the request that are ignored."""
        for name in body.ignored[:_MOST_NAMED]:
            warn_once(name)
        return body.task(self._service.options)

    def _answer(self, task: Task) -> Answer:
        return Answer(task.tools, self._service.metrics.unreadable_calls.inc)

    async def _respond_choices(
        self, http: HttpRequest, body: Request, task: Task, writers: Sequence[ChatWriter | CompletionWriter]
    ) -> Response:
        """Respond with one answer for each writer."""
        if len(writers) == 1:
            return await self._respond(http, body, task, writers[0])
        job = ChoicesJob(self._service.submit_choices(task, len(writers)))
        response = await job_response(http, job, ChoicesWriter(writers), body.stream, self._keep_alive)
        return self._with_headers(response, body, task)

    async def _respond(self, http: HttpRequest, body: Request, task: Task, writer: AnswerWriter) -> Response:
        response = await job_response(http, self._service.submit(task), writer, body.stream, self._keep_alive)
        return self._with_headers(response, body, task)

    def _with_headers(self, response: Response, body: Request, task: Task) -> Response:
        """Add the headers that name what is ignored or not enforced."""
        if body.ignored:
            names = (quote(name[:100], safe="") or '""' for name in body.ignored[:_MOST_NAMED])
            response.headers[IGNORED_HEADER] = ", ".join(names)
        if task.not_enforced:
            response.headers[_NOT_ENFORCED] = quote(", ".join(task.not_enforced), safe=_HEADER_TEXT)[:_MOST_HEADER]
        return response
