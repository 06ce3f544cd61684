"""Measure the memory that mapped per-layer embeddings save, and their time, with random weights.

    python scripts/measure.py mapped tests/support/published/E2B --dtype float32 --rounds 6

A quantized pair of the given size is written to disk (3 GB for E2B; --layers and --vocab make it smaller). It is loaded
resident and mapped, in turn, each time in a new process. The output has the seconds to load, the peak of MLX's memory
and of the process's memory, and rounds per second. The weights are random, so that tokens hardly repeat, and more rows
are read from disk than for a real text.
"""

import argparse
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx

from mlx_mtp.checkpoints.config import read_drafter_config, read_target_config
from mlx_mtp.checkpoints.layouts import MLX_PREFIX
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.disk_table import EmbeddingStats
from mlx_mtp.gemma4.layers import fuse_projections
from mlx_mtp.networks import load_drafter, load_target

from .processes import in_new_process
from .random_weights import Weights
from .sizes import (
    GROUP_SIZE,
    UNQUANTIZED_BITS,
    add_bits,
    add_folder,
    empty_drafter,
    empty_target,
    read_json,
    with_layers,
    write_config,
)

LENGTHS = (0, 3)
Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    add_bits(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="Type of activations (%(default)s)."
    )
    parser.add_argument("--layers", type=int, help="Layers, a multiple of 5 for E2B (default: as in FOLDER).")
    parser.add_argument("--vocab", type=int, help="Vocabulary, a multiple of 2048 (default: as in FOLDER).")
    parser.add_argument("--rounds", type=int, default=10, help="Rounds timed per draft length (%(default)s).")
    parser.add_argument("--turns", type=int, default=2, help="Runs of each, in turn (%(default)s).")
    parser.add_argument("--output", type=Path, help="Where the pair is written and kept (default: a temporary folder).")


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        if not (folder / "drafter" / "model.safetensors").exists():
            write_pair(folder, args)
        runs: dict[str, list[Figures]] = {"resident": [], "mapped": []}
        for _ in range(args.turns):
            for name, found in runs.items():
                found.append(in_new_process(measure, folder, name == "mapped", args.rounds))
    resident, mapped = (
        {figure: median(each[figure] for each in found) for figure in found[0]} for found in runs.values()
    )
    print(f"{'':<28}{'resident':>10}{'mapped':>10}{'ratio':>8}")
    for figure, value in resident.items():
        ratio = f"{mapped[figure] / value:8.3f}" if value else ""
        print(f"{figure:<28}{value:>10.3f}{mapped[figure]:>10.3f}{ratio}")


def write_pair(folder: Path, args: argparse.Namespace) -> None:
    target, drafter = read_json(args.folder), read_json(args.folder / "drafter")
    if args.layers is not None:
        target = with_layers(target, args.layers)
    for config in (target, drafter):
        if args.bits < UNQUANTIZED_BITS:
            config["quantization"] = {"group_size": GROUP_SIZE, "bits": args.bits}
        config["dtype"] = args.dtype
        if args.vocab is not None:
            config["text_config"]["vocab_size"] = args.vocab
    if args.vocab is not None:
        target["text_config"]["vocab_size_per_layer_input"] = args.vocab
    write_config(folder, target)
    write_config(folder / "drafter", drafter)
    Weights(empty_target(folder), MLX_PREFIX, args.dtype, args.bits).write(folder)
    Weights(empty_drafter(folder / "drafter"), "", args.dtype, args.bits).write(folder / "drafter")


def measure(folder: Path, mapped: bool, rounds: int) -> Figures:
    config = read_target_config(folder)
    start = time.perf_counter()
    target = load_target(config, mapped=mapped)
    drafter = load_drafter(read_drafter_config(folder / "drafter"), target.dtype)
    for layers in (target.layers, drafter.model.layers):
        fuse_projections(layers)
    figures = {"load, s": time.perf_counter() - start, "peak of MLX loaded, GB": mx.get_peak_memory() / 1e9}
    mx.reset_peak_memory()
    for k in LENGTHS:
        stream = Stream(target, drafter, max_draft_tokens=max(LENGTHS), rounds=CompiledRounds())
        stream.prefill([(7919 * i + 5) % config.text.vocab_size for i in range(8)], 8)
        decode = partial(stream.round, k)
        # The first warm-up round is not compiled, the second round is traced.
        for _ in range(2):
            decode()
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            decode()
            seconds.append(time.perf_counter() - began)
        figures[f"rounds per second, k = {k}"] = 1 / median(seconds)
    figures["peak of MLX decoding, GB"] = mx.get_peak_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    figures["peak of the process, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    stats = EmbeddingStats() if target.mapped is None else target.mapped.stats
    return figures | {"rows read": stats.misses, "rows found in memory": stats.hits}
