"""The responses of a generation: one per token, with text, thought and statistics."""

import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx

from mlx_mtp.decoding.report import Logprobs, RoundReport, Stats
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.text.answer import TextStream


@dataclass
class GenerationResponse:
    """One token of a generation, with mlx-lm's field names.

    `text` is the new readable text of the answer since the last response. `thought` is the new text of the thought
    before the answer, without the tokens and the name of its channel. Both are valid UTF-8. `in_thought` says whether
    the token belongs to a thought; the tokens of its channel belong to the thought.

    `from_draft` says whether the token is an accepted draft token, and `from_copy` whether this draft token was copied
    from the text.

    `cached_tokens` is the number of prompt tokens whose K/V come from an earlier prompt. `prompt_tps` counts the other
    prompt tokens. `prompt_tps` and `generation_tps` are tokens per second so far. `peak_memory` is in GB (1e9 bytes).

    `finish_reason` is set on the last response: "stop" after a stop token or a stop string, "length" at `max_tokens` or
    at the end of the context. `stop_string` is the string of `GenerationOptions.stop` that ended the text.
    """

    text: str
    token: int
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: Literal["stop", "length"] | None
    stats: Stats
    logprobs: Logprobs | None = None
    thought: str = ""
    in_thought: bool = False
    cached_tokens: int = 0
    stop_string: str | None = None
    from_copy: bool = False


@dataclass
class GenerationResult:
    """A whole generation: the answer, the thought, all tokens and the last response.

    `tokens` includes a stop token. `last` has the figures of the whole generation.
    """

    text: str
    thought: str
    tokens: list[int]
    last: GenerationResponse


def whole(responses: Sequence[GenerationResponse]) -> GenerationResult:
    """Combine the responses of one generation into a result."""
    text, thought = "".join(r.text for r in responses), "".join(r.thought for r in responses)
    return GenerationResult(text, thought, [r.token for r in responses], responses[-1])


@dataclass
class _Clock:
    """The speed of prefill and of decoding, in tokens per second."""

    prompt_tokens: int
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0

    def prompt_tps(self) -> float:
        """Return the speed of prefill."""
        return self.prompt_tokens / (self.first_token - self.started)

    def generation_tps(self, tokens: int) -> float:
        """Return the speed of the tokens after the first, which belongs to prefill; 0.0 if there are none."""
        return (tokens - 1) / (time.perf_counter() - self.first_token) if tokens > 1 else 0.0


def respond(
    stream: Stream,
    rounds: Iterable[RoundReport],
    text: TextStream,
    *,
    stop_ids: frozenset[int],
    prompt_tokens: int,
    budget: int,
    counts_rows: bool,
) -> Generator[GenerationResponse, None, None]:
    """Yield a response for each token of the rounds of a stream, until a stop or `budget` tokens.

    `counts_rows` says whether the statistics count the rows that logits processors see.
    """
    stats = Stats()
    generated = 0
    cached = stream.cache.length
    clock = _Clock(prompt_tokens - cached)
    mapped = stream.parts.target.mapped
    before = None if mapped is None else mapped.stats
    for result in rounds:
        if mapped is not None and before is not None:
            stats.embeddings = mapped.stats.since(before)
        if generated:
            stats.add(result.drafted, result.accepted, result.host_reads, ahead=result.ahead, copied=result.copied)
        else:
            clock.first_token = time.perf_counter()
        stats.processed_rows += result.drafted + 1 if counts_rows else 0
        for position, token in enumerate(result.tokens):
            generated += 1
            is_stop = token in stop_ids
            is_last = is_stop or generated == budget
            piece = text.add(None if is_stop else token, is_last=is_last)
            yield GenerationResponse(
                text=piece.text,
                token=token,
                from_draft=position < result.accepted,
                prompt_tokens=prompt_tokens,
                prompt_tps=clock.prompt_tps(),
                generation_tokens=generated,
                generation_tps=clock.generation_tps(generated),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason="stop" if is_stop or piece.stopped else "length" if is_last else None,
                stats=stats,
                logprobs=None if result.logprobs is None else result.logprobs[position],
                thought=piece.thought,
                in_thought=piece.in_thought,
                cached_tokens=cached,
                stop_string=piece.stopped,
                from_copy=result.copied and position < result.accepted,
            )
            if piece.stopped:
                return
