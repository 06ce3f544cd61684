"""Text in, text out: encoding, the decode loop, stop rules and statistics of a loaded pair."""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import mlx.core as mx
import numpy as np

from . import prompt_cache
from .cache import KVQuantization, check_group_size
from .calibration import device_identity, measure_rounds, read_or_measure
from .config import DrafterConfig, TargetConfig
from .decoding.compiled import CompiledRounds
from .decoding.report import Logprobs, Round, Stats
from .decoding.rules import LogitsProcessor
from .decoding.stream import Progress, Stream, decode, token_budget
from .draft_length import MAX_DRAFT_TOKENS, CostCurve, DraftLength
from .drafter import Drafter
from .embeddings import EmbeddingStats
from .errors import ClosedError, OptionError, PromptCacheError, PromptError
from .exact import check_exact
from .gemma4 import Target
from .guide import Channel, Guide, compile_grammar
from .lifetime import Lifetime
from .memory import memory_size
from .output import check_file
from .prompt_cache import PromptCache
from .sampling import Sampling, default_sampling
from .text import TextStream
from .tokenizer import encode_chat, encode_prompt, open_thought, thought_channel
from .weights import fingerprint
from .worker import Job

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from mlx_lm.tokenizer_utils import TokenizerWrapper

logger = logging.getLogger(__name__)

# What to decode from: text, token ids, or the messages of a conversation, each with its role and content.
Prompt = str | Sequence[int] | mx.array | Sequence[Mapping[str, Any]]

DEFAULT_MAX_TOKENS = 256
DEFAULT_PREFILL_STEP = 512
# Far beyond what is ever accepted; the buffers of a longer draft would take the memory.
LARGEST_DRAFT = 1024
# Tokens of a prompt between two states to go on from.
_SNAPSHOT_EVERY = 2048
# Share of the machine's memory for prompts read before.
_PROMPT_CACHE_SHARE = 0.1
# As in mlx-lm.
DEFAULT_KV_GROUP_SIZE = 64
DEFAULT_QUANTIZED_KV_START = 5000
KV_BITS = (4, 8)
# Those that MLX has kernels for.
KV_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. `num_draft_tokens`, of a round, is "auto" by default: as many as make most tokens per second, by
    what rounds cost on this machine (see `Model.calibrate`) and by what was accepted so far. 0 decodes plainly.

    Greedy tokens do not depend on it; sampled ones keep their distribution, and do not depend on it either with
    `Sampling(acceptance="coupled")`. With block verification a seed gives the same text for the same number, or for
    "auto" on the same machine as long as the measurement is kept.

    The text ends before the first of the `stop` strings, wherever tokens or blocks break it. `ignore_eos` goes on after
    the model's own stop tokens; before `min_tokens` there can be none. `logits_processors` are called as by mlx-lm, for
    every row of a verify pass with the tokens before it; the drafter does not know of them. `logprobs` is the number of
    most likely tokens reported with each token's log probability.

    With one of `json_schema`, `regex` and `grammar` (see `guide.compile_grammar`) the answer is always in that
    language: up to its end, where the text stops, or a beginning of it where `max_tokens` cut it short.

    `enable_thinking` lets the answer begin with a thought, and is the switch of the chat template for messages.
    `thinking_budget` is the most tokens of a thought, after which it is closed and the answer begins.

    With `reuse_prompt`, what the prompt has in common with earlier ones of the same model is not read again, and it is
    kept for later ones (see `Model.prompt_cache`). An exact model reads every prompt, as sums round by their order.

    With `kv_bits`, 8 or 4, the K/V of full-attention layers are quantized in groups of `kv_group_size` values (32, 64
    or 128, dividing the head size) as soon as there are `quantized_kv_start` tokens. That may change the text, but what
    was said of `num_draft_tokens` still holds.

    Raises OptionError for a value out of range, and for options that contradict each other.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logits_processors: Sequence[LogitsProcessor] = ()
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    enable_thinking: bool = False
    thinking_budget: int | None = None
    num_draft_tokens: int | Literal["auto"] = "auto"
    prefill_step_size: int = DEFAULT_PREFILL_STEP
    reuse_prompt: bool = True
    kv_bits: int | None = None
    kv_group_size: int = DEFAULT_KV_GROUP_SIZE
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START

    def __post_init__(self) -> None:
        for name, choices in (("kv_bits", (None, *KV_BITS)), ("kv_group_size", KV_GROUP_SIZES)):
            value = vars(self)[name]
            # Of the type as well: 8.0 equals 8, but MLX takes no float.
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                *most, last = [choice for choice in choices if choice is not None]
                raise OptionError(f"{name} must be {', '.join(map(str, most))} or {last}, found {value!r}")
        least = dict.fromkeys(
            ["min_tokens", "logprobs", "thinking_budget", "num_draft_tokens", "quantized_kv_start"], 0
        )
        least |= {"max_tokens": 1, "prefill_step_size": 1}
        for name, minimum in least.items():
            value = vars(self)[name]
            if name == "num_draft_tokens" and value == "auto":
                continue
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise OptionError(f"{name} must be an integer of at least {minimum}, found {value!r}")
        if self.num_draft_tokens != "auto" and self.num_draft_tokens > LARGEST_DRAFT:
            raise OptionError(f"num_draft_tokens must be at most {LARGEST_DRAFT}, found {self.num_draft_tokens}")
        if self.min_tokens > self.max_tokens:
            raise OptionError(f"min_tokens is {self.min_tokens}, more than the max_tokens of {self.max_tokens}")
        if "" in self.stop_strings:
            raise OptionError("stop holds an empty string")
        if self.thinking_budget is not None and not self.enable_thinking:
            raise OptionError("thinking_budget is given, but enable_thinking is not")
        if self.compiled_grammar() is not None and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise OptionError(f"{name} contradicts a json_schema, regex or grammar, which says where the answer ends")

    def compiled_grammar(self) -> str | None:
        """What the answer is constrained to, in llguidance's form; None if to nothing."""
        return compile_grammar(json_schema=self.json_schema, regex=self.regex, grammar=self.grammar)

    @property
    def kv_quantization(self) -> KVQuantization | None:
        return (
            None if self.kv_bits is None else KVQuantization(self.kv_bits, self.kv_group_size, self.quantized_kv_start)
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass
class GenerationResponse:
    """One token of a generation, with mlx-lm's field names.

    `text` is the readable text of the answer since the last response, `thought` that of the thought before it (without
    the tokens and the name of its channel); both are valid UTF-8. `in_thought` says whether the token is one of a
    thought, those of its channel included. Of the prompt's tokens, `cached_tokens` were read for
    an earlier one; `prompt_tps` is of the others. It and `generation_tps` are tokens per second so far, `peak_memory`
    is in GB (1e9 bytes). `finish_reason` is set on the last response: "stop" after a stop token or string, "length" at
    `max_tokens` or the end of the context. `stop_string` is the one of `GenerationOptions.stop` that ended the text.
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


@dataclass
class GenerationResult:
    """A whole generation: answer, thought, all tokens (a stop token included), and the last response's figures."""

    text: str
    thought: str
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


def _result(responses: list[GenerationResponse]) -> GenerationResult:
    text, thought = "".join(r.text for r in responses), "".join(r.thought for r in responses)
    return GenerationResult(text, thought, [r.token for r in responses], responses[-1])


def _checked(on_progress: Progress | None, check: Callable[[], None]) -> Progress:
    """The callback, with a check before and after it."""

    def report(done: int, total: int) -> None:
        check()
        if on_progress is not None:
            on_progress(done, total)
        check()

    return report


# What `Model.close` drops, and what is left of a closed model.
_DROPPED = ("target", "drafter", "tokenizer", "prompt_cache")
_KEPT = {"config", "drafter_config", "exact", "context_limit", "_life"}


@dataclass(frozen=True, repr=False, eq=False)
class Model:
    """A loaded target with its tokenizer and, unless it decodes plainly, its drafter. Made by `mlx_mtp.load`.

    With `exact`, verify passes have the bits of plain decoding. Rounds are compiled with the weights as they are:
    change none after the first generation.

    Any thread may use it; threads take turns, round by round and chunk by chunk of a prompt. In a `with` statement, or
    with `close`, its memory is released; whatever is asked of it afterwards is a ClosedError.
    """

    target: Target
    drafter: Drafter | None
    tokenizer: "TokenizerWrapper"
    config: TargetConfig
    drafter_config: DrafterConfig | None
    exact: bool = False
    context_limit: int | None = None
    prompt_cache: PromptCache = field(default_factory=lambda: PromptCache(int(_PROMPT_CACHE_SHARE * memory_size())))
    _life: Lifetime = field(default_factory=Lifetime, init=False)

    def close(self) -> None:
        """Release the memory: weights, the K/V of prompts, compiled rounds, and MLX's cache of freed buffers.

        Generations that run or wait end with a ClosedError, in whatever thread, as do iterators that are open, at their
        next item. Waits for the round, or the part of a prompt, that is being computed. Closing again does nothing.
        """
        if not self._life.end():
            return
        self.prompt_cache.clear()
        for name in vars(self).keys() - _KEPT:
            del vars(self)[name]
        mx.clear_cache()
        logger.info("closed %s", self.config.path.parent)

    @property
    def is_closed(self) -> bool:
        return self._life.is_closed

    def __enter__(self) -> Self:
        self._life.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Called for what is not there: what `close` has dropped."""
            if name in _DROPPED:
                raise ClosedError(f"the model is closed: it has no {name} any more")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together: `context_limit`, else config field `max_position_embeddings`."""
        most = self.config.text.max_position_embeddings
        return most if self.context_limit is None else min(most, self.context_limit)

    @property
    def per_layer_embeddings(self) -> Literal["resident", "mapped"] | None:
        """Where the per-layer table is: in memory or in its files. None for a target that has none."""
        if not self.config.text.per_layer_input_size:
            return None
        return "resident" if self.target.mapped is None else "mapped"

    @property
    def embedding_stats(self) -> EmbeddingStats | None:
        """Rows of mapped per-layer embeddings since loading; None where none are mapped."""
        return None if self.target.mapped is None else self.target.mapped.stats

    @property
    def default_sampling(self) -> Sampling:
        """How the model's makers sample (`generation_config.json`): what the command lines begin with."""
        return default_sampling(self.config.sampling, self.max_context)

    def encode(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt: messages go through the chat template, text is encoded as it stands. For messages,
        `tools` are functions as OpenAI's API describes them, and `template_options` are further switches of the chat
        template, such as `preserve_thinking`.

        Raises PromptError for messages that cannot be rendered and for token ids that are not in the vocabulary.
        """
        self._life.check()
        if isinstance(prompt, str):
            return self._in_vocabulary(encode_prompt(self.tokenizer, prompt, use_chat_template=False))
        items: list[Any] = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)  # type: ignore[assignment]
        if items and isinstance(items[0], Mapping):
            tokens = encode_chat(
                self.tokenizer,
                items,
                enable_thinking=enable_thinking,
                tools=tools,
                template_options=template_options,
            )
            return self._in_vocabulary(tokens)
        size = self.target.config.vocab_size
        for token in items:
            is_id = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not is_id or not 0 <= token < size:
                raise PromptError(f"the prompt must hold token ids from 0 to {size - 1}, found {token!r}")
        return [int(token) for token in items]

    def _in_vocabulary(self, tokens: list[int]) -> list[int]:
        """The tokens themselves, if the model has an embedding for each: a fine-tune may have added some without."""
        size = self.target.config.vocab_size
        for token in tokens:
            if token >= size:
                text = self.tokenizer.convert_ids_to_tokens(token)
                raise PromptError(f"the prompt holds {text!r}, token {token}, but the model has embeddings of {size}")
        return tokens

    def stream_generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Any,
    ) -> Iterator[GenerationResponse]:
        """Decode, one response per token. For the kinds of prompt see `encode`.

        `changes` are fields of `GenerationOptions`, as in `stream_generate(prompt, max_tokens=100)`. Everything is
        checked here, before the first token is asked for. Closing the iterator ends the generation.

        Raises PromptError for a prompt that is empty or too long, OptionError for an option that cannot be honoured,
        ClosedError once the model is closed.
        """
        with self._life:
            chosen = replace(options or GenerationOptions(), **changes)
            return self._life.guard(self._responses(prompt, chosen, on_prefill, self._life.check))

    async def astream_generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Any,
    ) -> AsyncGenerator[GenerationResponse, None]:
        """`stream_generate` for an event loop: the model computes on a thread of its own, several generations one after
        the other in the order in which their first items were asked for.

        `on_prefill` is called on the event loop, so that it may touch a user interface; what it raises ends the
        generation and is raised here. Closing the iterator (`aclose`, or `contextlib.aclosing`), and cancelling the
        task that waits for it, ends the generation within a round or between two chunks of the prompt.

        Raises what `stream_generate` raises when the first item is asked for, and ClosedError when the model is closed
        meanwhile.
        """

        def start(job: Job[GenerationResponse]) -> Iterator[GenerationResponse]:
            def check() -> None:
                self._life.check()
                job.check()

            with self._life:
                chosen = replace(options or GenerationOptions(), **changes)
                report = None if on_prefill is None else job.on_loop(on_prefill)
                return self._life.guard(self._responses(prompt, chosen, report, check))

        job = self._life.worker().submit(start)
        try:
            async for response in job:
                yield response
        finally:
            job.cancel()

    async def agenerate(
        self, prompt: Prompt, options: GenerationOptions | None = None, **changes: Any
    ) -> GenerationResult:
        """The whole of `astream_generate`. Cancelling the task that waits for it ends the generation."""
        async with aclosing(self.astream_generate(prompt, options, **changes)) as responses:
            return _result([response async for response in responses])

    def _responses(
        self, prompt: Prompt, chosen: GenerationOptions, on_prefill: Progress | None, check: Callable[[], None]
    ) -> Generator[GenerationResponse, None, None]:
        """As `stream_generate`. What `check` raises, called now and then before the first token, ends it."""
        tokens = self.encode(prompt, enable_thinking=chosen.enable_thinking)
        budget = token_budget(tokens, chosen.max_tokens, self.max_context)
        eos = frozenset(self.tokenizer.eos_token_ids)
        stop_ids = frozenset() if chosen.ignore_eos else eos
        processors = list(chosen.logits_processors)
        if chosen.min_tokens:
            processors.append(_no_stop_before(len(tokens) + chosen.min_tokens, eos))
        thought = None if self._channel is None else open_thought(self.tokenizer, self._channel, tokens)
        self._check_exact(chosen.kv_quantization)
        k = self._draft_tokens(chosen, lambda *_: check())
        reuses = chosen.reuse_prompt and not self.exact
        stream = Stream(
            self.target,
            self.drafter,
            # The order of K/V rows, and with it how sums round, is the same for all numbers of draft tokens.
            max_draft_tokens=max(k, MAX_DRAFT_TOKENS) if isinstance(k, int) else MAX_DRAFT_TOKENS,
            sampling=chosen.sampling.within(self.max_context),
            processors=processors,
            guide=self._guide(chosen, thought, stop_ids),
            logprobs=chosen.logprobs,
            rounds=self._rounds,
            exact=self.exact,
            snapshot_every=_SNAPSHOT_EVERY if reuses else None,
            kv_quantization=chosen.kv_quantization,
        )
        rounds = decode(
            stream,
            tokens,
            max_tokens=budget,
            num_draft_tokens=k,
            stop_ids=stop_ids,
            prefill_step_size=chosen.prefill_step_size,
            on_prefill=_checked(on_prefill, check),
        )
        text = TextStream(self.tokenizer, self._channel, chosen.stop_strings, thought)
        is_processed = bool(chosen.logits_processors)
        responses = self._respond(stream, rounds, text, stop_ids, len(tokens), budget, is_processed)
        return self._reusing(stream, tokens, responses) if reuses else responses

    def generate(self, prompt: Prompt, options: GenerationOptions | None = None, **changes: Any) -> GenerationResult:
        """The whole of `stream_generate`."""
        return _result(list(self.stream_generate(prompt, options, **changes)))

    def save_prompt(
        self,
        prompt: Prompt,
        file: str | Path,
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Any,
    ) -> int:
        """Read a prompt and write its K/V to a safetensors file, for `load_prompt`. Returns its number of tokens.

        Of the options, those of K/V quantization and `prefill_step_size` matter: the first must be the same when it is
        gone on from.

        Raises PromptError and OptionError as `stream_generate` does, OutputError if the file cannot be written.
        """
        with self._life:
            chosen = replace(options or GenerationOptions(), **changes)
            check_file(Path(file))
            tokens = self.encode(prompt)
            token_budget(tokens, 1, self.max_context)
            self._check_reuse()
            kv = chosen.kv_quantization
            stream = Stream(self.target, None, max_draft_tokens=MAX_DRAFT_TOKENS, kv_quantization=kv)
            stream.read(tokens, chosen.prefill_step_size, _checked(on_prefill, self._life.check))
            entry = stream.entry()
            assert entry is not None
            prompt_cache.save(entry, Path(file), self._fingerprint)
            return len(tokens)

    def load_prompt(self, file: str | Path, options: GenerationOptions | None = None, **changes: Any) -> list[int]:
        """Take a saved prompt into the prompt cache. Returns its tokens: prompts that begin with them and have at least
        one more go on from there, if generated with the same options of K/V quantization.

        Raises PromptCacheError if the file is damaged, of another model or of another version, or was read with other
        such options.
        """
        with self._life:
            self._check_reuse()
            expected = replace(options or GenerationOptions(), **changes).kv_quantization
            entry = prompt_cache.load(Path(file), self._fingerprint)
            if entry.kind.quantization != expected:
                raise PromptCacheError(
                    f"{file}: its K/V quantization is {entry.kind.quantization}, but {expected} is asked for: "
                    "kv_bits, kv_group_size and quantized_kv_start must be those it was made with"
                )
            self.prompt_cache.limit = max(self.prompt_cache.limit, entry.nbytes)
            self.prompt_cache.put(entry)
            return list(entry.tokens)

    def _check_reuse(self) -> None:
        if self.exact:
            raise OptionError("an exact model reuses no prompts: how its sums round depends on how they were read")

    def calibrate(
        self,
        sampling: Sampling | None = None,
        *,
        kv_bits: int | None = None,
        kv_group_size: int = DEFAULT_KV_GROUP_SIZE,
        anew: bool = False,
        on_progress: Progress | None = None,
    ) -> CostCurve:
        """What rounds cost on this machine with such sampling (greedy by default), in seconds; with `kv_bits`, once K/V
        are quantized.

        Measured once, in a few seconds, for all pairs of the same shapes, and kept in the user's cache directory (see
        `calibration.cache_directory`). The first generation that needs it does it otherwise. `anew` measures again.

        Raises OptionError without a drafter or for K/V options that cannot be honoured, CalibrationError if the clock
        gives nonsense.
        """
        with self._life:
            return self._calibrate(sampling or Sampling(), kv_bits, kv_group_size, anew, on_progress)

    def _calibrate(
        self, sampling: Sampling, kv_bits: int | None, kv_group_size: int, anew: bool, on_progress: Progress | None
    ) -> CostCurve:
        if self.drafter is None:
            raise OptionError("the cost of rounds is asked for, but no drafter is loaded")
        drafter = self.drafter
        kv = GenerationOptions(kv_bits=kv_bits, kv_group_size=kv_group_size, quantized_kv_start=0).kv_quantization
        if kv is not None:
            check_group_size(self.config.text, kv)
        identity = self._identity(sampling, kv)
        key = repr(identity)
        if anew or key not in self._curves:
            self._curves[key] = read_or_measure(
                identity, lambda: measure_rounds(self.target, drafter, sampling, on_progress, kv), anew=anew
            )
        return self._curves[key]

    def _identity(self, sampling: Sampling, kv: KVQuantization | None) -> dict[str, Any]:
        """All that the cost of a round depends on. Of sampling, which options are in use; of K/V, whether and how they
        are quantized, not from where on: in texts so short that they never are, attention costs little either way."""
        defaults = vars(Sampling())
        options = sorted(name for name, value in vars(sampling).items() if name != "seed" and value != defaults[name])
        configs = [self.config, self.drafter_config]
        shapes = [repr((c.text, c.quantization)) for c in configs if c is not None]
        head = self.drafter_config
        assert head is not None
        shapes.append(repr((head.num_centroids, head.centroid_top_k, head.draft_vocab_size)))
        kind: dict[str, Any] = {
            "pair": shapes,
            "dtype": str(self.target.dtype),
            "exact": self.exact,
            "sampling": options,
            "kv": None if kv is None else [kv.bits, kv.group_size],
        }
        if self.per_layer_embeddings == "mapped":
            kind["per_layer_embeddings"] = "mapped"
        return kind | device_identity()

    def _draft_tokens(self, options: GenerationOptions, on_progress: Progress) -> int | DraftLength:
        requested = options.num_draft_tokens
        if self.drafter is None:
            if requested not in (0, "auto"):
                raise OptionError(f"num_draft_tokens is {requested}, but no drafter is loaded")
            return 0
        if requested != "auto":
            if self.exact and requested > MAX_DRAFT_TOKENS:
                raise OptionError(f"num_draft_tokens is {requested}: exact passes verify at most {MAX_DRAFT_TOKENS}")
            return requested
        kv = options.kv_bits, options.kv_group_size
        return DraftLength(self._calibrate(options.sampling, *kv, anew=False, on_progress=on_progress))

    def _check_exact(self, kv: KVQuantization | None) -> None:
        """`load` has checked passes over K/V that are not quantized."""
        if not self.exact or kv is None:
            return
        kv = kv._replace(start=0)
        if kv not in self._checked:
            check_exact(self.target, self._rounds, kv)
            self._checked.add(kv)

    @cached_property
    def _checked(self) -> set[KVQuantization]:
        return set()

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.target, repr(self.config.text))

    @cached_property
    def _curves(self) -> dict[str, CostCurve]:
        return {}

    @cached_property
    def _rounds(self) -> CompiledRounds:
        # Compiled and not, a round may round differently.
        return CompiledRounds(always=self.exact)

    @cached_property
    def _channel(self) -> Channel | None:
        return thought_channel(self.tokenizer)

    @cached_property
    def _grammar_tokenizer(self) -> "LLTokenizer":
        """Seconds to make for a vocabulary of 262144."""
        from llguidance.hf import from_tokenizer

        eos = sorted(self.tokenizer.eos_token_ids)
        try:
            return from_tokenizer(self.tokenizer._tokenizer, n_vocab=self.target.config.vocab_size, eos_token=eos)
        except ValueError as error:
            raise OptionError(f"{self.config.path.parent}: the tokenizer cannot follow a grammar: {error}") from None

    def _guide(self, options: GenerationOptions, thought: int | None, stop_ids: frozenset[int]) -> Guide | None:
        """What constrains the tokens, if anything does. `thought` is as for `Guide`."""
        if options.enable_thinking and self._channel is None:
            raise OptionError("enable_thinking is set, but the tokenizer has no <|channel> token for thoughts")
        grammar = options.compiled_grammar()
        if grammar is None and options.thinking_budget is None:
            return None
        matcher = None
        if grammar is not None:
            from llguidance import LLMatcher

            matcher = LLMatcher(self._grammar_tokenizer, grammar, log_level=0)
        guide = Guide(
            self.target.config.vocab_size,
            stop_ids,
            matcher=matcher,
            channel=self._channel if options.enable_thinking or thought is not None else None,
            thought_budget=options.thinking_budget,
            thought=thought,
            suppressed=self.config.suppress_tokens,
        )
        # A grammar without any text is an error now rather than after the prompt.
        guide.mask()
        return guide

    def _reusing(
        self, stream: Stream, prompt: list[int], responses: Generator[GenerationResponse, None, None]
    ) -> Generator[GenerationResponse, None, None]:
        """The responses, with what was read before in the stream, and what it read in the prompt cache afterwards."""
        reused = self.prompt_cache.take(prompt, stream.kind)
        if reused is not None:
            stream.resume(reused)
            del reused
        try:
            yield from responses
        finally:
            entry = stream.entry()
            if entry is not None and not self.is_closed:
                # After a failure or Ctrl-C the last pass may be due still.
                mx.eval(list(entry.arrays()))
                self.prompt_cache.put(entry)

    def _respond(
        self,
        stream: Stream,
        rounds: Iterator[Round],
        text: TextStream,
        stop_ids: frozenset[int],
        prompt_tokens: int,
        budget: int,
        is_processed: bool,
    ) -> Generator[GenerationResponse, None, None]:
        stats = Stats()
        generated = 0
        cached = stream.cache.length
        clock = _Clock(prompt_tokens - cached)
        before = self.embedding_stats
        for result in rounds:
            if (now := self.embedding_stats) is not None and before is not None:
                stats.embeddings = now.since(before)
            if generated:
                stats.add(result.drafted, result.accepted, result.host_reads)
            else:
                clock.first_token = time.perf_counter()
            stats.processed_rows += result.drafted + 1 if is_processed else 0
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
                )
                if piece.stopped:
                    return
