"""Measure the time and peak memory of the conversion of a large random checkpoint, with mlx-mtp and with mlx-lm.

    python scripts/measure.py convert tests/support/published/12B --gigabytes 6

A random bfloat16 checkpoint is written to a temporary folder. It has the shapes of the given model, and enough layers
to reach the size. Each converter quantizes it in its own process. All files are removed at the end.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models

from .random_weights import HF_PREFIX, Weights
from .sizes import Json, add_folder, empty_target, read_json, with_layers, write_config

# On Linux, a process's peak includes its parent's memory before exec. A small process between them excludes this one.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
SHARD_BYTES = 2 << 30
# The converter's stated memory bound is twice the largest tensor plus this size.
SPARE_BYTES = 500e6


class Measurement(NamedTuple):
    seconds: float
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="Least size of the checkpoint (%(default)s).")
    parser.add_argument("--temporary", type=Path, help="Where to put temporary files (default: the system's folder).")


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.temporary) as name:
        folder = Path(name)
        weights = write_checkpoint(folder / "source", read_json(args.folder), args.gigabytes * 1e9)
        largest = max(map(weights.nbytes, weights.shapes))
        bound = 2 * largest + SPARE_BYTES
        print(
            f"checkpoint {weights.total_bytes() / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, "
            f"bound {bound / 1e9:.2f} GB"
        )
        source = ["--hf-path", str(folder / "source"), "-q"]
        commands = {
            "mlx-mtp": ["mlx_mtp.convert", *source, "--drafter", "none", "--mlx-path", str(folder / "ours")],
            "mlx-lm": ["mlx_lm", "convert", *source, "--mlx-path", str(folder / "theirs")],
        }
        for converter, command in commands.items():
            result = measure([sys.executable, "-m", *command])
            print(f"{converter}: {result.seconds:.1f} s, peak {result.peak_bytes / 1e9:.2f} GB")


def measure(command: list[str]) -> Measurement:
    """Return the wall time and peak resident memory of a process. Exit if the process fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{done.stderr}")
    return Measurement(seconds, int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024))


def write_checkpoint(folder: Path, config: Json, size: float) -> Weights:
    """Write a checkpoint of at least `size` bytes."""
    # The last two layers of a published model have different types. A target needs both.
    for layers in count(2):
        write_config(folder, for_both_converters(with_layers(config, layers)))
        weights = Weights(empty_target(folder), HF_PREFIX, "bfloat16")
        if weights.total_bytes() >= size:
            break
    weights.write(folder, SHARD_BYTES)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}'
    (folder / "tokenizer_config.json").write_text(fields)
    return weights


def for_both_converters(config: Json) -> Json:
    """Return the config of a text model in the form that mlx-lm reads too."""
    text = config["text_config"] | {"model_type": "gemma4_text"}
    top = {"model_type": "gemma4", "vocab_size": text["vocab_size"], "eos_token_id": 1, "dtype": "bfloat16"}
    return top | {"text_config": text}
