"""The pair, the prompts and the options that several measurements have in common."""

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

import mlx_mtp
from mlx_mtp.decoding.draft_length import DraftPolicy
from mlx_mtp.decoding.report import RoundReport, Stats
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode

from . import held_out


def add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=str(mlx_mtp.DEMO_PAIR), help="Folder of the target (default: the demo pair)."
    )
    parser.add_argument("--drafter", help="Folder of the drafter (default: found as by mlx_mtp.load).")


def add_generation(parser: argparse.ArgumentParser, *, max_tokens: int, prompt_tokens: int, prompts: int) -> None:
    parser.add_argument("--num-draft-tokens", type=int, default=3, help="Draft tokens per round (%(default)s).")
    parser.add_argument("--max-tokens", "-m", type=int, default=max_tokens, help="Tokens per generation (%(default)s).")
    parser.add_argument("--prompt-tokens", type=int, default=prompt_tokens, help="Tokens per prompt (%(default)s).")
    parser.add_argument("--prompts", type=int, default=prompts, help="Largest number of prompts (%(default)s).")


def load_pair(args: argparse.Namespace) -> mlx_mtp.Model:
    return mlx_mtp.load(args.model, args.drafter)


def stdlib_prompts(model: mlx_mtp.Model, args: argparse.Namespace) -> list[list[int]]:
    """Return prompts of `--prompt-tokens` tokens from the held-out files of the standard library."""
    return held_out.prompts(model, held_out.stdlib_files(), args.prompt_tokens)[: args.prompts]


def decode_to_length(stream: Stream, prompt: list[int], max_tokens: int, k: int | DraftPolicy) -> Iterator[RoundReport]:
    """Decode `max_tokens` tokens after a prompt. Stop tokens do not end the text."""
    return decode(
        stream, prompt, max_tokens=max_tokens, num_draft_tokens=k, stop_ids=frozenset(), prefill_step_size=512
    )


def tokens_per_round(stats: Stats) -> float:
    """Return the acceptance length of one or more rounds."""
    assert stats.acceptance_length is not None, "no round"
    return stats.acceptance_length


def mean_and_error(values: ArrayLike, digits: int = 2) -> str:
    """Return the mean of the values and its standard error, as text. The error of one value is unknown: nan."""
    found = np.asarray(values, np.float64)
    error = found.std(ddof=1) / found.size**0.5 if found.size > 1 else float("nan")
    return f"{found.mean():.{digits}f} +- {error:.{digits}f}"
