"""Writer of the answers of `/v1/responses`."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from mlx_mtp.responses import GenerationResponse

from .answers import Answer, AnswerWriter, Call, JsonObject, Tokens, new_id, sse, usage
from .openai_requests import ResponseRequest

Status = Literal["in_progress", "completed", "incomplete", "failed"]
# An answer repeats these fields of the request. OpenAI's clients have types with these values only.
_KNOWN = {
    "effort": ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "summary": ("auto", "concise", "detailed"),
    "verbosity": ("low", "medium", "high"),
}


class ResponseWriter(AnswerWriter):
    """Writer of the answer of `/v1/responses`: a list of items (thoughts, messages and calls), one open at a time."""

    def __init__(self, request: ResponseRequest, name: str, tokens: Tokens, answer: Answer) -> None:
        super().__init__(name, tokens, answer, id_prefix="resp_", include_stats=request.include_stats)
        self.request = request
        self._output: list[JsonObject] = []
        # This is the open item of `_output`, None if all items are closed.
        self._open: JsonObject | None = None
        self._count = 0

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""
        for event in ("response.created", "response.in_progress"):
            yield self._event(event, response=self._response("in_progress"))

    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        added = self.answer.add(response)
        if added.thought:
            yield from self._continue("reasoning", added.thought)
        for call in added.calls:
            # The rest of a call comes before the text that follows it.
            if call.name is None:
                yield from self._continue_call(call.arguments)
        if added.text:
            yield from self._continue("message", added.text, self.tokens.logprobs(response))
        for call in added.calls:
            if call.name is not None:
                yield from self._close()
                yield from self._start_call(self.answer.calls[call.index])
                yield from self._continue_call(call.arguments)

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""
        status: Status = "completed" if self._is_complete else "incomplete"
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self._response(status))

    def fail(self, error: JsonObject) -> Iterator[str]:
        """Yield the event of an error, in place of the end."""
        found = error["error"]
        body = self._response("failed") | {"error": {"code": "server_error", "message": found["message"]}}
        yield self._event("response.failed", response=body)

    def whole(self) -> JsonObject:
        """Return the whole answer as one JSON object."""
        return self._response("completed" if self._is_complete else "incomplete")

    @property
    def _is_complete(self) -> bool:
        return self.answer.finish_reason != "length"

    def _continue(self, kind: str, text: str, logprobs: JsonObject | None = None) -> Iterator[str]:
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
            content: JsonObject = {"type": "reasoning_text", "text": ""}
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
        stats = self.stats(self.answer.last)
        event = sse({"type": kind, "sequence_number": self._count} | data | stats, kind)
        self._count += 1
        return event

    def _response(self, status: Status) -> JsonObject:
        request = self.request
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
            "usage": None if self.answer.last is None else _response_usage(self.answer),
            "user": request.user,
            "metadata": {name: value for name, value in (request.metadata or {}).items() if isinstance(value, str)},
        }


def _response_usage(answer: Answer) -> JsonObject:
    """Return the token counts in the format of `/v1/responses`."""
    counted = usage(answer)
    return {
        "input_tokens": counted["prompt_tokens"],
        # OpenAI counts here the tokens that it charges for keeping. This server charges for none.
        "input_tokens_details": counted["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": answer.thought_tokens},
        "total_tokens": counted["total_tokens"],
    }


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request fields that an answer repeats, with null for a value that OpenAI does not have."""
    return {name: fields[name] if fields[name] in values else None for name, values in _KNOWN.items() if name in fields}


def _without_bytes(logprobs: list[JsonObject]) -> list[JsonObject]:
    """Return log probabilities without bytes, as events of `/v1/responses` have them."""
    return [
        {
            "token": found["token"],
            "logprob": found["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in found["top_logprobs"]],
        }
        for found in logprobs
    ]


def _with_bytes(logprob: JsonObject) -> JsonObject:
    """Return a log probability as items of `/v1/responses` have it. Its bytes are always a list."""
    tops = [top | {"bytes": top["bytes"] or []} for top in logprob["top_logprobs"]]
    return logprob | {"bytes": logprob["bytes"] or [], "top_logprobs": tops}
