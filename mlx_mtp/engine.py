"""Text in, text out: encoding, the decode loop, stop rules and statistics of a loaded pair."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from .config import DrafterConfig, TargetConfig
from .drafter import Drafter
from .errors import OptionError
from .gemma4 import Target
from .sampling import Sampling
from .speculative import Progress, Stats, Stream, decode, token_budget
from .tokenizer import encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEFAULT_MAX_TOKENS = 256
DEFAULT_DRAFT_TOKENS = 3
DEFAULT_PREFILL_STEP = 512


@dataclass
class GenerationResponse:
    """One token of a generation, with mlx-lm's field names.

    `text` is the readable text since the last response, valid UTF-8. `prompt_tps` and `generation_tps` are tokens per
    second so far, `peak_memory` is in GB (1e9 bytes). `finish_reason` is set on the last response: "stop" after a stop
    token, "length" at `max_tokens` or the end of the context.
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


@dataclass
class GenerationResult:
    """A whole generation: its text, its tokens (a stop token included), and the last response's figures."""

    text: str
    tokens: list[int]
    last: GenerationResponse


@dataclass
class _Clock:
    """Tokens per second of prefill and decoding."""

    prompt_tokens: int
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0

    def prompt_tps(self) -> float:
        return self.prompt_tokens / (self.first_token - self.started)

    def generation_tps(self, tokens: int) -> float:
        """Of the tokens after the first, which belongs to prefill. 0.0 as long as there are none."""
        return (tokens - 1) / (time.perf_counter() - self.first_token) if tokens > 1 else 0.0


@dataclass(frozen=True, repr=False, eq=False)
class Model:
    """A loaded target with its tokenizer and, unless it decodes plainly, its drafter. Made by `mlx_mtp.load`."""

    target: Target
    drafter: Drafter | None
    tokenizer: "TokenizerWrapper"
    config: TargetConfig
    drafter_config: DrafterConfig | None

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together (config field `max_position_embeddings`)."""
        return self.config.text.max_position_embeddings

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        num_draft_tokens: int | None = None,
        prefill_step_size: int = DEFAULT_PREFILL_STEP,
        on_prefill: Progress | None = None,
    ) -> Iterator[GenerationResponse]:
        """Decode one response per token, greedily unless `sampling` says how to draw.

        A string is encoded as it stands, without chat template. `num_draft_tokens` (default 3 with a drafter) is the
        number of draft tokens per round; 0 decodes plainly. Greedy tokens do not depend on it; sampled ones keep their
        distribution, and with `Sampling(acceptance="coupled")` do not depend on it either.

        Raises PromptError for a prompt that is empty or too long, OptionError for draft tokens without a drafter.
        """
        k = self._draft_tokens(num_draft_tokens)
        if prefill_step_size < 1:
            raise OptionError(f"prefill_step_size must be at least 1, found {prefill_step_size}")
        tokens = (
            encode_prompt(self.tokenizer, prompt, use_chat_template=False) if isinstance(prompt, str) else list(prompt)
        )
        budget = token_budget(tokens, max_tokens, self.max_context)
        stream = Stream(self.target, self.drafter, max_draft_tokens=k, sampling=sampling)
        return self._stream(stream, tokens, budget, k, prefill_step_size, on_prefill)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        num_draft_tokens: int | None = None,
        prefill_step_size: int = DEFAULT_PREFILL_STEP,
    ) -> GenerationResult:
        """The whole of `stream_generate`."""
        responses = list(
            self.stream_generate(
                prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                num_draft_tokens=num_draft_tokens,
                prefill_step_size=prefill_step_size,
            )
        )
        return GenerationResult("".join(r.text for r in responses), [r.token for r in responses], responses[-1])

    def _draft_tokens(self, requested: int | None) -> int:
        if requested is None:
            return 0 if self.drafter is None else DEFAULT_DRAFT_TOKENS
        if requested < 0:
            raise OptionError(f"num_draft_tokens must be at least 0, found {requested}")
        if requested and self.drafter is None:
            raise OptionError(f"num_draft_tokens is {requested}, but no drafter is loaded")
        return requested

    def _stream(
        self,
        stream: Stream,
        prompt: list[int],
        max_tokens: int,
        k: int,
        prefill_step_size: int,
        on_prefill: Progress | None,
    ) -> Iterator[GenerationResponse]:
        stop_ids = frozenset(self.tokenizer.eos_token_ids)
        detokenizer = self.tokenizer.detokenizer
        stats = Stats()
        generated = 0
        clock = _Clock(len(prompt))
        for result in decode(
            stream,
            prompt,
            max_tokens=max_tokens,
            num_draft_tokens=k,
            stop_ids=stop_ids,
            prefill_step_size=prefill_step_size,
            on_prefill=on_prefill,
        ):
            if generated:
                stats.add(result.drafted, result.accepted)
            else:
                clock.first_token = time.perf_counter()
            for position, token in enumerate(result.tokens):
                generated += 1
                finish: Literal["stop", "length"] | None = "length" if generated == max_tokens else None
                if token in stop_ids:
                    finish = "stop"
                else:
                    detokenizer.add_token(token)
                if finish:
                    detokenizer.finalize()
                yield GenerationResponse(
                    text=detokenizer.last_segment,
                    token=token,
                    from_draft=position < result.accepted,
                    prompt_tokens=len(prompt),
                    prompt_tps=clock.prompt_tps(),
                    generation_tokens=generated,
                    generation_tps=clock.generation_tps(generated),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish,
                    stats=stats,
                )
