"""Options, model loading and printed figures that the command lines share."""

import argparse
import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from huggingface_hub.utils import tqdm

from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.checkpoints.hub import is_repo, resolve_folder
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS
from mlx_mtp.decoding.sampling import ACCEPTANCE_RULES, Penalties, Sampling
from mlx_mtp.decoding.stream import check_logprobs
from mlx_mtp.gemma4.kv_cache import check_group_size

from .errors import OptionError, PromptError
from .launched import SPLITS
from .loading import (
    DEMO_PAIR,
    PER_LAYER_EMBEDDINGS,
    follow_others,
    how_to_name_a_drafter,
    load,
    plan_memory,
)
from .memory_plan import parse_bytes
from .model import Model
from .options import DEFAULT_KV_GROUP_SIZE, DEFAULT_QUANTIZED_KV_START, GenerationOptions
from .responses import GenerationResponse
from .shell import lacking, write_out

# A wait of more than this many seconds gets a note on a terminal.
SLOW_SECONDS = 1.5


class OptionGroup(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an option."""
        ...


def add_model_options(parser: argparse.ArgumentParser, *, default: str | None = None, lengths: bool = True) -> None:
    """Add the options that choose and load a model.

    `default` is the help text's name for the model that a command uses without --model. If it is None, --model is
    required. `lengths` adds --num-draft-tokens.
    """
    what = "Target: a local folder or a Hugging Face hub id"
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=default is None, help=f"{what} (default: {default})." if default else f"{what}."
    )
    group.add_argument(
        "--drafter",
        help="Drafter: a local folder or a hub id, or 'none' to decode plainly. Default: MODEL/drafter, else the "
        "sibling MODEL-assistant, else, for a hub id whose name has a published size, Google's drafter.",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="Verify with the bits of plain decoding. It costs speed, and is an error on a device that cannot do it.",
    )
    add_embedding_option(group)
    add_split_options(group)
    group.add_argument(
        "--max-context",
        type=_context_length,
        metavar="N",
        help="Most tokens of prompt and answer together (default: the model's own).",
    )
    group.add_argument(
        "--memory-limit",
        type=_size,
        metavar="SIZE",
        help="Refuse to load a model that needs more memory, its K/V included: 6GB, 800MB; a bare number is GB.",
    )
    if not lengths:
        return
    group.add_argument(
        "--num-draft-tokens",
        type=_draft_tokens,
        default="auto",
        metavar="N|auto",
        help="Draft tokens per round; 0 decodes plainly. Default: auto, as many as are fastest on this machine, which "
        "is measured once per kind of model. Never changes greedy text, up to rounding.",
    )
    group.add_argument(
        "--copy-drafts",
        choices=("auto", "off"),
        default="auto",
        help="Whether rounds may copy draft tokens from the prompt and the answer so far, where this is fastest: up to "
        "31 tokens of code that is edited or text that is cited. For automatic --num-draft-tokens, with a drafter or "
        "without. Never changes greedy text, up to rounding. Default: auto.",
    )


def add_split_options(options: OptionGroup) -> None:
    """Add the options of a group of machines."""
    options.add_argument(
        "--split",
        choices=SPLITS,
        help="How machines that mlx.launch has started share the target: 'tensor' (default), 'feed-forward' for any "
        "number of machines, or 'pipeline' for slow connections. See docs/several-macs.md.",
    )
    options.add_argument(
        "--pipeline", dest="split", action="store_const", const="pipeline", help="The same as --split pipeline."
    )
    options.add_argument(
        "--bandwidths",
        type=_bandwidths,
        default=(),
        metavar="A,B,...",
        help="Memory bandwidths of the machines in the order of the host file, in any unit, for --split feed-forward "
        "or pipeline: a machine's part is in proportion (default: equal parts).",
    )


def add_embedding_option(options: OptionGroup) -> None:
    """Add --per-layer-embeddings."""
    options.add_argument(
        "--per-layer-embeddings",
        choices=PER_LAYER_EMBEDDINGS,
        default="auto",
        help="The per-layer table of E2B and E4B: 'resident' in memory, or 'mapped', read from disk row by row; never "
        "changes the text. Default: auto, mapped where the model would take more than half of the machine's memory.",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling, penalties, logit bias and the acceptance rule."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    unset = Sampling()
    add("--temp", dest="temperature", type=float, help="Sampling temperature, 0 is greedy (default: the model's own).")
    add("--top-k", type=int, help="Most likely tokens to draw from, 0 for all (default: the model's own).")
    add("--top-p", type=float, help="Probability mass to draw from, 1 for all (default: the model's own).")
    add("--min-p", type=float, help="Least share of the best token's probability (default: the model's own).")
    add(
        "--xtc-probability",
        type=float,
        default=unset.xtc_probability,
        help="Probability that XTC leaves out the most likely tokens (default: %(default)s).",
    )
    add(
        "--xtc-threshold",
        type=float,
        default=unset.xtc_threshold,
        help="XTC leaves out all tokens above this probability but the least likely of them (default: %(default)s).",
    )
    add("--seed", type=int, help="Seed of the random numbers (default: a new one each time, named with --verbose).")
    _add_penalty_options(group)
    add(
        "--acceptance",
        choices=ACCEPTANCE_RULES,
        default=unset.acceptance,
        help="Rule for sampled drafts: 'block' accepts most; with 'coupled' the text for a seed does not depend on the "
        "number of draft tokens (default: %(default)s).",
    )


def _add_penalty_options(options: OptionGroup) -> None:
    add = options.add_argument
    unset = Sampling()
    for name, effect in (
        ("repetition", "divides"),
        ("presence", "subtracts once"),
        ("frequency", "subtracts each time"),
    ):
        penalty, size = f"{name}_penalty", f"{name}_context_size"
        add(
            f"--{name}-penalty",
            type=float,
            help=f"Penalty for tokens seen before, which {effect} (default: the model's own, else "
            f"{getattr(unset, penalty):g}, none).",
        )
        add(
            f"--{name}-context-size",
            type=int,
            help=f"Preceding tokens that it looks at (default: {getattr(unset, size)}, or all for the model's own).",
        )
    add("--logit-bias", type=_logit_bias, default={}, metavar="JSON", help='Added to logits: {"token id": bias, ...}.')


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of K/V quantization."""
    add = parser.add_argument_group("quantized K/V").add_argument
    add("--kv-bits", type=int, metavar="8|4", help="Quantize the K/V of full-attention layers (default: no).")
    add(
        "--kv-group-size",
        type=int,
        default=DEFAULT_KV_GROUP_SIZE,
        help="Values of a K/V row quantized together: 32, 64 or 128; must divide the head size (default: %(default)s).",
    )
    add(
        "--quantized-kv-start",
        type=int,
        default=DEFAULT_QUANTIZED_KV_START,
        metavar="N",
        help="Quantize K/V from this number of tokens on, 0 from the beginning (default: %(default)s).",
    )


def read_kv_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the K/V options as keyword arguments of `GenerationOptions`."""
    return {name: getattr(args, name) for name in ("kv_bits", "kv_group_size", "quantized_kv_start")}


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    """Add --enable-thinking and --thinking-budget."""
    add = parser.add_argument_group("thinking").add_argument
    add(
        "--enable-thinking",
        action="store_true",
        help="Let the model think before it answers; thoughts are printed on stderr.",
    )
    add(
        "--thinking-budget",
        type=int,
        metavar="N",
        help="End a thought after this many tokens (default: no limit).",
    )


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _context_length(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a number of tokens, at least 2, found {text!r}")
    return int(text)


def _bandwidths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, found {text!r}") from None


def _draft_tokens(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of draft tokens or auto, found {text!r}") from None


def _logit_bias(text: str) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        found = text if len(text) < 200 else f"{text[:200]}..."
        raise argparse.ArgumentTypeError(f"expected a JSON object of token ids and numbers, found {found!r}") from None


def check_template_options(args: argparse.Namespace) -> None:
    """Check that no option needs the chat template that --ignore-chat-template turns off.

    Raises PromptError if the options combine it with a system prompt or with thinking.
    """
    if args.ignore_chat_template and (args.system_prompt is not None or args.enable_thinking):
        what = "thinking" if args.system_prompt is None else "a system prompt"
        raise PromptError(f"{what} needs a chat template: this model has none, or it is ignored")


def load_model(
    name: str | Path, drafter: str | Path | None, args: argparse.Namespace, options: GenerationOptions | None = None
) -> Model:
    """Load the model that the options of `add_model_options` describe.

    The memory limit is checked for a generation with `options`. If --per-layer-embeddings is "auto" and maps the
    table, a message on stderr says so. On a Mac, the wired limit is the working set size that the device recommends,
    as in mlx-lm.
    """
    follow_others()
    _check_drafting(drafter, args, options)
    if options is not None and (options.sampling.logit_bias or options.logprobs or options.kv_bits):
        _check_for_model(name, options)
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    # The training command has only some of these options.
    placement = {
        "max_context": getattr(args, "max_context", None),
        "per_layer_embeddings": args.per_layer_embeddings,
        "split": getattr(args, "split", None),
        "bandwidths": getattr(args, "bandwidths", ()),
    }
    limit = getattr(args, "memory_limit", None)
    if limit is not None:
        # Near this limit, MLX releases its cache of freed buffers.
        mx.set_memory_limit(limit)
        plan_memory(name, drafter, memory_limit=limit, options=options, **placement)
    placement["memory_limit"] = limit
    with progress_bar("Loading", unit="B", unit_scale=True, delay=1) as on_load:
        model = load(name, drafter, exact=getattr(args, "exact", False), on_load=on_load, **placement)
    if args.per_layer_embeddings == "auto" and model.per_layer_embeddings == "mapped":
        print(
            "the model would take more than half of this machine's memory: its per-layer embeddings are read from disk "
            "(--per-layer-embeddings resident loads them)",
            file=sys.stderr,
        )
    return model


def _check_drafting(drafter: str | Path | None, args: argparse.Namespace, options: GenerationOptions | None) -> None:
    """Check the drafter and the number of draft tokens before the target is downloaded.

    Raises OptionError if the other options exclude this number of draft tokens, ConfigError if the drafter's folder
    does not exist.
    """
    requested = "auto" if options is None else options.num_draft_tokens
    if drafter is not None and str(drafter) != "none" and not is_repo(drafter):
        resolve_folder(drafter)
    if requested == "auto":
        return
    if str(drafter) == "none" and requested != 0:
        raise OptionError(f"num_draft_tokens is {requested}, but no drafter is loaded")
    if args.exact and requested > MAX_DRAFT_TOKENS:
        raise OptionError(f"num_draft_tokens is {requested}: exact passes verify at most {MAX_DRAFT_TOKENS}")


def _check_for_model(name: str | Path, options: GenerationOptions) -> None:
    """Check the options against the model's config, before its weights are read.

    Raises OptionError if the config excludes an option.
    """
    text = read_target_config(resolve_folder(name)).text
    Penalties(options.sampling, text.vocab_size)
    check_logprobs(options.logprobs, text.vocab_size)
    if (kv := options.kv_quantization) is not None:
        check_group_size(text, kv)


def load_or_demo(args: argparse.Namespace, options: GenerationOptions | None = None) -> Model:
    """Load the named model, or the demo pair if no model is named.

    Messages on stderr report the use of the demo pair and a drafter that is not found.
    """
    follow_others()
    name: str | Path | None = args.model
    if name is None:
        name = DEMO_PAIR
        print(
            "no --model: the demo pair in the package, 4 million parameters that know Python source only",
            file=sys.stderr,
        )
    model = load_model(name, args.drafter, args, options)
    if model.drafter is None and args.drafter is None:
        advice = how_to_name_a_drafter(model.config)
        print(f"no drafter found for {name}: decoding plainly ({advice})", file=sys.stderr)
    return model


def given_sampling(args: argparse.Namespace) -> Sampling:
    """Return only the given sampling options, to check them without a model.

    Raises OptionError if an option is not valid.
    """
    return Sampling(**_given_sampling(args))


def _given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in (field.name for field in fields(Sampling))}
    return {name: value for name, value in given.items() if value is not None}


def read_sampling(args: argparse.Namespace, model: Model) -> Sampling:
    """Return the given sampling options, completed with the model's own defaults.

    An option that has neither keeps its neutral value. Without --seed, the seed is random.
    """
    given = _given_sampling(args)
    return replace(model.default_sampling, **{"seed": secrets.randbits(32), **given})


def print_stream(responses: Iterator[GenerationResponse]) -> tuple[list[GenerationResponse], bool]:
    """Print text as it comes, thoughts on stderr. Return the responses, and whether Ctrl-C ended them early."""
    seen: list[GenerationResponse] = []
    interrupted = in_thought = False
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    try:
        for response in _with_note(responses):
            seen.append(response)
            if response.thought:
                print(f"{dim}{response.thought}{plain}", end="", file=sys.stderr, flush=True)
                in_thought = True
            if response.text:
                if in_thought:
                    print(file=sys.stderr, flush=True)
                    in_thought = False
                write_out(response.text, end="")
    except KeyboardInterrupt:
        interrupted = True
    if in_thought:
        print(file=sys.stderr)
    write_out("")
    if (character := lacking("".join(response.text for response in seen))) is not None:
        print(
            f"stdout's encoding, {sys.stdout.encoding}, lacks characters of this text, such as {character!a}: they are "
            "written as escape sequences (PYTHONIOENCODING=utf-8 writes all)",
            file=sys.stderr,
        )
    return seen, interrupted


def _with_note(responses: Iterator[GenerationResponse]) -> Iterator[GenerationResponse]:
    """Yield the responses. On a terminal, print one note if a response takes more than SLOW_SECONDS."""
    if not sys.stderr.isatty():
        yield from responses
        return
    latest = time.monotonic()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SLOW_SECONDS / 4):
            if time.monotonic() - latest > SLOW_SECONDS:
                print("waiting for the device: MLX compiles kernels for the first rounds", file=sys.stderr, flush=True)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        for response in responses:
            latest = time.monotonic()
            yield response
            latest = time.monotonic()
    finally:
        ended.set()


def calibrate(
    model: Model, options: GenerationOptions, *, remeasure: bool = False, several_texts: bool = False
) -> None:
    """Measure the cost of rounds on this machine, with a progress bar, if the options need this cost.

    Only automatic draft lengths need it, with a drafter or with copies. With `several_texts`, the cost of passes that
    several texts share is measured as well. A known cost is measured again only with `remeasure`.
    """
    has_choice = model.drafter is not None or options.copy_drafts == "auto"
    if not has_choice or options.num_draft_tokens != "auto":
        return
    with progress_bar("Measuring, once", unit="pass") as on_progress:
        model.calibrate(
            options.sampling,
            kv_bits=options.kv_bits,
            kv_group_size=options.kv_group_size,
            remeasure=remeasure,
            on_progress=on_progress,
        )
    if several_texts:
        with progress_bar("Measuring several texts, once", unit="pass") as on_progress:
            model.calibrate_together(remeasure=remeasure, on_progress=on_progress)


@contextmanager
def progress_bar(description: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal, and yield the function that updates it. The bar disappears at the end.

    `options` are further options of tqdm. The function takes the amount that is done, and the total.
    """
    with tqdm(desc=description, leave=False, disable=None, file=sys.stderr, **options) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def prefill_bar(total: int, step_size: int) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of the prefill on a terminal, and yield the function that updates it.

    A prompt of one chunk gets no bar. The bar disappears before the text begins.
    """
    disable = None if total > step_size else True
    bar = tqdm(total=total, desc="Prefill", unit="tok", leave=False, disable=disable, file=sys.stderr)

    def update(done: int, total: int) -> None:
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    try:
        yield update
    finally:
        bar.close()


def describe(model: Model, sampling: Sampling, seconds: float) -> None:
    """Print the loaded pair, the sampling options and the loading time in seconds on stderr."""
    for role, config in (("target", model.config), ("drafter", model.drafter_config)):
        if config is None:
            print(f"{role}: none", file=sys.stderr)
            continue
        q = config.quantization
        weights = f"{q.bits} bit ({q.mode}, groups of {q.group_size})" if q else "not quantized"
        print(f"{role}: {config.path.parent}, {config.model_type}, {weights}", file=sys.stderr)
    print(f"activations: {model.target.dtype}, context: {model.max_context} tokens", file=sys.stderr)
    if model.per_layer_embeddings is not None:
        print(f"per-layer embeddings: {model.per_layer_embeddings}", file=sys.stderr)
    print("sampling: greedy" if sampling.is_greedy else f"sampling: {sampling}", file=sys.stderr)
    print(f"loaded in {seconds:.1f} s", file=sys.stderr)


def summarize(last: GenerationResponse, model: Model, options: GenerationOptions) -> None:
    """Print speed, acceptance and peak memory of a generation on stderr, from its last response."""
    stats = last.stats
    read = f"{last.cached_tokens} of them read before, " if last.cached_tokens else ""
    lines = [
        f"Prompt: {last.prompt_tokens} tokens, {read}{last.prompt_tps:.1f} tokens/s",
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s",
    ]
    if stats.drafted:
        lines += [
            f"Rounds: {stats.rounds}, drafted: {stats.drafted} ({stats.drafted / stats.rounds:.1f} per round), "
            f"accepted: {stats.accepted}",
            f"Acceptance length: {stats.acceptance_length:.2f} tokens per round",
        ]
        if (copied := stats.copied).rounds:
            lines.append(f"Copied: {copied.drafted} in {copied.rounds} rounds, accepted: {copied.accepted}")
        if stats.acceptance_by_position:
            shares = " ".join(f"{share:.2f}" for share in stats.acceptance_by_position)
            lines.append(f"Acceptance by position: {shares}")
    else:
        is_auto = options.num_draft_tokens == "auto"
        reason = "plain decoding is fastest here" if is_auto else "drafter not used"
        reason = "no drafter" if model.drafter is None else reason
        lines.append(f"Rounds: {stats.rounds}, nothing drafted ({reason})")
    if stats.rounds:
        lines.append(f"Rounds dispatched ahead: {stats.rounds_ahead}")
    if (rows := stats.embeddings) is not None:
        lines.append(
            f"Per-layer embeddings: {rows.misses} rows read from disk ({rows.bytes_read / 1e6:.1f} MB), "
            f"{rows.hits} found in memory"
        )
    lines.append(f"Peak memory: {last.peak_memory:.3f} GB")
    print("\n".join(lines), file=sys.stderr)
