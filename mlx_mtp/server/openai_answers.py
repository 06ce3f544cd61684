"""Answers in the forms of OpenAI's API: a generation as a whole or as a stream.

Both are built from the same parts, so that a stream has the content of the whole answer.
"""

import json
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_mtp.decoding.report import LOWEST_LOGPROB
from mlx_mtp.model import Model
from mlx_mtp.responses import GenerationResponse
from mlx_mtp.text.call_syntax import CALL_START, beginning_at_end
from mlx_mtp.text.control_marks import ControlMarks
from mlx_mtp.text.tool_call_parser import ToolCallDelta, ToolCallParser

from .openai_requests import ChatRequest, CompletionRequest, ResponseRequest

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

Fields = dict[str, Any]
Tools = Sequence[Mapping[str, Any]] | None


def new_id(kind: str) -> str:
    """Return a new random id with the prefix `kind`."""
    return f"{kind}{secrets.token_hex(12)}"


@dataclass
class Call:
    """Tool call of the answer: its id and name, and the text of its arguments so far."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: new_id("call_"))


@dataclass
class Part:
    """Text, thought and tool calls that one token adds to the answer."""

    response: GenerationResponse
    text: str
    thought: str
    calls: list[ToolCallDelta]


class Answer:
    """Text, thought and tool calls of a generation so far.

    With `tools`, tool calls are read from the text. `on_unreadable` gets the number of new calls whose arguments cannot
    be read, if there are any. With `is_raw`, the text stays as the model wrote it. Otherwise the marks of control
    tokens are removed.
    """

    def __init__(
        self,
        tools: Tools = None,
        on_unreadable: Callable[[int], object] = lambda count: None,
        *,
        is_raw: bool = False,
    ) -> None:
        self._parser = None if tools is None else ToolCallParser(tools)
        self._marks = None if is_raw else ControlMarks(has_tools=tools is not None)
        self._on_unreadable = on_unreadable
        # This is the text of an open thought from its first call on. It is thought text if the model closes the
        # thought, and a call if the generation ends first.
        self._held_thought = ""
        self.text = ""
        self.thought = ""
        self.calls: list[Call] = []
        self.thought_tokens = 0
        self.last: GenerationResponse | None = None

    def add(self, response: GenerationResponse) -> Part:
        """Add one token's response. Return the part that it adds to the answer."""
        thought, called = self._read_thought(response)
        text, calls = self._read_calls(called + response.text, response.finish_reason)
        if self._marks is not None:
            text, before = self._marks.add(text, is_last=response.finish_reason is not None)
            thought += before
        for call in calls:
            if call.name is not None:
                self.calls.append(Call(call.name))
            self.calls[call.index].arguments += call.arguments
        self.text += text
        self.thought += thought
        self.thought_tokens += response.in_thought
        self.last = response
        return Part(response, text, thought, calls)

    def _read_calls(self, text: str, end: str | None) -> tuple[str, list[ToolCallDelta]]:
        """Return the content and the tool calls that become certain with a text. `end` is the finish reason."""
        if self._parser is None:
            return text, []
        unreadable = self._parser.unreadable
        found = self._parser.add(text, is_last=end is not None, is_cut=end == "length")
        if self._parser.unreadable > unreadable:
            self._on_unreadable(self._parser.unreadable - unreadable)
        return found

    def _read_thought(self, response: GenerationResponse) -> tuple[str, str]:
        """Return the thought text that is certain now, and the calls in a thought that the model never closed."""
        self._held_thought, thought = "", self._held_thought + response.thought
        if self._parser is None or not response.in_thought:
            return thought, ""
        start = thought.find(CALL_START)
        if response.finish_reason is not None and start >= 0:
            return thought[:start], thought[start:]
        if response.finish_reason is None:
            ready = start if start >= 0 else len(thought) - beginning_at_end(thought, CALL_START)
            thought, self._held_thought = thought[:ready], thought[ready:]
        return thought, ""

    @property
    def finish_reason(self) -> str | None:
        """Finish reason in OpenAI's API: `tool_calls` if the generation stopped and has tool calls."""
        assert self.last is not None
        return "tool_calls" if self.calls and self.last.finish_reason == "stop" else self.last.finish_reason


def usage(answer: Answer) -> Fields:
    """Return the token counts. Draft tokens are counted like OpenAI's predicted tokens."""
    last = answer.last
    assert last is not None
    stats = last.stats
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.generation_tokens,
        "total_tokens": last.prompt_tokens + last.generation_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": answer.thought_tokens,
            "accepted_prediction_tokens": stats.accepted,
            "rejected_prediction_tokens": stats.drafted - stats.accepted,
        },
    }


def generation_stats(response: GenerationResponse) -> Fields:
    """Return the statistics of a generation so far, for requests with `include_stats`."""
    stats = response.stats
    return {
        "from_draft": response.from_draft,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance_length": stats.acceptance_length,
        "acceptance_by_position": stats.acceptance_by_position,
        "prompt_tokens": response.prompt_tokens,
        "cached_tokens": response.cached_tokens,
        "prompt_tps": response.prompt_tps,
        "generation_tokens": response.generation_tokens,
        "generation_tps": response.generation_tps,
        "peak_memory_gb": response.peak_memory,
    }


class Tokens:
    """Texts, bytes and log probabilities of a model's tokens."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.tokenizer

    def logprob(self, token: int, logprob: float) -> Fields:
        """Return a token's text, log probability and bytes as OpenAI's API has them."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        single = _BYTE_TOKEN.fullmatch(piece)
        text = str(self._tokenizer.decode([token]))
        # A token that is part of a character has no valid text. Its bytes are known only if it is a byte token.
        data = [int(single.group(1), 16)] if single else None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": data}

    def logprobs(self, response: GenerationResponse) -> Fields | None:
        """Return the log probabilities of an answer token and of the most likely tokens in its place.

        The result is None if the request asks for no log probabilities, or if the token belongs to a thought.
        """
        found = response.logprobs
        if found is None or response.in_thought:
            return None
        top = [self.logprob(token, logprob) for token, logprob in found.top]
        return self.logprob(response.token, found.token) | {"top_logprobs": top}


class Form(ABC):
    """Base of an answer in the form of one endpoint, as a whole or as the events of a stream."""

    def __init__(self, name: str, tokens: Tokens) -> None:
        self.name = name
        self.tokens = tokens
        self.created = int(time.time())

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""
        return iter(())

    @abstractmethod
    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""

    @abstractmethod
    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""

    def fail(self, error: Fields) -> Iterator[str]:
        """Yield the events of an error, in place of the end. `error` is a body with OpenAI's error object."""
        yield sse(error)

    def alive(self, comment: str) -> str:
        """Return a sign of life for a stream without new tokens: a comment, which readers skip."""
        return f": {comment}\n\n"

    @abstractmethod
    def whole(self) -> Fields:
        """Return the whole answer as one JSON object."""


def sse(data: Fields | str, event: str | None = None) -> str:
    """Return the text of a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n" if event is None else f"event: {event}\ndata: {text}\n\n"


class ChatForm(Form):
    """Answer of `/v1/chat/completions`."""

    def __init__(self, request: ChatRequest, name: str, tokens: Tokens, answer: Answer) -> None:
        super().__init__(name, tokens)
        self.request = request
        self.answer = answer
        self.id = new_id("chatcmpl-")
        self._logprobs: list[Fields] = []

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""
        yield self._chunk({"role": "assistant", "content": ""})

    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        part = self.answer.add(response)
        logprobs = self.tokens.logprobs(response)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        delta: Fields = {}
        if part.text:
            delta["content"] = part.text
        if part.thought:
            delta["reasoning_content"] = part.thought
        if part.calls:
            delta["tool_calls"] = [self._call_delta(call) for call in part.calls]
        if delta or logprobs is not None or self.request.include_stats:
            yield self._chunk(delta, response=response, logprobs=logprobs)

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""
        yield self._chunk({}, finish_reason=self.answer.finish_reason, response=self.answer.last)
        if self.request.stream_options.include_usage:
            yield sse(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(self.answer)})
        yield sse("[DONE]")

    def whole(self) -> Fields:
        """Return the whole answer as one JSON object."""
        answer = self.answer
        message: Fields = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": self._logprobs, "refusal": None} if self.request.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(answer)} | self._stats(answer.last)

    def _call_delta(self, delta: ToolCallDelta) -> Fields:
        if delta.name is None:
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        call = self.answer.calls[delta.index]
        function = {"name": call.name, "arguments": delta.arguments}
        return {"index": delta.index, "id": call.id, "type": "function", "function": function}

    def _chunk(
        self,
        delta: Fields,
        *,
        response: GenerationResponse | None = None,
        logprobs: Fields | None = None,
        finish_reason: str | None = None,
    ) -> str:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None if logprobs is None else {"content": [logprobs], "refusal": None},
            "finish_reason": finish_reason,
        }
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]} | self._stats(response)
        # As in OpenAI's API, the usage is null in all chunks before the one that has it.
        return sse(chunk | ({"usage": None} if self.request.stream_options.include_usage else {}))

    def _head(self, kind: str) -> Fields:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _stats(self, response: GenerationResponse | None) -> Fields:
        return {"stats": generation_stats(response)} if self.request.include_stats and response is not None else {}


class CompletionForm(Form):
    """Answer of `/v1/completions`."""

    def __init__(self, request: CompletionRequest, name: str, tokens: Tokens) -> None:
        super().__init__(name, tokens)
        self.request = request
        self.answer = Answer(is_raw=True)
        self.id = new_id("cmpl-")
        self._logprobs = _empty_logprobs()

    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        offset = len(self.answer.text)
        part = self.answer.add(response)
        logprobs = None if response.logprobs is None else self._token_logprobs(response, offset)
        for name, values in (logprobs or {}).items():
            self._logprobs[name] += values
        if part.text or logprobs is not None or self.request.include_stats:
            yield sse(self._chunk(part.text, logprobs, None) | self._stats(response))

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""
        yield sse(self._chunk("", None, self.answer.finish_reason) | self._stats(self.answer.last))
        if self.request.stream_options.include_usage:
            yield sse(self._head() | {"choices": [], "usage": usage(self.answer)})
        yield sse("[DONE]")

    def whole(self) -> Fields:
        """Return the whole answer as one JSON object."""
        logprobs = None if self.request.logprobs is None else self._logprobs
        body = self._body(self.answer.text, logprobs, self.answer.finish_reason)
        return body | {"usage": usage(self.answer)} | self._stats(self.answer.last)

    def _token_logprobs(self, response: GenerationResponse, offset: int) -> Fields:
        assert response.logprobs is not None
        own = self.tokens.logprob(response.token, response.logprobs.token)
        top = [self.tokens.logprob(token, logprob) for token, logprob in response.logprobs.top]
        return {
            "tokens": [own["token"]],
            "token_logprobs": [own["logprob"]],
            "top_logprobs": [{token["token"]: token["logprob"] for token in top}],
            "text_offset": [offset],
        }

    def _body(self, text: str, logprobs: Fields | None, finish_reason: str | None) -> Fields:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head() | {"choices": [choice]}

    def _chunk(self, text: str, logprobs: Fields | None, finish_reason: str | None) -> Fields:
        # As in a chat, the usage is null in all chunks before the one that has it.
        counts = self.request.stream_options.include_usage
        return self._body(text, logprobs, finish_reason) | ({"usage": None} if counts else {})

    def _head(self) -> Fields:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.name}

    def _stats(self, response: GenerationResponse | None) -> Fields:
        return {"stats": generation_stats(response)} if self.request.include_stats and response is not None else {}


def _empty_logprobs() -> Fields:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _without_bytes(logprobs: list[Fields]) -> list[Fields]:
    """Return log probabilities without bytes, as events of `/v1/responses` have them."""
    return [
        {
            "token": found["token"],
            "logprob": found["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in found["top_logprobs"]],
        }
        for found in logprobs
    ]


def _with_bytes(logprob: Fields) -> Fields:
    """Return a log probability as items of `/v1/responses` have it. Its bytes are always a list."""
    tops = [top | {"bytes": top["bytes"] or []} for top in logprob["top_logprobs"]]
    return logprob | {"bytes": logprob["bytes"] or [], "top_logprobs": tops}


Status = Literal["in_progress", "completed", "incomplete", "failed"]


# An answer repeats these fields of the request. OpenAI's clients have types with these values only.
_KNOWN = {
    "effort": ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "summary": ("auto", "concise", "detailed"),
    "verbosity": ("low", "medium", "high"),
}


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request fields that an answer repeats, with null for a value that OpenAI does not have."""
    return {name: fields[name] if fields[name] in values else None for name, values in _KNOWN.items() if name in fields}


class ResponseForm(Form):
    """Answer of `/v1/responses`: a list of items (thoughts, messages and calls), one open at a time."""

    def __init__(self, request: ResponseRequest, name: str, tokens: Tokens, answer: Answer) -> None:
        super().__init__(name, tokens)
        self.request = request
        self.answer = answer
        self.id = new_id("resp_")
        self._output: list[Fields] = []
        # This is the open item of `_output`, None if all items are closed.
        self._open: Fields | None = None
        self._count = 0

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""
        for event in ("response.created", "response.in_progress"):
            yield self._event(event, response=self._response("in_progress"))

    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        part = self.answer.add(response)
        if part.thought:
            yield from self._continue("reasoning", part.thought)
        for call in part.calls:
            # The rest of a call comes before the text that follows it.
            if call.name is None:
                yield from self._continue_call(call.arguments)
        if part.text:
            yield from self._continue("message", part.text, self.tokens.logprobs(response))
        for call in part.calls:
            if call.name is not None:
                yield from self._close()
                yield from self._start_call(self.answer.calls[call.index])
                yield from self._continue_call(call.arguments)

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""
        status: Status = "completed" if self._is_complete else "incomplete"
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self._response(status))

    def fail(self, error: Fields) -> Iterator[str]:
        """Yield the event of an error, in place of the end."""
        found = error["error"]
        body = self._response("failed") | {"error": {"code": "server_error", "message": found["message"]}}
        yield self._event("response.failed", response=body)

    def whole(self) -> Fields:
        """Return the whole answer as one JSON object."""
        return self._response("completed" if self._is_complete else "incomplete")

    @property
    def _is_complete(self) -> bool:
        return self.answer.finish_reason != "length"

    def _continue(self, kind: str, text: str, logprobs: Fields | None = None) -> Iterator[str]:
        """Add text to the open item of this kind, or start a new item. Yield the events."""
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._start_text(kind)
        assert self._open is not None
        content = self._open["content"][0]
        content["text"] += text
        if kind == "reasoning":
            yield self._item_event("response.reasoning_text.delta", content_index=0, delta=text)
            return
        added = [] if logprobs is None else [logprobs]
        content["logprobs"] += [_with_bytes(found) for found in added]
        yield self._item_event(
            "response.output_text.delta", content_index=0, delta=text, logprobs=_without_bytes(added)
        )

    def _start_text(self, kind: str) -> Iterator[str]:
        if kind == "reasoning":
            self._open = {"id": new_id("rs_"), "type": "reasoning", "summary": [], "status": "in_progress"}
            content: Fields = {"type": "reasoning_text", "text": ""}
        else:
            self._open = {"id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant"}
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output.append(self._open)
        yield self._event(
            "response.output_item.added", output_index=len(self._output) - 1, item=self._open | {"content": []}
        )
        self._open["content"] = [content]
        yield self._item_event("response.content_part.added", content_index=0, part=content)

    def _start_call(self, call: Call) -> Iterator[str]:
        self._open = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress"}
        self._open |= {"call_id": call.id, "name": call.name, "arguments": ""}
        self._output.append(self._open)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=self._open)

    def _continue_call(self, arguments: str) -> Iterator[str]:
        if arguments and self._open is not None:
            self._open["arguments"] += arguments
            yield self._item_event("response.function_call_arguments.delta", delta=arguments)

    def _close(self, status: Status = "completed") -> Iterator[str]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            yield self._item_event(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        else:
            content = item["content"][0]
            is_thought = item["type"] == "reasoning"
            done = {"text": content["text"]}
            if not is_thought:
                done["logprobs"] = _without_bytes(content["logprobs"])
            kind = "reasoning_text" if is_thought else "output_text"
            yield self._item_event(f"response.{kind}.done", content_index=0, **done)
            yield self._item_event("response.content_part.done", content_index=0, part=content)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        self._open = None

    def _item_event(self, kind: str, **data: Any) -> str:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self._output) - 1, **data)

    def _event(self, kind: str, **data: Any) -> str:
        stats: Fields = {}
        if self.request.include_stats and self.answer.last is not None:
            stats = {"stats": generation_stats(self.answer.last)}
        event = sse({"type": kind, "sequence_number": self._count} | data | stats, kind)
        self._count += 1
        return event

    def _response(self, status: Status) -> Fields:
        request, answer = self.request, self.answer
        counted = None if answer.last is None else usage(answer)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self.name,
            "output": self._output,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": _known(request.reasoning.model_dump()),
            "store": False,
            "temperature": request.temperature,
            "text": {**request.text.model_dump(by_alias=True, exclude_none=True), **_known(request.text.model_dump())},
            "tool_choice": request.tool_choice
            if isinstance(request.tool_choice, str)
            else request.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in request.functions],
            "top_p": request.top_p,
            "truncation": request.truncation,
            "usage": None
            if counted is None
            else {
                "input_tokens": counted["prompt_tokens"],
                # OpenAI counts here the tokens that it charges for keeping. This server charges for none.
                "input_tokens_details": counted["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": answer.thought_tokens},
                "total_tokens": counted["total_tokens"],
            },
            "user": request.user,
            "metadata": {name: value for name, value in (request.metadata or {}).items() if isinstance(value, str)},
        }
