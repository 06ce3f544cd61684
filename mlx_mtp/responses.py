"""The responses of a generation: one per token, with text, thought and statistics."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_mtp.decoding.report import Logprobs, RoundReport, Stats
from mlx_mtp.gemma4.disk_table import EmbeddingStats, MappedEmbedding
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


class Responder:
    """The responses of one generation, made from the reports of its rounds.

    `text` makes readable text of the tokens. The text ends after one of `stop_ids`, at a stop string, or after `budget`
    tokens. `counts_rows` says whether the statistics count the rows that logits processors see.
    """

    def __init__(
        self, text: TextStream, *, stop_ids: frozenset[int], prompt_tokens: int, budget: int, counts_rows: bool
    ) -> None:
        self.stats = Stats()
        self.is_ended = False
        self._text = text
        self._stop_ids = stop_ids
        self._prompt_tokens = prompt_tokens
        self._budget = budget
        self._counts_rows = counts_rows
        self._generated = 0
        self._cached = 0
        self._started = self._first_token = 0.0
        self._mapped: MappedEmbedding | None = None
        self._rows_before = EmbeddingStats()

    def start(self, cached: int, mapped: MappedEmbedding | None) -> None:
        """Start the clock of the prefill. The first `cached` tokens of the prompt need not be read.

        `mapped` is the table whose rows the statistics count, if there is one.
        """
        self._cached, self._mapped = cached, mapped
        if mapped is not None:
            self._rows_before = mapped.stats
        self._started = time.perf_counter()

    def add(self, report: RoundReport) -> Iterator[GenerationResponse]:
        """Yield a response for each token of a round. The first report is that of the prefill."""
        if self._mapped is not None:
            self.stats.embeddings = self._mapped.stats.since(self._rows_before)
        if self._generated:
            self.stats.add(report.drafted, report.accepted, report.host_reads, ahead=report.ahead, copied=report.copied)
        else:
            self._first_token = time.perf_counter()
        self.stats.processed_rows += report.drafted + 1 if self._counts_rows else 0
        for position in range(len(report.tokens)):
            yield self._response(report, position)
            if self.is_ended:
                return

    def _response(self, report: RoundReport, position: int) -> GenerationResponse:
        token = report.tokens[position]
        self._generated += 1
        is_stop = token in self._stop_ids
        is_last = is_stop or self._generated == self._budget
        piece = self._text.add(None if is_stop else token, is_last=is_last)
        self.is_ended = is_last or piece.stopped is not None
        return GenerationResponse(
            text=piece.text,
            token=token,
            from_draft=position < report.accepted,
            prompt_tokens=self._prompt_tokens,
            prompt_tps=(self._prompt_tokens - self._cached) / (self._first_token - self._started),
            generation_tokens=self._generated,
            generation_tps=self._generation_tps(),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason="stop" if is_stop or piece.stopped else "length" if is_last else None,
            stats=self.stats,
            logprobs=None if report.logprobs is None else report.logprobs[position],
            thought=piece.thought,
            in_thought=piece.in_thought,
            cached_tokens=self._cached,
            stop_string=piece.stopped,
            from_copy=report.copied and position < report.accepted,
        )

    def _generation_tps(self) -> float:
        """Return the speed of the tokens after the first, which belongs to prefill; 0.0 if there are none."""
        tokens = self._generated
        return (tokens - 1) / (time.perf_counter() - self._first_token) if tokens > 1 else 0.0
