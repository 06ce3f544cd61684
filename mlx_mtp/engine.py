"""Text in, text out: encoding, the decode loop, stop rules and statistics of a loaded pair."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from .config import DrafterConfig, TargetConfig
from .drafter import Drafter
from .errors import OptionError
from .gemma4 import Target
from .sampling import Sampling
from .speculative import LogitsProcessor, Logprobs, Progress, Round, Stats, Stream, decode, token_budget
from .tokenizer import encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEFAULT_MAX_TOKENS = 256
DEFAULT_DRAFT_TOKENS = 3
DEFAULT_PREFILL_STEP = 512


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. `num_draft_tokens`, of a round, is 3 by default with a drafter; 0 decodes plainly.

    Greedy tokens do not depend on it; sampled ones keep their distribution, and do not depend on it either with
    `Sampling(acceptance="coupled")`. The text ends before the first of the `stop` strings, wherever tokens or blocks
    break it. `ignore_eos` goes on after the model's own stop tokens; before `min_tokens` there can be none.
    `logits_processors` are called as by mlx-lm, for every row of a verify pass with the tokens before it; the drafter
    does not know of them. `logprobs` is the number of most likely tokens reported with each token's log probability.

    Raises OptionError for a value out of range.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logits_processors: Sequence[LogitsProcessor] = ()
    logprobs: int | None = None
    num_draft_tokens: int | None = None
    prefill_step_size: int = DEFAULT_PREFILL_STEP

    def __post_init__(self) -> None:
        least = {"max_tokens": 1, "min_tokens": 0, "logprobs": 0, "num_draft_tokens": 0, "prefill_step_size": 1}
        for name, minimum in least.items():
            value = vars(self)[name]
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise OptionError(f"{name} must be an integer of at least {minimum}, found {value!r}")
        if self.min_tokens > self.max_tokens:
            raise OptionError(f"min_tokens is {self.min_tokens}, more than the max_tokens of {self.max_tokens}")
        if "" in self.stop_strings:
            raise OptionError("stop holds an empty string")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


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
    logprobs: Logprobs | None = None


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


def _no_stop_before(length: int, stop_ids: Iterable[int]) -> LogitsProcessor:
    """A processor that excludes these tokens while the text is shorter."""
    excluded = mx.array(sorted(stop_ids))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, excluded].add(-mx.inf) if tokens.size < length else logits

    return process


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
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Any,
    ) -> Iterator[GenerationResponse]:
        """Decode, one response per token; a string is encoded as it stands, without chat template.

        `changes` are fields of `GenerationOptions`, as in `stream_generate(prompt, max_tokens=100)`. Everything is
        checked here, before the first token is asked for. Closing the iterator ends the generation.

        Raises PromptError for a prompt that is empty or too long, OptionError for an option that cannot be honoured.
        """
        chosen = replace(options or GenerationOptions(), **changes)
        k = self._draft_tokens(chosen.num_draft_tokens)
        tokens = (
            encode_prompt(self.tokenizer, prompt, use_chat_template=False) if isinstance(prompt, str) else list(prompt)
        )
        budget = token_budget(tokens, chosen.max_tokens, self.max_context)
        eos = frozenset(self.tokenizer.eos_token_ids)
        processors = list(chosen.logits_processors)
        if chosen.min_tokens:
            processors.append(_no_stop_before(len(tokens) + chosen.min_tokens, eos))
        stream = Stream(
            self.target,
            self.drafter,
            max_draft_tokens=k,
            sampling=chosen.sampling,
            processors=processors,
            logprobs=chosen.logprobs,
        )
        rounds = decode(
            stream,
            tokens,
            max_tokens=budget,
            num_draft_tokens=k,
            stop_ids=frozenset() if chosen.ignore_eos else eos,
            prefill_step_size=chosen.prefill_step_size,
            on_prefill=on_prefill,
        )
        return self._respond(rounds, len(tokens), budget, chosen)

    def generate(
        self, prompt: str | Sequence[int], options: GenerationOptions | None = None, **changes: Any
    ) -> GenerationResult:
        """The whole of `stream_generate`."""
        responses = list(self.stream_generate(prompt, options, **changes))
        return GenerationResult("".join(r.text for r in responses), [r.token for r in responses], responses[-1])

    def _draft_tokens(self, requested: int | None) -> int:
        if requested is None:
            return 0 if self.drafter is None else DEFAULT_DRAFT_TOKENS
        if requested and self.drafter is None:
            raise OptionError(f"num_draft_tokens is {requested}, but no drafter is loaded")
        return requested

    def _respond(
        self, rounds: Iterator[Round], prompt_tokens: int, budget: int, options: GenerationOptions
    ) -> Iterator[GenerationResponse]:
        eos = frozenset() if options.ignore_eos else frozenset(self.tokenizer.eos_token_ids)
        stop = _StopStrings(options.stop_strings)
        detokenizer = self.tokenizer.detokenizer
        stats = Stats()
        generated = 0
        clock = _Clock(prompt_tokens)
        for result in rounds:
            if generated:
                stats.add(result.drafted, result.accepted)
            else:
                clock.first_token = time.perf_counter()
            stats.processed_rows += result.drafted + 1 if options.logits_processors else 0
            for position, token in enumerate(result.tokens):
                generated += 1
                finish: Literal["stop", "length"] | None = "length" if generated == budget else None
                if token in eos:
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
                    logprobs=None if result.logprobs is None else result.logprobs[position],
                )
                if stopped:
                    return
