"""Measure the host's processor time per round, at E2B's depth. This time of the main thread excludes device waits.

    pip install -c constraints.txt -e '.[peers]'
    python scripts/measure.py host tests/support/published/E2B

"Building" is all time except MLX's evaluation, which hands the operations to the device. The pair is random, with the
layers of the given model and small matrices: its graph equals the model's graph, but is cheap to compute. Almost no
draft token is accepted, so that each round gives about one token. All programs decode in turn.

With `--one-kernel-each`, norms, rotations and attention are one operation each, as on a Mac's GPU. On the CPU backend,
each of them is many operations. The decoded text is then meaningless, but the graph has the size that it has on a Mac.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from huggingface_hub.utils import tqdm

import mlx_mtp
from mlx_mtp.bench.peers import load_peer
from mlx_mtp.decoding.sampling import Sampling

from .kernels import quick_kernels
from .random_weights import HF_PREFIX, Weights
from .sizes import Json, add_folder, empty_drafter, empty_target, read_json, write_config

Decode = Callable[[int], object]

# Tokens of a long run and of a short run. The difference between the two runs is measured.
LONG, SHORT = 50, 10
PROMPT = list(range(20, 60))
# The demo pair has a tokenizer of this size.
VOCAB_SIZE = 1024
# The sizes that make the model cheap to compute. They change no operation of its graph.
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "max_position_embeddings": 4096,
}
SMALL_PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": VOCAB_SIZE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--repeats", type=int, default=5, help="Runs that count (%(default)s).")
    parser.add_argument("--one-kernel-each", action="store_true", help="Use one operation for each kernel of a Mac.")


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary, quick_kernels() if args.one_kernel_each else ExitStack():
        programs = load_programs(write_small_pair(args.folder, Path(temporary)))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for repeat in tqdm(range(-1, args.repeats), desc="Runs"):
            for name, decode in programs.items():
                (long, long_evaluation), (short, short_evaluation) = (measure(decode, n) for n in (LONG, SHORT))
                if repeat >= 0:
                    spent, evaluation = long - short, long_evaluation - short_evaluation
                    found[name].append(((spent - evaluation) / (LONG - SHORT), spent / (LONG - SHORT)))
    for name, pairs in found.items():
        building, spent = (1e3 * median(values) for values in zip(*pairs, strict=True))
        print(f"{name:18} building {building:6.2f} ms per round, with evaluation {spent:6.2f}")


def measure(decode: Decode, count: int) -> tuple[float, float]:
    """Return the processor seconds of this thread in a run, and the part of them in evaluations."""
    inside = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                inside[0] += time.thread_time() - start

        return timing

    with ExitStack() as patches:
        for owner, name in ((mx, "eval"), (mx, "async_eval"), (mx.array, "item"), (mx.array, "tolist")):
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        start = time.thread_time()
        decode(count)
        return time.thread_time() - start, inside[0]


def write_small_pair(source: Path, folder: Path) -> Path:
    """Write a random pair with the layers of `source` and small matrices, and return the target's folder."""
    target, drafter = folder / "target", folder / "target-assistant"
    config = small(read_json(source))
    # mlx-lm and mlx-vlm expect a config in this form.
    config = {name: value for name, value in config.items() if name not in ("vision_config", "audio_config")}
    write_config(target, config | {"vocab_size": VOCAB_SIZE})
    write_config(
        drafter,
        small(read_json(source / "drafter"))
        | {"backbone_hidden_size": SMALL["hidden_size"], "num_centroids": 32, "centroid_intermediate_top_k": 4},
    )
    Weights(empty_target(target), HF_PREFIX, "float32").write(target)
    Weights(empty_drafter(drafter), "", "float32").write(drafter)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(mlx_mtp.DEMO_PAIR / name, target)
    return target


def small(config: Json) -> Json:
    text = config["text_config"] | SMALL
    if text["hidden_size_per_layer_input"]:
        text |= SMALL_PER_LAYER_INPUTS
    return config | {"text_config": text, "dtype": "float32", "eos_token_id": [1]}


def load_programs(target: Path) -> dict[str, Decode]:
    """Return functions that decode a number of tokens: ours by draft length, and those of the installed peers."""
    model = mlx_mtp.load(target)
    options = mlx_mtp.GenerationOptions(ignore_eos=True)

    def ours(k: int) -> Decode:
        return lambda count: model.generate(PROMPT, options, max_tokens=count, num_draft_tokens=k)

    programs = {f"mlx-mtp k = {k}": ours(k) for k in (0, 1, 3)}
    for peer in ("mlx-lm", "mlx-vlm"):
        try:
            settings = load_peer(peer, target, target.with_name("target-assistant"), mx.float32)
        except ImportError as error:
            print(f"{peer} left out: {error}", file=sys.stderr)
            continue
        for name, peer_run in settings.items():
            programs[name] = _theirs(peer_run)
    return programs


def _theirs(peer_run: Callable[[list[int], Sampling, int], float]) -> Decode:
    return lambda count: peer_run(PROMPT, Sampling(), count)
