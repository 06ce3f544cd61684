"""Answers in the form of Anthropic's API: a message of blocks, as a whole or as the events of a stream."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from mlx_mtp.responses import GenerationResponse

from .anthropic_errors import anthropic_error
from .anthropic_requests import INVALID_JSON, MessagesRequest
from .openai_answers import Answer, Fields, Form, Tokens, generation_stats, new_id, sse

# Clients send thoughts back with the signature only if it is not empty. Here it says nothing.
SIGNATURE = "bWx4LW10cA=="
# Tokens without an event after which the stream says that it lives.
_SILENT_TOKENS = 16

Kind = Literal["thinking", "text", "tool_use"]


class MessagesForm(Form):
    """`/v1/messages`: blocks, one open at a time: thoughts, text, calls.

    The message begins with the first token, as only then its usage is known. The arguments of a call are held back
    until it ends, as they must be a JSON object: text that is none becomes the value of `INVALID_JSON`.
    """

    def __init__(self, request: MessagesRequest, name: str, tokens: Tokens, answer: Answer, max_tokens: int) -> None:
        super().__init__(name, tokens)
        self.request = request
        self.answer = answer
        self.id = new_id("msg_")
        self._max_tokens = max_tokens
        self._blocks: list[Fields] = []
        self._is_open = False
        self._silent = 0

    def alive(self, comment: str) -> str:
        return _event("ping")

    def add(self, response: GenerationResponse) -> Iterator[str]:
        if self.request.max_tokens == 0:
            # Only the prompt is to be read.
            response = replace(response, text="", thought="")
        is_first = self.answer.last is None
        part = self.answer.add(response)
        if is_first:
            yield _event("message_start", message=self._message([], None, None, output_tokens=0))
        events = [
            *(self._continue("thinking", part.thought) if part.thought else ()),
            *(self._continue("text", part.text) if part.text else ()),
        ]
        for call in part.calls:
            if call.name is not None:
                events += [
                    *self._close(),
                    *self._start({"type": "tool_use", "id": new_id("toolu_"), "name": call.name}),
                ]
        self._silent = 0 if events else self._silent + 1
        yield from events
        if self._silent == _SILENT_TOKENS:
            self._silent = 0
            yield _event("ping")

    def end(self) -> Iterator[str]:
        yield from self._close()
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        yield _event("message_delta", delta=delta, usage=self._usage(self._output_tokens), **self._stats())
        yield _event("message_stop")

    def fail(self, error: Fields) -> Iterator[str]:
        yield sse(anthropic_error(error), "error")

    def whole(self) -> Fields:
        message = self._message(self._blocks, self._stop_reason, self._stop_sequence, self._output_tokens)
        return message | self._stats()

    @property
    def _stop_sequence(self) -> str | None:
        return None if self.answer.last is None else self.answer.last.stop_string

    @property
    def _stop_reason(self) -> str:
        last = self.answer.last
        assert last is not None
        if self.answer.finish_reason == "length":
            return "max_tokens" if last.generation_tokens >= self._max_tokens else "model_context_window_exceeded"
        if self.answer.finish_reason == "tool_calls":
            return "tool_use"
        return "end_turn" if last.stop_string is None else "stop_sequence"

    @property
    def _output_tokens(self) -> int:
        assert self.answer.last is not None
        return 0 if self.request.max_tokens == 0 else self.answer.last.generation_tokens

    def _continue(self, kind: Kind, text: str) -> Iterator[str]:
        """More of a text or a thought, in the block that is open or in a new one."""
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._close()
            block: Fields = {"type": kind, kind: ""}
            yield from self._start(block | {"signature": ""} if kind == "thinking" else block)
        self._blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _start(self, block: Fields) -> Iterator[str]:
        if block["type"] == "tool_use":
            block = block | {"input": {}}
        self._is_open = True
        self._blocks.append(block)
        yield _event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _close(self) -> Iterator[str]:
        if not self._is_open:
            return
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            arguments = self.answer.calls[self._calls - 1].arguments
            block["input"], text = _input(arguments)
            yield self._delta({"type": "input_json_delta", "partial_json": text})
        elif block["type"] == "thinking":
            block["signature"] = SIGNATURE
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        yield _event("content_block_stop", index=len(self._blocks) - 1)

    @property
    def _calls(self) -> int:
        """The number of calls among the blocks."""
        return sum(block["type"] == "tool_use" for block in self._blocks)

    def _delta(self, delta: Fields) -> str:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _message(
        self, content: list[Fields], stop_reason: str | None, stop_sequence: str | None, output_tokens: int
    ) -> Fields:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.name,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": self._usage(output_tokens) | {"service_tier": "standard"},
        }

    def _usage(self, output_tokens: int) -> Fields:
        """Token counts so far. As Anthropic counts them, `input_tokens` are without those that were read before."""
        last = self.answer.last
        assert last is not None
        return {
            "input_tokens": last.prompt_tokens - last.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": last.cached_tokens,
            "output_tokens": output_tokens,
            "output_tokens_details": {"thinking_tokens": min(self.answer.thought_tokens, output_tokens)},
        }

    def _stats(self) -> Fields:
        last = self.answer.last
        return {"stats": generation_stats(last)} if self.request.include_stats and last is not None else {}


def _event(kind: str, **data: Any) -> str:
    return sse({"type": kind} | data, kind)


def _input(arguments: str) -> tuple[Fields, str]:
    """The input of a call, always an object, and its JSON: that of the arguments, if they are one."""
    try:
        found = json.loads(arguments, parse_constant=_no_json)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found, arguments
    wrapped = {INVALID_JSON: arguments}
    return wrapped, json.dumps(wrapped, ensure_ascii=False)


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
