"""Writers of the answers of `/v1/chat/completions` and `/v1/completions`."""

from collections.abc import Iterator

from mlx_mtp.responses import GenerationResponse
from mlx_mtp.text.tool_call_parser import ToolCallDelta

from .answers import Answer, AnswerWriter, JsonObject, Tokens, sse, usage
from .openai_requests import ChatRequest, CompletionRequest


class ChatWriter(AnswerWriter):
    """Writer of the answer of `/v1/chat/completions`."""

    def __init__(self, request: ChatRequest, name: str, tokens: Tokens, answer: Answer) -> None:
        super().__init__(name, tokens, answer, id_prefix="chatcmpl-", include_stats=request.include_stats)
        self.request = request
        self.index = 0
        self._logprobs: list[JsonObject] = []

    def begin(self) -> Iterator[str]:
        """Yield the events before the first token."""
        yield self._chunk({"role": "assistant", "content": ""})

    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        added = self.answer.add(response)
        logprobs = self.tokens.logprobs(response)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        delta: JsonObject = {}
        if added.text:
            delta["content"] = added.text
        if added.thought:
            delta["reasoning_content"] = added.thought
        if added.calls:
            delta["tool_calls"] = [self._call_delta(call) for call in added.calls]
        if delta or logprobs is not None or self.request.include_stats:
            yield self._chunk(delta, response=response, logprobs=logprobs)

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""
        yield from self.finish()
        yield from self.close(usage(self.answer))

    def finish(self) -> Iterator[str]:
        """Yield the event with the finish reason."""
        yield self._chunk({}, finish_reason=self.answer.finish_reason, response=self.answer.last)

    def close(self, counts: JsonObject) -> Iterator[str]:
        """Yield the last events of the stream. `counts` are its token counts."""
        if self.request.stream_options.include_usage:
            yield sse(self._head("chat.completion.chunk") | {"choices": [], "usage": counts})
        yield sse("[DONE]")

    def whole(self) -> JsonObject:
        """Return the whole answer as one JSON object."""
        answer = self.answer
        message: JsonObject = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        choice = {
            "index": self.index,
            "message": message,
            "logprobs": {"content": self._logprobs, "refusal": None} if self.request.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(answer)} | self.stats(answer.last)

    def _call_delta(self, delta: ToolCallDelta) -> JsonObject:
        if delta.name is None:
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        call = self.answer.calls[delta.index]
        function = {"name": call.name, "arguments": delta.arguments}
        return {"index": delta.index, "id": call.id, "type": "function", "function": function}

    def _chunk(
        self,
        delta: JsonObject,
        *,
        response: GenerationResponse | None = None,
        logprobs: JsonObject | None = None,
        finish_reason: str | None = None,
    ) -> str:
        choice = {
            "index": self.index,
            "delta": delta,
            "logprobs": None if logprobs is None else {"content": [logprobs], "refusal": None},
            "finish_reason": finish_reason,
        }
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]} | self.stats(response)
        # As in OpenAI's API, the usage is null in all chunks before the one that has it.
        return sse(chunk | ({"usage": None} if self.request.stream_options.include_usage else {}))

    def _head(self, kind: str) -> JsonObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}


class CompletionWriter(AnswerWriter):
    """Writer of the answer of `/v1/completions`."""

    def __init__(self, request: CompletionRequest, name: str, tokens: Tokens) -> None:
        super().__init__(name, tokens, Answer(is_raw=True), id_prefix="cmpl-", include_stats=request.include_stats)
        self.request = request
        self.index = 0
        self._logprobs = _empty_logprobs()

    def add(self, response: GenerationResponse) -> Iterator[str]:
        """Add one token's response. Yield its events."""
        offset = len(self.answer.text)
        added = self.answer.add(response)
        logprobs = None if response.logprobs is None else self._token_logprobs(response, offset)
        for name, values in (logprobs or {}).items():
            self._logprobs[name] += values
        if added.text or logprobs is not None or self.request.include_stats:
            yield sse(self._chunk(added.text, logprobs, None) | self.stats(response))

    def end(self) -> Iterator[str]:
        """Yield the events after the last token."""
        yield from self.finish()
        yield from self.close(usage(self.answer))

    def finish(self) -> Iterator[str]:
        """Yield the event with the finish reason."""
        yield sse(self._chunk("", None, self.answer.finish_reason) | self.stats(self.answer.last))

    def close(self, counts: JsonObject) -> Iterator[str]:
        """Yield the last events of the stream. `counts` are its token counts."""
        if self.request.stream_options.include_usage:
            yield sse(self._head() | {"choices": [], "usage": counts})
        yield sse("[DONE]")

    def whole(self) -> JsonObject:
        """Return the whole answer as one JSON object."""
        logprobs = None if self.request.logprobs is None else self._logprobs
        body = self._body(self.answer.text, logprobs, self.answer.finish_reason)
        return body | {"usage": usage(self.answer)} | self.stats(self.answer.last)

    def _token_logprobs(self, response: GenerationResponse, offset: int) -> JsonObject:
        assert response.logprobs is not None
        own = self.tokens.logprob(response.token, response.logprobs.token)
        top = [self.tokens.logprob(token, logprob) for token, logprob in response.logprobs.top]
        return {
            "tokens": [own["token"]],
            "token_logprobs": [own["logprob"]],
            "top_logprobs": [{token["token"]: token["logprob"] for token in top}],
            "text_offset": [offset],
        }

    def _body(self, text: str, logprobs: JsonObject | None, finish_reason: str | None) -> JsonObject:
        choice = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head() | {"choices": [choice]}

    def _chunk(self, text: str, logprobs: JsonObject | None, finish_reason: str | None) -> JsonObject:
        # As in a chat, the usage is null in all chunks before the one that has it.
        counts = self.request.stream_options.include_usage
        return self._body(text, logprobs, finish_reason) | ({"usage": None} if counts else {})

    def _head(self) -> JsonObject:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.name}


def _empty_logprobs() -> JsonObject:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
