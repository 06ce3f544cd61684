"""Writer of answers in the format of Anthropic's API: a message of blocks."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from mlx_mtp.responses import GenerationResponse

from .answers import Answer, AnswerWriter, JsonObject, Tokens, new_id, sse
from .anthropic_errors import anthropic_error
from .anthropic_requests import INVALID_JSON, MessagesRequest

# Clients send a thought back only if its signature is not empty. Here the signature has no meaning.
SIGNATURE = "bWx4LW10cA=="
# The stream sends a ping after this many tokens without an event.
_SILENT_TOKENS = 16

TextBlockType = Literal["thinking", "text"]


class MessagesWriter(AnswerWriter):
    """Writer of the answer of `/v1/messages`: a list of blocks (thoughts, texts and tool calls), one open at a time.

    The message begins with the first token, because its usage is not known before. The arguments of a call must be a
    JSON object, so they are held back until the call ends. Text that is not a JSON object becomes the value of
    `INVALID_JSON`.
    """

    def __init__(self, request: MessagesRequest, name: str, tokens: Tokens, answer: Answer, max_tokens: int) -> None:
        super().__init__(name, tokens, answer, id_prefix="msg_", include_stats=request.include_stats)
        self.request = request
        self._max_tokens = max_tokens
        self._blocks: list[JsonObject] = []
        self._is_open = False
        self._silent = 0

    def alive(self, comment: str) -> str:
        """Return a ping event, the sign of life of Anthropic's API."""
        return _event("ping")

    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        if self.request.max_tokens == 0:
            # The request asks only for the prefill of the prompt.
            response = replace(response, text="", thought="")
        is_first = self.answer.last is None
        added = self.answer.add(response)
        if is_first:
            yield _event("message_start", message=self._message([], None, None, output_tokens=0))
        events = [
            *(self._continue("thinking", added.thought) if added.thought else ()),
            *(self._continue("text", added.text) if added.text else ()),
        ]
        for call in added.calls:
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
        """Yield the events after the last token."""
        yield from self._close()
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        yield _event(
            "message_delta", delta=delta, usage=self._usage(self._output_tokens), **self.stats(self.answer.last)
        )
        yield _event("message_stop")

    def fail(self, error: JsonObject) -> Iterator[str]:
        """Yield the event of an error, in place of the end."""
        yield sse(anthropic_error(error), "error")

    def whole(self) -> JsonObject:
        """Return the whole answer as one JSON object."""
        message = self._message(self._blocks, self._stop_reason, self._stop_sequence, self._output_tokens)
        return message | self.stats(self.answer.last)

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

    def _continue(self, kind: TextBlockType, text: str) -> Iterator[str]:
        """Add text to the open block of this kind, or start a new block. Yield the events."""
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._close()
            block: JsonObject = {"type": kind, kind: ""}
            yield from self._start(block | {"signature": ""} if kind == "thinking" else block)
        self._blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _start(self, block: JsonObject) -> Iterator[str]:
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
        """Number of tool calls among the blocks."""
        return sum(block["type"] == "tool_use" for block in self._blocks)

    def _delta(self, delta: JsonObject) -> str:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _message(
        self, content: list[JsonObject], stop_reason: str | None, stop_sequence: str | None, output_tokens: int
    ) -> JsonObject:
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

    def _usage(self, output_tokens: int) -> JsonObject:
        """Return the token counts so far. As in Anthropic's API, `input_tokens` does not count cached tokens."""
        last = self.answer.last
        assert last is not None
        return {
            "input_tokens": last.prompt_tokens - last.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": last.cached_tokens,
            "output_tokens": output_tokens,
            "output_tokens_details": {"thinking_tokens": min(self.answer.thought_tokens, output_tokens)},
        }


def _event(kind: str, **data: Any) -> str:
    return sse({"type": kind} | data, kind)


def _input(arguments: str) -> tuple[JsonObject, str]:
    """Return the input of a call, always an object, and the JSON text of this object.

    The text is `arguments` itself if it is a JSON object. Otherwise the object holds it as the value of `INVALID_JSON`.
    """
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
