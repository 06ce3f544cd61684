"""Measure a small pair with long contexts: memory compared with the plan, acceptance, and time per round.

    python scripts/measure.py context

Each context runs in its own process, with a larger `max_position_embeddings` in a copy of the pair's configs. The texts
are concatenated source files. The prompts of all contexts end at the same places of these texts, so that the generated
texts are comparable.
"""

import argparse
import json
import sysconfig
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import mlx.core as mx

import mlx_mtp
from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.text.tokenizer import load_tokenizer

from .processes import in_new_process

# Number of texts. Each text is the source up to one of this number of evenly spread places.
TEXTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=mlx_mtp.DEMO_PAIR, help="A converted pair (default: the demo pair)."
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[1024, 8192, 32768], help="Tokens of the prompts (1024 8192 32768)."
    )
    parser.add_argument("--max-tokens", "-m", type=int, default=160, help="Tokens per generation (%(default)s).")
    parser.add_argument("--num-draft-tokens", type=int, default=3, help="Draft tokens per round (%(default)s).")


def run(args: argparse.Namespace) -> None:
    print(
        "| context | prefill, tokens/s | plain round, ms | round, ms | tokens per round, greedy / T = 1 | peak | plan |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pair = lengthened(args.model, Path(folder), 2 * max(args.contexts))
        tokenizer = load_tokenizer(pair, read_target_config(pair).eos_token_ids)
        text = tokenizer.encode(source(), add_special_tokens=False)
        ends = [number * len(text) // TEXTS for number in range(1, TEXTS + 1)]
        for context in args.contexts:
            prompts = [text[end - context : end] for end in ends]
            found = in_new_process(measure, pair, prompts, args.max_tokens, args.num_draft_tokens)
            print(row(context, found), flush=True)


def lengthened(pair: Path, folder: Path, context: int) -> Path:
    """Copy a pair, with links to the weights, and raise its context to `context` tokens. Return the copy's folder."""
    for file in (file for file in pair.rglob("*") if file.is_file()):
        copy = folder / file.relative_to(pair)
        copy.parent.mkdir(exist_ok=True)
        if file.name == "config.json":
            config = json.loads(file.read_text())
            config["text_config"]["max_position_embeddings"] = context
            copy.write_text(json.dumps(config))
        else:
            copy.symlink_to(file.resolve())
    return folder


def measure(folder: Path, prompts: list[list[int]], max_tokens: int, k: int) -> dict[str, Any]:
    limit = len(prompts[0]) + max_tokens
    model = mlx_mtp.load(folder, max_context=limit)
    options = mlx_mtp.GenerationOptions(
        max_tokens=max_tokens, num_draft_tokens=k, ignore_eos=True, prefill_step_size=512
    )
    found: dict[str, Any] = {"plan": mlx_mtp.plan_memory(folder, max_context=limit).peak}
    rates, greedy, sampled, plain, drafted = [], [], [], [], []
    for text_number, prompt in enumerate(prompts, 1):
        mx.reset_peak_memory()
        result = model.generate(prompt, options, reuse_prompt=text_number > 1)
        if text_number == 1:
            found["peak"] = result.last.peak_memory * 1e9
        rates.append(result.last.prompt_tps)
        greedy.append(result.last.stats.acceptance_length)
        own = mlx_mtp.Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=text_number)
        sampled.append(model.generate(prompt, options, sampling=own).last.stats.acceptance_length)
        plain.append(seconds_per_round(model, prompt, options, 0))
        drafted.append(seconds_per_round(model, prompt, options, k))
    found |= {"rate": median(rates), "greedy": greedy, "sampled": sampled}
    return found | {"plain": median(plain), "drafted": median(drafted)}


def seconds_per_round(model: mlx_mtp.Model, prompt: list[int], options: mlx_mtp.GenerationOptions, k: int) -> float:
    """Return the median seconds per round in the second half of a generation."""
    times = [time.perf_counter()]
    rounds = 0
    for response in model.stream_generate(prompt, options, num_draft_tokens=k):
        if response.stats.rounds > rounds:
            rounds = response.stats.rounds
            times.append(time.perf_counter())
    spans = [end - start for start, end in pairwise(times)]
    return median(spans[len(spans) // 2 :])


def source() -> str:
    """Return the concatenated source of modules in the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files if file.stem[0] != "_")


def row(context: int, found: dict[str, Any]) -> str:
    means = (
        f"{mean(lengths):.2f} ({min(lengths):.2f}-{max(lengths):.2f})"
        for lengths in (found["greedy"], found["sampled"])
    )
    cells = [str(context), f"{found['rate']:.0f}", f"{1e3 * found['plain']:.1f}", f"{1e3 * found['drafted']:.1f}"]
    cells += [" / ".join(means), f"{found['peak'] / 1e6:.0f} MB"]
    cells += [f"{found['plan'] / 1e6:.0f} MB ({found['peak'] / found['plan']:.2f})"]
    return "| " + " | ".join(cells) + " |"
