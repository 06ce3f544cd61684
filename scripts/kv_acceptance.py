"""Compare quantized K/V with unquantized K/V: tokens per round, bytes of the cache, and equality of the texts.

    python scripts/kv_acceptance.py

All settings decode equal prompts, beginnings of source files of Python's standard library, greedily and at
temperature 1.
"""

import argparse

import held_out
import mlx.core as mx
import numpy as np
from acceptance_rules import error

import mlx_mtp
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Stream, decode
from mlx_mtp.gemma4.kv_cache import KVQuantization

SAMPLED = Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Acceptance and memory with quantized K/V and without.")
    parser.add_argument("--model", default=mlx_mtp.DEMO_PAIR, help="Folder of the target (default: the demo pair).")
    parser.add_argument("--drafter", help="Folder of its drafter (default: found as by mlx_mtp.load).")
    parser.add_argument("--num-draft-tokens", type=int, default=3, help="Draft tokens per round (default: 3).")
    parser.add_argument("--max-tokens", type=int, default=120, help="Tokens per generation (default: 120).")
    parser.add_argument("--prompt-tokens", type=int, default=400, help="Tokens per prompt (default: 400).")
    parser.add_argument("--prompts", type=int, default=6, help="How many prompts (default: 6).")
    parser.add_argument("--kv-group-size", type=int, default=64, help="Values quantized together (default: 64).")
    args = parser.parse_args()
    model = mlx_mtp.load(args.model, args.drafter)
    prompts = held_out.prompts(model, held_out.stdlib_files(), args.prompt_tokens)[: args.prompts]
    rounds = CompiledRounds()
    print(f"{len(prompts)} prompts, {args.num_draft_tokens} draft tokens, {model.target.dtype}; tokens per round with")
    print(
        "standard errors, K/V bytes at the end (full attention, all), greedy texts and tokens as without quantization"
    )
    texts: dict[int | None, list[list[int]]] = {}
    for bits in (None, 8, 4):
        kv = None if bits is None else KVQuantization(bits, args.kv_group_size, 0)
        lengths = []
        for sampling in (Sampling(), SAMPLED):
            results = [generate(model, prompt, sampling, kv, rounds, args) for prompt in prompts]
            lengths.append(np.array([stats.acceptance_length for _, stats, _ in results]))
            if sampling.is_greedy:
                texts[bits] = [tokens for tokens, _, _ in results]
                full, every = (max(sizes[i] for _, _, sizes in results) for i in range(2))
        pairs = list(zip(texts[bits], texts[None], strict=True))
        same = sum(ours == theirs for ours, theirs in pairs)
        agreeing = np.mean([shared(ours, theirs) / len(theirs) for ours, theirs in pairs])
        cells = "  ".join(f"{found.mean():.2f} +- {error(found):.2f}" for found in lengths)
        print(f"{bits or 'none':<5} {cells}  {full:>9} {every:>9}  {same} of {len(pairs)}, {agreeing:.0%}", flush=True)


def generate(
    model: mlx_mtp.Model,
    prompt: list[int],
    sampling: Sampling,
    kv: KVQuantization | None,
    rounds: CompiledRounds,
    args: argparse.Namespace,
) -> tuple[list[int], Stats, tuple[int, int]]:
    """Return the tokens, the statistics, and the bytes of the full-attention K/V and of all K/V."""
    k = args.num_draft_tokens
    stream = Stream(
        model.target, model.drafter, max_draft_tokens=k, sampling=sampling, rounds=rounds, kv_quantization=kv
    )
    tokens, stats = [], Stats()
    for result in decode(
        stream,
        prompt,
        max_tokens=args.max_tokens,
        num_draft_tokens=k,
        stop_ids=frozenset(),
        prefill_step_size=512,
    ):
        if tokens:
            stats.add(result.drafted, result.accepted)
        tokens += result.tokens
    layers = model.target.config.layers
    parts = [
        (layers[index].layer_type, sum(p.nbytes for p in ([rows] if isinstance(rows, mx.array) else rows.parts)))
        for buffers in (stream.cache.keys, stream.cache.values)
        for index, rows in buffers.items()
    ]
    full = sum(size for layer_type, size in parts if layer_type == "full_attention")
    return tokens, stats, (full, sum(size for _, size in parts))


def shared(ours: list[int], theirs: list[int]) -> int:
    """Return the number of equal tokens at the beginning."""
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(theirs))


if __name__ == "__main__":
    main()
