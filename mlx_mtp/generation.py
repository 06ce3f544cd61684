"""One generation of a loaded model, from the tokens of a prompt to its responses."""

from collections.abc import Callable, Generator, Iterable, Iterator

import mlx.core as mx

from mlx_mtp.decoding.calibration import choosing_policy
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, DraftPolicy, Option
from mlx_mtp.decoding.exact import check_exact
from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.decoding.prompt_media import PromptMedia
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.rules import LogitsProcessor
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import Decoding, token_budget
from mlx_mtp.gemma4.device_checks import check_quantized_attention
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.text.answer import TextStream
from mlx_mtp.text.tokenizer import open_thought

from .errors import OptionError
from .loaded_model import LoadedModel
from .memory_plan import TextMemory
from .options import GenerationOptions
from .responses import GenerationResponse, Responder

# The number of prompt tokens between two snapshots. Other prompts can resume from a snapshot.
SNAPSHOT_EVERY = 2048


class Generation:
    """One generation of a model, which its caller moves on step by step.

    Making it checks the prompt and all options. Then call `read_chunk` while `is_reading` is true, and run rounds until
    `is_ended` is true: `round` runs one alone, and `option`, `following` and `take` stand around a round of several
    generations.
    Each step returns the responses of its tokens. Call `close` at the end, also after a failure.

    `media` are the media in the prompt. `on_prefill` is called between chunks of the prompt. `check` is called there as
    well, and during the measurement of rounds. If one of them raises, close the generation. If the text is not
    `is_seeded`, nobody expects the same text again, and its draft lengths may depend on other texts.

    Raises PromptError if the prompt cannot be used, and OptionError if an option cannot be used.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompt: list[int],
        options: GenerationOptions,
        on_prefill: Progress | None,
        check: Callable[[], None],
        media: PromptMedia,
        *,
        is_seeded: bool = True,
    ) -> None:
        parts = model.parts
        budget = token_budget(prompt, options.max_tokens, model.max_context)
        eos = frozenset(parts.tokenizer.eos_token_ids)
        stop_ids = frozenset[int]() if options.ignore_eos else eos
        processors = list(options.logits_processors)
        if options.min_tokens:
            processors.append(_no_stop_before(len(prompt) + options.min_tokens, eos))
        channel = parts.guides.channel
        thought = None if channel is None else open_thought(parts.tokenizer, channel, prompt)
        _check_kv(model, options.kv_quantization)
        policy = _draft_policy(model, options, len(prompt), check)
        # An exact model reads every prompt, because the rounding of sums depends on how it is read.
        self._reuses = options.reuse_prompt and not model.exact
        self.stream = Stream(
            parts.target,
            parts.drafter,
            max_draft_tokens=MAX_DRAFT_TOKENS if model.exact else options.longest_draft,
            sampling=options.sampling.within(model.max_context),
            processors=processors,
            guide=parts.guides.guide(options, thought, stop_ids),
            logprobs=options.logprobs,
            rounds=parts.rounds,
            exact=model.exact,
            snapshot_every=SNAPSHOT_EVERY if self._reuses else None,
            kv_quantization=options.kv_quantization,
            media=media,
        )
        self.decoding = Decoding(
            self.stream,
            prompt,
            max_tokens=budget,
            policy=policy,
            stop_ids=stop_ids,
            prefill_step_size=options.prefill_step_size,
            on_prefill=checked(on_prefill, check),
            keeps_lengths=is_seeded and options.sampling.depends_on_lengths,
        )
        self._responder = Responder(
            TextStream(parts.tokenizer, channel, options.stop_strings, thought),
            stop_ids=stop_ids,
            prompt_tokens=len(prompt),
            budget=budget,
            counts_rows=bool(options.logits_processors),
        )
        self.compiled = parts.rounds
        # The memory of the text when it is as long as it may become.
        self.memory = TextMemory(
            model.config.text,
            parts.target.dtype.size,
            len(prompt) + budget,
            self.stream.cache.max_block,
            options.kv_quantization,
        )
        self._step_size = options.prefill_step_size
        self.model = model
        self._has_begun = self._is_closed = False
        # An earlier generation whose prompt begins with the same tokens, and the number of these tokens.
        self._source: tuple[Generation, int] | None = None
        # The numbers of tokens that the prompts of later generations share with this one.
        self._shared: set[int] = set()

    @property
    def is_reading(self) -> bool:
        """True until the whole prompt is read."""
        return self.decoding.is_reading

    @property
    def is_ended(self) -> bool:
        """True after the last token."""
        return self._responder.is_ended

    @property
    def unread(self) -> int:
        """The number of tokens of the prompt that are not read yet."""
        return self.decoding.unread

    def share(self, other: "Generation") -> None:
        """Wait for the K/V of an earlier generation that still reads, if both prompts have a beginning in common.

        The beginning must be longer than a chunk. It is then read once.
        """
        ours, theirs = self.stream, other.stream
        if not (self._reuses and other._reuses and other.is_reading and ours.kv_format == theirs.kv_format):
            return
        keys = ours.media.keys(self.decoding.prompt), theirs.media.keys(other.decoding.prompt)
        common = next((i for i, (a, b) in enumerate(zip(*keys, strict=False)) if a != b), min(map(len, keys)))
        if other.reaches(common) and (not self.is_held or self._source is None or common > self._source[1]):
            self._source = other, common
            other.note_shared(common)

    def note_shared(self, tokens: int) -> None:
        """Put the K/V of the first tokens into the prompt cache when they are read, as far as whole chunks go."""
        self._shared.add(tokens)

    def reaches(self, tokens: int) -> bool:
        """Return whether the next chunk of the prompt ends within this number of tokens."""
        return self.is_reading and not self._is_closed and self.stream.cache.length + self._step_size <= tokens

    @property
    def is_held(self) -> bool:
        """True while an earlier generation reads the beginning of this prompt."""
        return self._source is not None and self._source[0].reaches(self._source[1])

    @property
    def held(self) -> int:
        """The bytes of the K/V of the text in memory. Buffers take memory when they are first written."""
        return self.stream.cache.nbytes if self._has_begun else 0

    @property
    def growth(self) -> int:
        """The bytes by which the K/V of the text may still grow."""
        return max(0, self.memory.kept - self.held)

    @property
    def work(self) -> int:
        """The temporary bytes of a chunk of the prompt or of a round."""
        return self.memory.work(self._step_size, is_fused=self.stream.parts.target.fuses_prefill)

    def pause(self) -> None:
        """Let other work run before the next step. The time of the next round is not a measurement then."""
        self.decoding.pause()

    def read_chunk(self) -> Iterator[GenerationResponse]:
        """Read the next chunk of the prompt. After the last one, yield the response of the first token."""
        if not self._has_begun:
            self._begin()
        report = self.decoding.read_chunk()
        due = {tokens for tokens in self._shared if not self.reaches(tokens)}
        if any(tokens >= self.stream.cache.length for tokens in due):
            self._keep()
        self._shared -= due
        if report is not None:
            yield from self._responder.add(report)

    def round(self) -> Iterator[GenerationResponse]:
        """Run the next round alone."""
        yield from self._responder.add(self.decoding.round())

    def settle(self) -> Iterator[GenerationResponse]:
        """Finish the round in flight, if there is one. The next round may then be one of several generations."""
        report = self.decoding.settle()
        if report is not None:
            yield from self._responder.add(report)

    def option(self) -> Option:
        """Return the next round that this text can have together with those of others."""
        return self.decoding.option()

    def following(self) -> Option | None:
        """Return the round after the one in flight, or None if it must wait. See `Decoding.following`."""
        return self.decoding.following()

    def take(self, report: RoundReport) -> Iterator[GenerationResponse]:
        """Record a round that ran together with those of other generations."""
        self.decoding.take(report)
        yield from self._responder.add(report)

    def close(self) -> None:
        """End the generation, and put its K/V into the prompt cache. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._has_begun:
            return
        self.decoding.end()
        if self._reuses and not self.model.is_closed:
            self._keep()

    def _keep(self) -> None:
        """Put the K/V into the prompt cache."""
        entry = self.stream.cache_entry()
        if entry is not None:
            # After a failure or Ctrl-C, the last pass may not be evaluated yet.
            mx.eval(list(entry.arrays()))
            entry.copy_index = self.decoding.policy.copy_index
            self.model.prompt_cache.put(entry)

    def _begin(self) -> None:
        """Start from the K/V of an earlier prompt, if the prompt cache has one, and from the copy index of its text."""
        self._has_begun = True
        stream, decoding = self.stream, self.decoding
        if self._reuses:
            keys, keeps = stream.media.keys(decoding.prompt), self._source is not None
            # The source must not stay alive as long as this text.
            self._source = None
            reused = self.model.prompt_cache.take(keys, stream.kv_format, keeps=keeps)
            if reused is not None:
                stream.resume(reused)
                if reused.entry.copy_index is not None:
                    decoding.policy.resume(reused.entry.copy_index)
        self._responder.start(stream.cache.length, stream.parts.target.mapped)


def responses(generation: Generation) -> Generator[GenerationResponse, None, None]:
    """Run a generation alone, and yield its responses."""
    try:
        while generation.is_reading:
            yield from generation.read_chunk()
        while not generation.is_ended:
            yield from generation.round()
    finally:
        generation.close()


def checked(on_progress: Progress | None, check: Callable[[], None]) -> Progress:
    """Return a progress callback that runs `check` before and after `on_progress`. Both may raise."""

    def report(done: int, total: int) -> None:
        check()
        if on_progress is not None:
            on_progress(done, total)
        check()

    return report


def _no_stop_before(length: int, stop_ids: Iterable[int]) -> LogitsProcessor:
    """Return a logits processor that excludes these tokens while the text has fewer than `length` tokens."""
    excluded = mx.array(sorted(stop_ids))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, excluded].add(-mx.inf) if tokens.size < length else logits

    return process


def _draft_policy(
    model: LoadedModel, options: GenerationOptions, context: int, check: Callable[[], None]
) -> DraftPolicy:
    """Return the policy that chooses the rounds of a text after `context` tokens."""
    requested = options.num_draft_tokens
    copies = options.copy_drafts == "auto"
    if model.drafter is None:
        if requested not in (0, "auto"):
            raise OptionError(f"num_draft_tokens is {requested}, but no drafter is loaded")
        requested = requested if copies else 0
    if requested != "auto" and model.exact and requested > MAX_DRAFT_TOKENS:
        raise OptionError(f"num_draft_tokens is {requested}: exact passes verify at most {MAX_DRAFT_TOKENS}")
    kv = options.kv_quantization
    kv = None if kv is None else kv._replace(start=0)
    costs = model.parts.costs
    if not _host_has_part(options):
        return costs.policy(None if requested == "auto" else requested, options.sampling, kv, context, copies=copies)
    if requested != "auto":
        return DraftPolicy(requested)
    measured = costs.read(options.sampling, kv, context, on_progress=lambda *_: check())
    return choosing_policy(measured._replace(ahead=None), copies=copies)


def measures_first(options: GenerationOptions) -> bool:
    """Return whether unknown costs of rounds are measured before the text instead of in its first rounds.

    The host has a part in the rounds of such a text, which is not in the costs.
    """
    return options.num_draft_tokens == "auto" and _host_has_part(options)


def _host_has_part(options: GenerationOptions) -> bool:
    """Return whether the host must follow the text before each round."""
    guides = (options.json_schema, options.regex, options.grammar, options.thinking_budget)
    is_guided = any(guide is not None for guide in guides)
    return bool(is_guided or options.logits_processors or options.min_tokens)


def _check_kv(model: LoadedModel, kv: KVQuantization | None) -> None:
    """Check a K/V quantization once: its kernels, and the bits of exact rounds. `load` checked them without it."""
    if kv is None:
        return
    kv = kv._replace(start=0)
    parts = model.parts
    if kv not in parts.checked:
        check_quantized_attention(model.config.text, parts.target.dtype, kv)
        if model.exact:
            check_exact(parts.target, kv)
        parts.checked.add(kv)
