"""Measure the memory that mapped per-layer embeddings save, and their time, with random weights of E2B's size.

    python scripts/measure_mapped.py --dtype float32 --rounds 6

The script writes a quantized pair with E2B's shapes to disk (3 GB; --layers and --vocab make it smaller). It then loads
the pair resident and mapped, in turn, each time in a new process. It prints the seconds to load, the peak of MLX's
memory and of the process's memory, and rounds per second. The weights are random, so that tokens hardly repeat, and
more rows are read from disk than for a real text.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from published import published_drafter, published_target

from mlx_mtp.checkpoints.config import read_drafter_config, read_target_config
from mlx_mtp.checkpoints.layouts import MLX_PREFIX
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.disk_table import EmbeddingStats
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.layers import fuse_projections
from mlx_mtp.gemma4.target import Target
from mlx_mtp.loading import load_drafter, load_target

HOW = ("resident", "mapped")
LENGTHS = (0, 3)
GROUP_SIZE = 64
BLOCK_BYTES = 32 << 20
TYPES = {"float32": "F32", "bfloat16": "BF16", "uint32": "U32", "int32": "I32"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Mapped against resident per-layer embeddings at E2B's size.")
    parser.add_argument("--bits", type=int, default=4, help="Bits of the weights (default: 4).")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="Type of activations.")
    parser.add_argument("--layers", type=int, default=35, help="Layers, a multiple of 5 (default: E2B's 35).")
    parser.add_argument("--vocab", type=int, default=262144, help="Vocabulary, a multiple of 2048 (default: E2B's).")
    parser.add_argument("--rounds", type=int, default=10, help="Rounds timed per draft length (default: 10).")
    parser.add_argument("--turns", type=int, default=2, help="Runs of each, in turn (default: 2).")
    parser.add_argument("--folder", type=Path, help="Where to write the pair (default: a temporary folder).")
    parser.add_argument("--run", choices=HOW, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.folder, args.run, args.rounds)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "target" / "model.safetensors").exists():
            write_pair(folder, args)
        runs: dict[str, list[dict[str, float]]] = {how: [] for how in HOW}
        for _ in range(args.turns):
            for how in HOW:
                command = [
                    sys.executable,
                    __file__,
                    "--run",
                    how,
                    "--folder",
                    str(folder),
                    "--rounds",
                    str(args.rounds),
                ]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[how].append(json.loads(result.stdout))
    figures = {how: {name: median(run[name] for run in runs[how]) for name in runs[how][0]} for how in HOW}
    print(f"{'':<28}{'resident':>10}{'mapped':>10}{'ratio':>8}")
    for name, value in figures["resident"].items():
        other = figures["mapped"][name]
        ratio = f"{other / value:8.3f}" if value else ""
        print(f"{name:<28}{value:>10.3f}{other:>10.3f}{ratio}")


def write_pair(folder: Path, args: argparse.Namespace) -> None:
    """Write both models, quantized. Only blocks of one tensor are in memory at a time."""
    target, drafter = published_target("E2B"), published_drafter("E2B")
    text = target["text_config"]
    text["layer_types"] = text["layer_types"][: args.layers]
    # The last layers share K/V. The first five layers own K/V, and include both layer types.
    text |= {"num_hidden_layers": args.layers, "num_kv_shared_layers": min(20, args.layers - 5)}
    for config in (target, drafter):
        config["text_config"] |= {"vocab_size": args.vocab}
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": args.bits}
        config["dtype"] = args.dtype
    text["vocab_size_per_layer_input"] = args.vocab
    for name, config in (("target", target), ("drafter", drafter)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    for name, prefix in (("target", MLX_PREFIX), ("drafter", "")):
        write_weights(folder / name, make(folder, name), prefix, args)


def make(folder: Path, name: str) -> nn.Module:
    if name == "target":
        return Target(read_target_config(folder / name).text)
    return Drafter(read_drafter_config(folder / name))


def write_weights(folder: Path, module: nn.Module, prefix: str, args: argparse.Namespace) -> None:
    nn.quantize(module, GROUP_SIZE, args.bits)
    parameters = {name: value for name, value in lazy_parameters(module).items() if "periods" not in name}
    header: dict[str, Any] = {}
    end = 0
    for name, value in parameters.items():
        kind = args.dtype if mx.issubdtype(value.dtype, mx.floating) else str(value.dtype).removeprefix("mlx.core.")
        size = value.size * (2 if kind == "bfloat16" else 4)
        header[prefix + name] = {"dtype": TYPES[kind], "shape": value.shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, value in parameters.items():
            for block in values(name, value.shape, header[prefix + name]["dtype"], args.bits):
                stream.write(block)


def values(name: str, shape: tuple[int, ...], kind: str, bits: int) -> Iterator[bytes]:
    """Yield the bytes of a tensor in blocks, by its type and name.

    Packed weights (U32) are random. Scales and biases map them to values between -1 and 1 times a bound that gives unit
    gain. Index tensors (I32) count from 0. All other values are 1.
    """
    count = int(np.prod(shape))
    if kind == "I32":
        yield np.arange(count, dtype=np.int32).tobytes()
        return
    if kind == "U32":
        rng = np.random.default_rng(count)
        for start in range(0, 4 * count, BLOCK_BYTES):
            yield rng.bytes(min(BLOCK_BYTES, 4 * count - start))
        return
    bound = (3 / (GROUP_SIZE * shape[-1])) ** 0.5
    value = -bound if name.endswith(".biases") else 2 * bound / (2**bits - 1) if name.endswith(".scales") else 1.0
    one = np.full(1, value, np.float32).view(np.uint16)[1:] if kind == "BF16" else np.full(1, value, np.float32)
    block = np.repeat(one, min(count, BLOCK_BYTES))
    for start in range(0, count, block.size):
        yield block[: count - start].tobytes()


def measure(folder: Path, how: str, rounds: int) -> dict[str, float]:
    config = read_target_config(folder / "target")
    start = time.perf_counter()
    target = load_target(config, mapped=how == "mapped")
    drafter = load_drafter(read_drafter_config(folder / "drafter"), target.dtype)
    for layers in (target.layers, drafter.model.layers):
        fuse_projections(layers)
    figures = {"load, s": time.perf_counter() - start, "peak of MLX loaded, GB": mx.get_peak_memory() / 1e9}
    mx.reset_peak_memory()
    for k in LENGTHS:
        stream = Stream(target, drafter, max_draft_tokens=max(LENGTHS), rounds=CompiledRounds())
        stream.prefill([(7919 * i + 5) % config.text.vocab_size for i in range(8)], 8)
        run = partial(stream.round, k)
        # The first warm-up round is not compiled, the second round is traced.
        for _ in range(2):
            run()
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        figures[f"rounds per second, k = {k}"] = 1 / median(seconds)
    figures["peak of MLX decoding, GB"] = mx.get_peak_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    figures["peak of the process, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    stats = EmbeddingStats() if target.mapped is None else target.mapped.stats
    return figures | {"rows read": stats.misses, "rows found in memory": stats.hits}


if __name__ == "__main__":
    main()
