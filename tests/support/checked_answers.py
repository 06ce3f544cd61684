"""Checks of every answer of a test server against the official OpenAI client's models.

A field that is missing, has a wrong type or is unknown to the client is an error. An application wrapped in `Checked`
never sends a wrong answer. It sends status 500 with the reason instead. A stream ends with the reason as its last
event. The client under test then fails at this point.
"""

import json
from collections.abc import Iterator, MutableMapping
from typing import Any, Literal, get_args

from openai.types import Completion, CompletionChoice, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.server.http_entry import plain_path

WHOLE: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/responses": Response,
}
EVENTS: dict[str, type[BaseModel]] = {
    get_args(event.model_fields["type"].annotation)[0]: event for event in get_args(get_args(ResponseStreamEvent)[0])
}


class CompletionChunkChoice(CompletionChoice):
    """A choice that has no finish_reason before the end, which OpenAI sends but the client's model does not allow."""

    finish_reason: Literal["stop", "length", "content_filter"] | None  # type: ignore[assignment]


class CompletionChunk(Completion):
    """A chunk of a text completion with OpenAI's type of choices."""

    choices: list[CompletionChunkChoice]  # type: ignore[assignment]


# Fields that this server adds to the client's models: other servers add thoughts and the modalities of a model, and
# OpenAI itself sends `store`.
ADDED = {"architecture", "reasoning_content", "store"}


class AnswerError(Exception):
    """An answer does not fit the models of OpenAI's client."""


def check(data: Any, model: type[BaseModel], *, added: frozenset[str] = frozenset()) -> None:
    """Check parsed JSON strictly against a model. `added` names more fields that are allowed at the top level."""
    if not isinstance(data, dict):
        raise AnswerError(f"expected an object, found {data!r}")
    try:
        found = model.model_validate_json(json.dumps(data, allow_nan=False), strict=True)
    except ValueError as error:
        raise AnswerError(f"not a {model.__name__}: {error}") from None
    more = [place for place in _extra(found, model.__name__) if place.split(".", 1)[1] not in added]
    if more:
        raise AnswerError(f"fields that {model.__name__} does not have: {', '.join(more)}")


def _extra(value: Any, place: str) -> Iterator[str]:
    """Yield the places of fields that the models do not name.

    Parts that a model leaves open, for example metadata and schemas, are not checked.
    """
    if isinstance(value, BaseModel):
        yield from (f"{place}.{name}" for name in value.model_extra or {} if name not in ADDED)
        for name in type(value).model_fields:
            yield from _extra(vars(value)[name], f"{place}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _extra(item, f"{place}[{index}]")


class Conversation:
    """One request, and the checks of its answer."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.path = path
        self.stats = frozenset({"stats"} if body.get("include_stats") else ())
        options = body.get("stream_options")
        self.counts = isinstance(options, dict) and options.get("include_usage") is True
        self._choices = body.get("n") or 1
        # The indices of the choices that have a finish_reason.
        self._finished: set[int] = set()
        self._ended = False
        self._number = 0

    def whole(self, data: Any) -> None:
        """Check a complete answer that is not streamed."""
        check(data, WHOLE[self.path], added=self.stats)
        if self.path == "/v1/responses":
            return
        if data.get("usage") is None or any(choice["finish_reason"] is None for choice in data["choices"]):
            raise AnswerError("a whole answer has no usage or no finish_reason")
        if [choice["index"] for choice in data["choices"]] != list(range(self._choices)):
            raise AnswerError(f"expected {self._choices} choices in order: {data}")

    def event(self, text: str) -> None:
        """Check one server-sent event. Comments only keep the connection alive and are ignored."""
        lines = [line for line in text.split("\n") if line and not line.startswith(":")]
        if not lines:
            return
        kind = lines[0].removeprefix("event: ") if lines[0].startswith("event: ") else None
        (line,) = lines if kind is None else lines[1:]
        content = line.removeprefix("data: ")
        if self._ended:
            raise AnswerError(f"an event after the end: {text}")
        if content == "[DONE]":
            if len(self._finished) != self._choices:
                raise AnswerError("the stream ends without a finish_reason")
            self._ended = True
            return
        data = json.loads(content, parse_constant=_refuse)
        if "error" in data and "type" not in data:
            error(data)
            self._ended = True
        elif self.path == "/v1/responses":
            self._response_event(kind, data)
        else:
            self._chunk(data)

    def _response_event(self, kind: str | None, data: Any) -> None:
        if kind != data.get("type") or kind not in EVENTS:
            raise AnswerError(f"an event {kind} of type {data.get('type')}")
        check(data, EVENTS[kind], added=self.stats)
        if data["sequence_number"] != self._number:
            raise AnswerError(f"event {self._number} has the number {data['sequence_number']}")
        self._number += 1
        self._ended = kind in ("response.completed", "response.incomplete", "response.failed")

    def _chunk(self, data: Any) -> None:
        check(data, CompletionChunk if self.path == "/v1/completions" else ChatCompletionChunk, added=self.stats)
        is_last = not data["choices"]
        if ("usage" in data) != self.counts or (data.get("usage") is None) == is_last:
            raise AnswerError(f"usage must be {'null but in the last chunk' if self.counts else 'absent'}: {data}")
        for choice in data["choices"]:
            if choice["index"] in self._finished:
                raise AnswerError(f"a choice after the finish_reason: {data}")
            if choice["finish_reason"] is not None:
                self._finished.add(choice["index"])


def error(data: Any) -> None:
    """Check that an answer is OpenAI's error object."""
    if not isinstance(data, dict) or set(data) != {"error"}:
        raise AnswerError(f"expected an error object, found {data!r}")
    check(data["error"], ErrorObject)
    if set(data["error"]) != {"message", "type", "param", "code"} or not data["error"]["message"]:
        raise AnswerError(f"an error without a field or a message: {data!r}")


def _refuse(constant: str) -> None:
    raise AnswerError(f"{constant} is no JSON")


class Checked:
    """An application that checks its answers on OpenAI's paths before it sends them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = plain_path(scope.get("path", ""))
        is_checked = scope.get("method") in ("GET", "POST") and (path in WHOLE or path.startswith("/v1/models"))
        # test_anthropic.py checks the answers to Anthropic's clients.
        if not is_checked or b"anthropic-version" in dict(scope["headers"]):
            await self.app(scope, receive, send)
            return
        answer = _Answer(path, send)

        async def receive_and_keep() -> Message:
            message = await receive()
            answer.request += message.get("body", b"")
            return message

        await self.app(scope, receive_and_keep, answer.send)


class _Answer:
    def __init__(self, path: str, send: Send) -> None:
        self.request = b""
        self._path = path
        self._send = send
        self._start: MutableMapping[str, Any] = {}
        self._body = b""
        self._conversation: Conversation | None = None
        self._is_broken = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            headers = dict(message["headers"])
            if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                self._conversation = Conversation(self._path, json.loads(self.request))
                await self._send(message)
        elif self._is_broken:
            return
        elif self._conversation is not None:
            await self._send_events(self._conversation, message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_whole()

    async def _send_events(self, conversation: Conversation, message: Message) -> None:
        *events, self._body = (self._body + message.get("body", b"")).split(b"\n\n")
        try:
            for event in events:
                conversation.event(event.decode())
            if not message.get("more_body") and self._body:
                raise AnswerError(f"half an event at the end: {self._body!r}")
        except (AnswerError, ValueError) as problem:
            self._is_broken = True
            text = json.dumps({"error": {"message": f"wrong answer: {problem}"}})
            await self._send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": False})
            return
        await self._send(message)

    async def _send_whole(self) -> None:
        try:
            data: Any = json.loads(self._body, parse_constant=_refuse) if self._body else None
            if self._start["status"] >= 400:
                error(data)
            elif self._path in WHOLE:
                Conversation(self._path, json.loads(self.request)).whole(data)
            elif self._path == "/v1/models":
                for model in data["data"]:
                    check(model, Model)
            else:
                check(data, Model)
        except (AnswerError, ValueError) as problem:
            body = json.dumps({"error": {"message": f"wrong answer: {problem}"}}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self._send({"type": "http.response.start", "status": 500, "headers": headers})
            await self._send({"type": "http.response.body", "body": body})
            return
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": self._body})
