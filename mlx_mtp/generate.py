"""Command line that decodes one prompt with a target and its drafter: `python -m mlx_mtp.generate --help`."""

import sys

if __name__ == "__main__":
    # This comes before the slow imports, so that Ctrl-C ends the command from the first moment on.
    from .commands import run_command

    sys.exit(run_command("generate"))

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub.utils import tqdm

from mlx_mtp.checkpoints.files import read_text
from mlx_mtp.decoding.draft_length import LARGEST_COPY
from mlx_mtp.decoding.prompt_media import PreparedPrompt
from mlx_mtp.decoding.report import LOWEST_LOGPROB
from mlx_mtp.media.images import BUDGETS
from mlx_mtp.text.tokenizer import encode_in_parts, encode_prompt

from .command_line import (
    add_kv_options,
    add_model_options,
    add_sampling_options,
    add_thinking_options,
    calibrate,
    check_template_options,
    describe,
    given_sampling,
    load_or_demo,
    prefill_bar,
    print_stream,
    read_kv_options,
    read_sampling,
    summarize,
)
from .commands import INTERRUPTED
from .decoding import prompt_cache
from .errors import OptionError
from .generation import measures_first
from .launched import is_launched
from .loading import DEMO_PAIR, follow_others, plan_memory
from .model import Model
from .options import DEFAULT_MAX_TOKENS, DEFAULT_PREFILL_STEP, GenerationOptions
from .responses import GenerationResponse
from .shell import Parser, exit_status, read_prompt, text_argument, write_json, write_out

COMPARED_RUNS = 3
_NOT_COMPARED = "--compare needs a drafter, and a --num-draft-tokens other than 0"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    options = parser()
    args = options.parse_args(argv)
    if args.prompt is None and not args.dry_run:
        options.error("the following arguments are required: --prompt/-p")
    return exit_status(lambda: _dry_run(args) if args.dry_run else _run(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.generate",
        description="Decode a prompt with Gemma 4: the drafter proposes, the target verifies. The text goes to stdout "
        "while it is generated. Characters that stdout's encoding does not have are written as escapes. The summary "
        "goes to stderr: tokens/s, rounds, drafted and accepted tokens, acceptance length, acceptance by position, "
        "peak memory.",
    )
    add_model_options(parser, default="the demo pair in the package")
    _add_prompt_options(parser)
    _add_media_options(parser)
    add_sampling_options(parser)
    add_kv_options(parser)
    _add_answer_options(parser)
    add_thinking_options(parser)
    _add_run_options(parser)
    return parser


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", "-p", type=text_argument, metavar="TEXT|-", help="The prompt, in UTF-8; '-' reads it from stdin.")
    add("--system-prompt", type=text_argument, help="System prompt for the chat template.")
    most = "Largest number of tokens to generate (default: %(default)s)."
    add("--max-tokens", "-m", type=int, default=DEFAULT_MAX_TOKENS, help=most)
    add("--ignore-chat-template", action="store_true", help="Continue the prompt without the chat template.")
    add(
        "--prompt-cache",
        "--prompt-cache-file",
        metavar="FILE",
        help="A file that mlx-mtp cache-prompt wrote. --prompt continues the prompt in it.",
    )
    add(
        "--prefill-step-size",
        type=int,
        default=DEFAULT_PREFILL_STEP,
        help="Prompt tokens read per pass (default: %(default)s), fewer where attention scores would take more than "
        "0.5 GB.",
    )


def _add_media_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("media", "They come before the text of the prompt, in this order.").add_argument
    many: dict[str, Any] = {"action": "append", "default": []}
    add("--image", metavar="FILE", help="A picture: PNG, JPEG, WebP, GIF, BMP or TIFF. May be repeated.", **many)
    add("--audio", metavar="FILE", help="A sound of up to 30 seconds: WAV, FLAC, Ogg, MP3. May be repeated.", **many)
    add(
        "--video",
        metavar="FILE|FOLDER",
        help="A folder of frames, an animation in GIF, WebP or PNG, or an mp4 or mov file. May be repeated.",
        **many,
    )
    add(
        "--image-tokens",
        type=int,
        choices=BUDGETS,
        metavar="N",
        help=f"Largest number of tokens for a picture: {', '.join(map(str, BUDGETS))} (default: the model's, or 280).",
    )


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the answer ends and what it must follow."""
    group = parser.add_argument_group("answer")
    add = group.add_argument
    add(
        "--stop",
        type=text_argument,
        action="append",
        default=[],
        help="End the text before this string. May be repeated.",
    )
    add("--ignore-eos", action="store_true", help="Do not stop at the model's own stop tokens.")
    add(
        "--min-tokens", type=int, default=0, help="Generate at least this many tokens before a stop token (default: 0)."
    )
    logprobs = "With --json, each token's log probability and the N most likely ones."
    add("--logprobs", type=int, metavar="N", help=logprobs)
    add = group.add_mutually_exclusive_group().add_argument
    add("--json-schema", metavar="FILE", help="Answer with JSON that follows the JSON Schema in this file.")
    add("--regex", type=text_argument, help="Answer with text that matches this regular expression, in Rust's syntax.")
    add("--grammar", type=text_argument, help="Answer in this grammar's language, in Lark or llama.cpp's GBNF.")
    add("--grammar-file", metavar="FILE", help="Answer in the language of the grammar in this file.")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how the command runs, and of what it prints."""
    add = parser.add_argument_group("run").add_argument
    add(
        "--compare",
        action="store_true",
        help=f"Decode {COMPARED_RUNS} more times with the drafter and without, in turn, and say how much faster it is.",
    )
    plan = "Load nothing. Print the memory that weights, K/V cache and computation would take."
    add("--dry-run", action="store_true", help=plan)
    add("--verbose", action="store_true", help="Print the loaded model and its options on stderr.")
    add(
        "--json", action="store_true", help="End stdout with one line: a JSON object with text, tokens and all figures."
    )


def _run(args: argparse.Namespace) -> int:
    # Check the options first, because loading takes seconds.
    follow_others()
    options = _options(args)
    if args.prompt == "-" and is_launched():
        raise OptionError(
            '--prompt -: mlx.launch does not pass on the end of stdin: give the text, as in --prompt "$(cat FILE)"'
        )
    text = read_prompt(args.prompt)
    started = time.perf_counter()
    model = load_or_demo(args, options)
    sampling = read_sampling(args, model)
    if args.verbose:
        describe(model, sampling, time.perf_counter() - started)
    prompt = _encode(model, text, args)
    options = replace(options, sampling=sampling)
    if args.compare and model.drafter is None:
        raise OptionError(_NOT_COMPARED)
    if args.compare or measures_first(options):
        calibrate(model, options)
    with prefill_bar(len(prompt.tokens), args.prefill_step_size) as on_prefill:
        responses = model.stream_generate(prompt, options, on_prefill=on_prefill)
        seen, interrupted = print_stream(responses)
    if seen:
        if seen[-1].finish_reason == "length" and options.compiled_grammar() is not None:
            print(f"cut after {seen[-1].generation_tokens} tokens: the answer may not be complete", file=sys.stderr)
        summarize(seen[-1], model, options)
        report = _report(seen, model, interrupted)
        if args.compare and not interrupted:
            report["speedup"] = _compare(model, prompt, options)
        if args.json:
            write_json(report)
    return INTERRUPTED if interrupted else 0


def _dry_run(args: argparse.Namespace) -> int:
    name = args.model or DEMO_PAIR
    options = _options(args)
    placement = {
        "max_context": args.max_context,
        "per_layer_embeddings": args.per_layer_embeddings,
        "split": args.split,
        "bandwidths": args.bandwidths,
    }
    plan = plan_memory(name, args.drafter, options=options, **placement)
    write_out(str(plan))
    if args.json:
        write_json(asdict(plan) | {"kv": plan.kv, "peak": plan.peak})
    # Check the limit after the table is printed, so that the table shows which part is too large.
    plan_memory(name, args.drafter, memory_limit=args.memory_limit, options=options, **placement)
    return 0


def _media_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the media of the options as parts of a message."""
    parts = [
        {"type": kind, "path": path, "place": f"--{kind}"}
        for kind in ("image", "audio", "video")
        for path in getattr(args, kind)
    ]
    return [part | {"max_soft_tokens": args.image_tokens} if part["type"] == "image" else part for part in parts]


def _check_media(args: argparse.Namespace) -> None:
    """Check the options of media. Raises OptionError if one cannot be used, or if a file is absent."""
    if args.image_tokens is not None and not args.image:
        raise OptionError("--image-tokens: there is no --image")
    for name in ("image", "audio", "video"):
        for path in getattr(args, name):
            if not os.path.exists(path) and "://" not in path:
                raise OptionError(f"--{name}: {path}: no such file")
            if args.ignore_chat_template or args.prompt_cache is not None:
                other = "--ignore-chat-template" if args.ignore_chat_template else "--prompt-cache"
                raise OptionError(f"--{name}: media need a whole turn of the chat template: leave out {other}")


def _encode(model: Model, text: str, args: argparse.Namespace) -> PreparedPrompt:
    template = not args.ignore_chat_template
    if media := _media_parts(args):
        system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
        turn = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
        return model.prepare([*system, turn], enable_thinking=args.enable_thinking)
    if args.prompt_cache is None:
        tokens = encode_prompt(
            model.tokenizer,
            text,
            system_prompt=args.system_prompt,
            use_chat_template=template,
            enable_thinking=args.enable_thinking,
        )
        return model.prepare(tokens)
    rest = encode_in_parts(
        model.tokenizer, text, begins=False, use_chat_template=template, enable_thinking=args.enable_thinking
    )
    return model.prepare(model.load_prompt(args.prompt_cache, **read_kv_options(args)) + rest)


def _check_prompt_cache(args: argparse.Namespace) -> None:
    if args.prompt_cache is None:
        return
    if args.system_prompt is not None:
        raise OptionError(
            "--system-prompt: a prompt cache already has its system prompt, or none; give it to cache_prompt"
        )
    if args.num_draft_tokens != "auto" and args.num_draft_tokens > LARGEST_COPY:
        raise OptionError(f"--num-draft-tokens: with a prompt cache at most {LARGEST_COPY}")
    prompt_cache.check(Path(args.prompt_cache))


def _options(args: argparse.Namespace) -> GenerationOptions:
    """Return the given options, checked as far as possible without a model.

    The model's sampling defaults are added later.
    """
    _check_prompt_cache(args)
    _check_media(args)
    check_template_options(args)
    if args.compare and (args.drafter == "none" or args.num_draft_tokens == 0):
        raise OptionError(_NOT_COMPARED)
    return GenerationOptions(
        sampling=given_sampling(args),
        max_tokens=args.max_tokens,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
        min_tokens=args.min_tokens,
        logprobs=args.logprobs,
        json_schema=None if args.json_schema is None else _read_schema(args.json_schema),
        regex=args.regex,
        grammar=args.grammar if args.grammar_file is None else _read_text(args.grammar_file),
        enable_thinking=args.enable_thinking,
        thinking_budget=args.thinking_budget,
        num_draft_tokens=args.num_draft_tokens,
        copy_drafts=args.copy_drafts,
        prefill_step_size=args.prefill_step_size,
        # There is only one prompt. Only a prompt cache file holds K/V to reuse.
        reuse_prompt=args.prompt_cache is not None,
        **read_kv_options(args),
    )


def _compare(model: Model, prompt: PreparedPrompt, options: GenerationOptions) -> float:
    """Print and return the speed with the drafter divided by the speed without, the median of COMPARED_RUNS pairs.

    The two runs of a pair follow each other directly. One more pair comes first and does not count: it compiles the
    rounds and warms the caches.

    Raises OptionError if the text has no second token to time.
    """
    ratios = []
    for _ in tqdm(range(COMPARED_RUNS + 1), desc="Comparing", leave=False, disable=None, file=sys.stderr):
        drafted = model.generate(prompt, options).last
        plain = model.generate(prompt, options, num_draft_tokens=0).last
        if not plain.generation_tps:
            raise OptionError("--compare needs a text of several tokens, found one")
        ratios.append(drafted.generation_tps / plain.generation_tps)
    del ratios[0]
    print(
        f"Speed: {median(ratios):.2f} times plain decoding "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {COMPARED_RUNS} runs of each in turn)",
        file=sys.stderr,
    )
    return median(ratios)


def _read_text(path: str) -> str:
    try:
        return read_text(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from None


def _read_schema(path: str) -> str:
    text = _read_text(path)
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: not JSON: {error}") from None
    return text


def _report(seen: list[GenerationResponse], model: Model, interrupted: bool) -> dict[str, Any]:
    last = seen[-1]
    stats = last.stats
    return {
        "text": "".join(response.text for response in seen),
        "thought": "".join(response.thought for response in seen),
        "tokens": [response.token for response in seen],
        "prompt_tokens": last.prompt_tokens,
        "cached_tokens": last.cached_tokens,
        "generation_tokens": last.generation_tokens,
        "finish_reason": "interrupted" if interrupted else last.finish_reason,
        "drafter": None if model.drafter_config is None else str(model.drafter_config.path.parent),
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "copied": stats.copied._asdict(),
        "acceptance_length": stats.acceptance_length,
        "rounds_ahead": stats.rounds_ahead,
        "acceptance_by_position": stats.acceptance_by_position,
        "prompt_tps": last.prompt_tps,
        "generation_tps": last.generation_tps,
        "peak_memory_gb": last.peak_memory,
        "per_layer_embeddings": model.per_layer_embeddings,
        "embedding_rows": None if stats.embeddings is None else stats.embeddings._asdict(),
        "logprobs": [
            {
                "token": r.token,
                "logprob": max(r.logprobs.token, LOWEST_LOGPROB),
                "top": [[token, max(logprob, LOWEST_LOGPROB)] for token, logprob in r.logprobs.top],
            }
            for r in seen
            if r.logprobs is not None
        ],
    }
