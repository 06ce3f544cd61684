"""Compare quantized K/V with unquantized K/V: tokens per round, bytes of the cache, and equality of the texts.

    python scripts/measure.py kv

All settings decode equal prompts, beginnings of source files of Python's standard library, greedily and at
temperature 1.
"""

import argparse
from statistics import mean
from typing import NamedTuple

import mlx_mtp
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.kv_cache import KVQuantization, parts_of

from .pairs import (
    add_generation,
    add_pair,
    decode_to_length,
    load_pair,
    mean_and_error,
    stdlib_prompts,
    tokens_per_round,
)

SAMPLED = Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    add_generation(parser, max_tokens=120, prompt_tokens=400, prompts=6)
    parser.add_argument("--kv-group-size", type=int, default=64, help="Values quantized together (%(default)s).")


class Generation(NamedTuple):
    """The tokens of a generation, its statistics, and the bytes of the full-attention K/V and of all K/V."""

    tokens: list[int]
    stats: Stats
    full_bytes: int
    all_bytes: int


def run(args: argparse.Namespace) -> None:
    model = load_pair(args)
    prompts = stdlib_prompts(model, args)
    rounds = CompiledRounds()
    print(f"{len(prompts)} prompts, {args.num_draft_tokens} draft tokens, {model.target.dtype}; tokens per round with")
    print(
        "standard errors, K/V bytes at the end (full attention, all), greedy texts and tokens as without quantization"
    )
    unquantized: list[list[int]] = []
    for bits in (None, 8, 4):
        kv = None if bits is None else KVQuantization(bits, args.kv_group_size, 0)
        greedy, sampled = (
            [generate(model, prompt, sampling, kv, rounds, args) for prompt in prompts]
            for sampling in (Sampling(), SAMPLED)
        )
        texts = [each.tokens for each in greedy]
        unquantized = unquantized or texts
        lengths = "  ".join(
            mean_and_error([tokens_per_round(each.stats) for each in found]) for found in (greedy, sampled)
        )
        sizes = f"{max(each.full_bytes for each in greedy):>9} {max(each.all_bytes for each in greedy):>9}"
        print(f"{bits or 'none':<5} {lengths}  {sizes}  {agreement(texts, unquantized)}", flush=True)


def generate(
    model: mlx_mtp.Model,
    prompt: list[int],
    sampling: Sampling,
    kv: KVQuantization | None,
    rounds: CompiledRounds,
    args: argparse.Namespace,
) -> Generation:
    k = args.num_draft_tokens
    stream = Stream(
        model.target, model.drafter, max_draft_tokens=k, sampling=sampling, rounds=rounds, kv_quantization=kv
    )
    tokens: list[int] = []
    stats = Stats()
    for result in decode_to_length(stream, prompt, args.max_tokens, k):
        if tokens:
            stats.add(result.drafted, result.accepted)
        tokens += result.tokens
    layers = model.target.config.layers
    sizes = [
        (layers[index].layer_type, sum(array.nbytes for array in parts_of(rows)))
        for buffers in (stream.cache.keys, stream.cache.values)
        for index, rows in buffers.items()
    ]
    full = sum(size for layer_type, size in sizes if layer_type == "full_attention")
    return Generation(tokens, stats, full, sum(size for _, size in sizes))


def agreement(texts: list[list[int]], unquantized: list[list[int]]) -> str:
    """Return the number of texts that stay equal, and the mean share of tokens before a difference."""
    pairs = list(zip(texts, unquantized, strict=True))
    same = sum(ours == theirs for ours, theirs in pairs)
    shares = [shared(ours, theirs) / len(theirs) for ours, theirs in pairs]
    return f"{same} of {len(pairs)}, {mean(shares):.0%}"


def shared(ours: list[int], theirs: list[int]) -> int:
    """Return the number of equal tokens at the beginning."""
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(theirs))
