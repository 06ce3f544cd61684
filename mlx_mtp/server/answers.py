"""Answer of a generation, and the base of its writers in the formats of the APIs.

A writer makes the whole answer and the events of a stream from the same parts, so that a stream has the content of the
whole answer.
"""

import json
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.decoding.report import LOWEST_LOGPROB
from mlx_mtp.model import Model
from mlx_mtp.responses import GenerationResponse
from mlx_mtp.text.call_syntax import CALL_START, beginning_at_end
from mlx_mtp.text.control_marks import ControlMarks
from mlx_mtp.text.tool_call_parser import ToolCallDelta, ToolCallParser

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
JsonObject = dict[str, Any]
Tools = Sequence[Mapping[str, Any]] | None


def new_id(prefix: str) -> str:
    """Return a new random id with this prefix."""
    return f"{prefix}{secrets.token_hex(12)}"


@dataclass
class Call:
    """Tool call of the answer: its id and name, and the text of its arguments so far."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: new_id("call_"))


@dataclass
class AnswerDelta:
    """Text, thought and tool calls that one token adds to the answer."""

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

    def add(self, response: GenerationResponse) -> AnswerDelta:
        """Add one token's response. Return the text, thought and calls that it adds."""
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
        return AnswerDelta(text, thought, calls)

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


def usage(answer: Answer) -> JsonObject:
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


def _generation_stats(response: GenerationResponse) -> JsonObject:
    """Return the statistics of a generation so far, for requests with `include_stats`."""
    stats = response.stats
    return {
        "from_draft": response.from_draft,
        "from_copy": response.from_copy,
        "rounds": stats.rounds,
        "rounds_ahead": stats.rounds_ahead,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "copied": stats.copied._asdict(),
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

    def logprob(self, token: int, logprob: float) -> JsonObject:
        """Return a token's text, log probability and bytes as OpenAI's API has them."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        single = _BYTE_TOKEN.fullmatch(piece)
        text = str(self._tokenizer.decode([token]))
        # A token that is part of a character has no valid text. Its bytes are known only if it is a byte token.
        data = [int(single.group(1), 16)] if single else None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": data}

    def logprobs(self, response: GenerationResponse) -> JsonObject | None:
        """Return the log probabilities of an answer token and of the most likely tokens in its place.

        The result is None if the request asks for no log probabilities, or if the token belongs to a thought.
        """
        found = response.logprobs
        if found is None or response.in_thought:
            return None
        top = [self.logprob(token, logprob) for token, logprob in found.top]
        return self.logprob(response.token, found.token) | {"top_logprobs": top}


class AnswerWriter(ABC):
    """Writer of an answer in the format of one endpoint, as a whole or as the events of a stream.

    `name` is the name of the model, and `id_prefix` the beginning of the answer's id.
    """

    def __init__(self, name: str, tokens: Tokens, answer: Answer, *, id_prefix: str, include_stats: bool) -> None:
        self.name = name
        self.tokens = tokens
        self.answer = answer
        self.id = new_id(id_prefix)
        self.created = int(time.time())
        self._include_stats = include_stats

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""
        return iter(())

    @abstractmethod
    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""

    @abstractmethod
    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""

    def fail(self, error: JsonObject) -> Iterator[str]:
        """Yield the events of an error, in place of the end. `error` is a body with OpenAI's error object."""
        yield sse(error)

    def alive(self, comment: str) -> str:
        """Return a sign of life for a stream without new tokens: a comment, which readers skip."""
        return f": {comment}\n\n"

    @abstractmethod
    def whole(self) -> JsonObject:
        """Return the whole answer as one JSON object."""

    def stats(self, response: GenerationResponse | None) -> JsonObject:
        """Return the field with the statistics up to a response. It is empty unless the request asks for them."""
        return {"stats": _generation_stats(response)} if self._include_stats and response is not None else {}


def sse(data: JsonObject | str, event: str | None = None) -> str:
    """Return the text of a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n" if event is None else f"event: {event}\ndata: {text}\n\n"
