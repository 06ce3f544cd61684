"""One generation of a loaded model: from the tokens of a prompt to responses."""

from collections.abc import Callable, Generator, Iterable

import mlx.core as mx

from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, DraftLength
from mlx_mtp.decoding.exact import check_exact
from mlx_mtp.decoding.rules import LogitsProcessor
from mlx_mtp.decoding.stream import Progress, Stream, decode, token_budget
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.text.answer import TextStream
from mlx_mtp.text.tokenizer import open_thought

from .errors import OptionError
from .loaded_model import LoadedModel
from .options import GenerationOptions
from .responses import GenerationResponse, respond

# Tokens of a prompt between two snapshots that other prompts can resume from.
SNAPSHOT_EVERY = 2048


def begin(
    model: LoadedModel, prompt: list[int], options: GenerationOptions, on_prefill: Progress
) -> Generator[GenerationResponse, None, None]:
    """Check everything, and return the generator of responses. `on_prefill` is called between chunks of the prompt and
    of the measurement of rounds; if it raises, the generation ends.

    Raises PromptError and OptionError for what cannot be honoured.
    """
    parts = model.parts
    budget = token_budget(prompt, options.max_tokens, model.max_context)
    eos = frozenset(parts.tokenizer.eos_token_ids)
    stop_ids = frozenset[int]() if options.ignore_eos else eos
    processors = list(options.logits_processors)
    if options.min_tokens:
        processors.append(_no_stop_before(len(prompt) + options.min_tokens, eos))
    channel = parts.guides.channel
    thought = None if channel is None else open_thought(parts.tokenizer, channel, prompt)
    _check_exact(model, options.kv_quantization)
    k = _draft_tokens(model, options, on_prefill)
    # An exact model reads every prompt: how its sums round depends on how it was read.
    reuses = options.reuse_prompt and not model.exact
    stream = Stream(
        parts.target,
        parts.drafter,
        # The order of K/V rows, and with it how sums round, is the same for all numbers of draft tokens.
        max_draft_tokens=max(k, MAX_DRAFT_TOKENS) if isinstance(k, int) else MAX_DRAFT_TOKENS,
        sampling=options.sampling.within(model.max_context),
        processors=processors,
        guide=parts.guides.guide(options, thought, stop_ids),
        logprobs=options.logprobs,
        rounds=parts.rounds,
        exact=model.exact,
        snapshot_every=SNAPSHOT_EVERY if reuses else None,
        kv_quantization=options.kv_quantization,
    )
    rounds = decode(
        stream,
        prompt,
        max_tokens=budget,
        num_draft_tokens=k,
        stop_ids=stop_ids,
        prefill_step_size=options.prefill_step_size,
        on_prefill=on_prefill,
    )
    responses = respond(
        stream,
        rounds,
        TextStream(parts.tokenizer, channel, options.stop_strings, thought),
        stop_ids=stop_ids,
        prompt_tokens=len(prompt),
        budget=budget,
        counts_rows=bool(options.logits_processors),
    )
    return _reusing(model, stream, prompt, responses) if reuses else responses


def checked(on_progress: Progress | None, check: Callable[[], None]) -> Progress:
    """The callback, with a check before and after it. Both may raise."""

    def report(done: int, total: int) -> None:
        check()
        if on_progress is not None:
            on_progress(done, total)
        check()

    return report


def _no_stop_before(length: int, stop_ids: Iterable[int]) -> LogitsProcessor:
    """A processor that excludes these tokens while the text is shorter."""
    excluded = mx.array(sorted(stop_ids))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, excluded].add(-mx.inf) if tokens.size < length else logits

    return process


def _draft_tokens(model: LoadedModel, options: GenerationOptions, on_progress: Progress) -> int | DraftLength:
    """How many draft tokens a round has, or the policy that says how many."""
    requested = options.num_draft_tokens
    if model.drafter is None:
        if requested not in (0, "auto"):
            raise OptionError(f"num_draft_tokens is {requested}, but no drafter is loaded")
        return 0
    if requested != "auto":
        if model.exact and requested > MAX_DRAFT_TOKENS:
            raise OptionError(f"num_draft_tokens is {requested}: exact passes verify at most {MAX_DRAFT_TOKENS}")
        return requested
    kv = options.kv_quantization
    kv = None if kv is None else kv._replace(start=0)
    return DraftLength(model.parts.costs.curve(options.sampling, kv, on_progress=on_progress))


def _check_exact(model: LoadedModel, kv: KVQuantization | None) -> None:
    """Compare exact rounds over quantized K/V with plain ones, once. `load` has done so over K/V that are not."""
    if not model.exact or kv is None:
        return
    kv = kv._replace(start=0)
    parts = model.parts
    if kv not in parts.checked:
        check_exact(parts.target, parts.rounds, kv)
        parts.checked.add(kv)


def _reusing(
    model: LoadedModel, stream: Stream, prompt: list[int], responses: Generator[GenerationResponse, None, None]
) -> Generator[GenerationResponse, None, None]:
    """The responses. The stream begins with the K/V of an earlier prompt, and leaves its own in the prompt cache."""
    reused = model.prompt_cache.take(prompt, stream.kind)
    if reused is not None:
        stream.resume(reused)
        del reused
    try:
        yield from responses
    finally:
        entry = stream.entry()
        if entry is not None and not model.is_closed:
            # After a failure or Ctrl-C the last pass may be due still.
            mx.eval(list(entry.arrays()))
            model.prompt_cache.put(entry)
