"""One generation of a loaded model, from the tokens of a prompt to the responses."""

from collections.abc import Callable, Generator, Iterable

import mlx.core as mx

from mlx_mtp.decoding.calibration import choosing_policy
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, DraftPolicy
from mlx_mtp.decoding.exact import check_exact
from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.decoding.prompt_media import PromptMedia
from mlx_mtp.decoding.rules import LogitsProcessor
from mlx_mtp.decoding.stream import Stream, decode, token_budget
from mlx_mtp.gemma4.device_checks import check_quantized_attention
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.text.answer import TextStream
from mlx_mtp.text.tokenizer import open_thought

from .errors import OptionError
from .loaded_model import LoadedModel
from .options import GenerationOptions
from .responses import GenerationResponse, respond

# The number of prompt tokens between two snapshots. Other prompts can resume from a snapshot.
SNAPSHOT_EVERY = 2048


def begin(
    model: LoadedModel,
    prompt: list[int],
    options: GenerationOptions,
    on_prefill: Progress | None,
    check: Callable[[], None],
    media: PromptMedia,
) -> Generator[GenerationResponse, None, None]:
    """Check the prompt and all options, and return the generator of responses.

    `media` are the media in the prompt.
    `on_prefill` is called between chunks of the prompt. `check` is called there as well, and during the measurement of
    rounds. If one of them raises, the generation ends.

    Raises PromptError if the prompt cannot be used, and OptionError if an option cannot be used.
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
    _check_kv(model, options.kv_quantization)
    policy = _draft_policy(model, options, len(prompt), check)
    # An exact model reads every prompt, because the rounding of sums depends on how it is read.
    reuses = options.reuse_prompt and not model.exact
    stream = Stream(
        parts.target,
        parts.drafter,
        max_draft_tokens=MAX_DRAFT_TOKENS if model.exact else options.longest_draft,
        sampling=options.sampling.within(model.max_context),
        processors=processors,
        guide=parts.guides.guide(options, thought, stop_ids),
        logprobs=options.logprobs,
        rounds=parts.rounds,
        exact=model.exact,
        snapshot_every=SNAPSHOT_EVERY if reuses else None,
        kv_quantization=options.kv_quantization,
        media=media,
    )
    rounds = decode(
        stream,
        prompt,
        max_tokens=budget,
        num_draft_tokens=policy,
        stop_ids=stop_ids,
        prefill_step_size=options.prefill_step_size,
        on_prefill=checked(on_prefill, check),
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
    return _reusing(model, stream, policy, prompt, responses) if reuses else responses


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


def _reusing(
    model: LoadedModel,
    stream: Stream,
    policy: DraftPolicy,
    prompt: list[int],
    responses: Generator[GenerationResponse, None, None],
) -> Generator[GenerationResponse, None, None]:
    """Yield the responses of a stream that uses the prompt cache.

    The stream starts from the K/V of an earlier prompt, and puts its own K/V into the prompt cache. The policy starts
    from the index of the earlier text, if there is one.
    """
    reused = model.prompt_cache.take(stream.media.keys(prompt), stream.kv_format)
    if reused is not None:
        stream.resume(reused)
        if reused.entry.copy_index is not None:
            policy.resume(reused.entry.copy_index)
        del reused
    try:
        yield from responses
    finally:
        entry = stream.cache_entry()
        if entry is not None and not model.is_closed:
            # After a failure or Ctrl-C, the last pass may not be evaluated yet.
            mx.eval(list(entry.arrays()))
            entry.copy_index = policy.copy_index
            model.prompt_cache.put(entry)
