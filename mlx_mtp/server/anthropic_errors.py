"""Errors in the form of Anthropic's API, and its header `request-id` for all answers."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import new_id
from .http_entry import plain_path
from .http_errors import DESCRIPTIONS

_MESSAGES = re.compile(r"/v1/messages(/.*)?")
_MODELS = re.compile(r"/v1/models(/.*)?")
# These statuses decide the type of an error. With another status, an error keeps its type.
_ERROR_TYPES = {
    403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    500: "api_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip
_RENAMED = {"server_error": "api_error"}


class AnthropicErrorDetail(BaseModel):
    """Anthropic's error object."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """JSON body of an error response in the form of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


# The errors of Anthropic's endpoints, for the OpenAPI description.
ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicErrorBody, "description": text} for status, text in DESCRIPTIONS.items()
}


def is_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from a client of Anthropic's API.

    Its path is `/v1/messages` or below it. Or its path is `/v1/models` or below it, and it has the header
    `anthropic-version`.
    """
    plain = plain_path(path)
    if _MESSAGES.fullmatch(plain):
        return True
    return "anthropic-version" in headers and _MODELS.fullmatch(plain) is not None


def anthropic_error(error: Mapping[str, Any], status: int | None = None) -> dict[str, Any]:
    """Convert an error body of OpenAI's API, `{"error": {"message": ...}}`, to Anthropic's form."""
    found = error["error"]
    message, kind, code = found["message"], found.get("type") or "invalid_request_error", found.get("code")
    if code == "context_length_exceeded":
        # Clients recognize these words and shorten the conversation.
        message = f"prompt is too long: {message}"
    if code == "shutting_down":
        status = 503
    kind = _ERROR_TYPES.get(status or 0) or _RENAMED.get(kind, kind)
    return {"type": "error", "error": {"type": kind, "message": message}}


class AnthropicErrorMiddleware:
    """ASGI middleware that gives Anthropic's clients the header `request-id`, and errors in Anthropic's form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application. Adapt the answer if the client uses Anthropic's API."""
        if scope["type"] != "http" or not is_anthropic(scope["path"], Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        await self._app(scope, receive, _Errors(send, scope["method"] == "HEAD").send)


class _Errors:
    """Sender of one answer. It passes an error on when its body is complete."""

    def __init__(self, send: Send, is_head: bool) -> None:
        self._send = send
        self._is_head = is_head
        self._id = new_id("req_")
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["request-id"] = self._id
            if message["status"] >= 400 and not self._is_head:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error(self._start)
            return
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        try:
            found = json.loads(self._body)
            found["error"]["message"]
        except (ValueError, TypeError, KeyError):
            found = {"error": {"message": self._body.decode(errors="replace") or "the request is refused"}}
        body = anthropic_error(found, start["status"]) | {"request_id": self._id}
        data = json.dumps(body, ensure_ascii=False).encode()
        headers = MutableHeaders(scope=start)
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(data))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": data})
