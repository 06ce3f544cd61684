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
from .speculative import Progress, Round, Stats, Stream, decode, token_budget
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
    token or string, "length" at `max_tokens` or the end of the context.
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


class _StopStrings:
    """Cuts text at the first stop string, holding back what may yet become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""

    def add(self, text: str, *, is_last: bool) -> tuple[str, bool]:
        """The text that can be emitted now, and whether a stop string ends it."""
        self._held += text
        found = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if found:
            return self._held[: min(found)], True
        beginnings = [n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        ready = len(self._held) - (0 if is_last else max(beginnings, default=0))
        text, self._held = self._held[:ready], self._held[ready:]
        return text, False


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
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        num_draft_tokens: int | None = None,
        prefill_step_size: int = DEFAULT_PREFILL_STEP,
        on_prefill: Progress | None = None,
    ) -> Iterator[GenerationResponse]:
        """Decode one response per token, greedily unless `sampling` says how to draw.

        A string is encoded as it stands, without chat template. `num_draft_tokens` (default 3 with a drafter) is the
        number of draft tokens per round; 0 decodes plainly. Greedy tokens do not depend on it; sampled ones keep their
        distribution, and with `Sampling(acceptance="coupled")` do not depend on it either.

        The text ends before the first of the `stop` strings, wherever tokens or blocks break it. `ignore_eos` goes on
        after the model's own stop tokens.

        Raises PromptError for a prompt that is empty or too long, OptionError for an option that cannot be honoured.
        """
        stop = [stop] if isinstance(stop, str) else list(stop)
        if "" in stop:
            raise OptionError("stop holds an empty string")
        k = self._draft_tokens(num_draft_tokens)
        if prefill_step_size < 1:
            raise OptionError(f"prefill_step_size must be at least 1, found {prefill_step_size}")
        tokens = (
            encode_prompt(self.tokenizer, prompt, use_chat_template=False) if isinstance(prompt, str) else list(prompt)
        )
        budget = token_budget(tokens, max_tokens, self.max_context)
        stream = Stream(self.target, self.drafter, max_draft_tokens=k, sampling=sampling)
        rounds = decode(
            stream,
            tokens,
            max_tokens=budget,
            num_draft_tokens=k,
            stop_ids=frozenset() if ignore_eos else frozenset(self.tokenizer.eos_token_ids),
            prefill_step_size=prefill_step_size,
            on_prefill=on_prefill,
        )
        return self._respond(rounds, len(tokens), budget, ignore_eos, _StopStrings(stop))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        num_draft_tokens: int | None = None,
        prefill_step_size: int = DEFAULT_PREFILL_STEP,
    ) -> GenerationResult:
        """The whole of `stream_generate`."""
        responses = list(
            self.stream_generate(
                prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                ignore_eos=ignore_eos,
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

    def _respond(
        self, rounds: Iterator[Round], prompt_tokens: int, budget: int, ignore_eos: bool, stop: _StopStrings
    ) -> Iterator[GenerationResponse]:
        eos = frozenset(self.tokenizer.eos_token_ids)
        detokenizer = self.tokenizer.detokenizer
        stats = Stats()
        generated = 0
        clock = _Clock(prompt_tokens)
        for result in rounds:
            if generated:
                stats.add(result.drafted, result.accepted)
            else:
                clock.first_token = time.perf_counter()
            for position, token in enumerate(result.tokens):
                generated += 1
                finish: Literal["stop", "length"] | None = "length" if generated == budget else None
                if token in eos and not ignore_eos:
                    finish = "stop"
                else:
                    detokenizer.add_token(token)
                if finish:
                    detokenizer.finalize()
                text, stopped = stop.add(detokenizer.last_segment, is_last=finish is not None)
                if stopped:
                    finish = "stop"
                yield GenerationResponse(
                    text=text,
                    token=token,
                    from_draft=position < result.accepted,
                    prompt_tokens=prompt_tokens,
                    prompt_tps=clock.prompt_tps(),
                    generation_tokens=generated,
                    generation_tps=clock.generation_tps(generated),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish,
                    stats=stats,
                )
                if stopped:
                    return
