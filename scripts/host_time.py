"""Measure the host's processor time per round, at E2B's depth. This time of the main thread excludes device waits.

    pip install -c constraints.txt -e '.[test,peers]'
    python scripts/host_time.py

"Building" is all time except MLX's evaluation, which hands the operations to the device. The pair is random, with the
layers of E2B and small matrices: its graph equals E2B's graph, but is cheap to compute. Almost no draft token is
accepted, so that each round gives about one token. All programs decode in turn.

With `--one-kernel-each`, norms, rotations and attention are one operation each, as on a Mac's GPU. On the CPU backend,
each of them is many operations. The decoded text is then meaningless, but the graph has the size that it has on a Mac.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from tqdm import tqdm

import mlx_mtp
from mlx_mtp.bench.peers import load_peer
from mlx_mtp.decoding.sampling import Sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# Rounds of a long run and of a short run. The difference between the two runs is measured.
LONG, SHORT = 50, 10
PROMPT = list(range(20, 60))


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time per round, with mlx-lm and mlx-vlm where installed.")
    parser.add_argument("--repeats", type=int, default=5, help="Runs that count (default: %(default)s).")
    parser.add_argument("--one-kernel-each", action="store_true", help="Norms, rotations, attention as on a Mac.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, one_kernel_each() if args.one_kernel_each else ExitStack():
        runs = load(Path(folder))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for repeat in tqdm(range(-1, args.repeats), desc="Runs"):
            for name, run in runs.items():
                (long, long_evaluation), (short, short_evaluation) = (measure(run, count) for count in (LONG, SHORT))
                if repeat >= 0:
                    spent, evaluation = long - short, long_evaluation - short_evaluation
                    found[name].append(((spent - evaluation) / (LONG - SHORT), spent / (LONG - SHORT)))
    for name, pairs in found.items():
        building, spent = (1e3 * median(values) for values in zip(*pairs, strict=True))
        print(f"{name:18} building {building:6.2f} ms per round, with evaluation {spent:6.2f}")


@contextmanager
def one_kernel_each() -> Iterator[None]:
    """Replace each MLX function that is one kernel on a Mac with one operation.

    A call of the replacement takes as little host time as a call of MLX's function.
    """
    softmax, depends = mx.softmax, mx.depends

    def of_first(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return softmax(x, -1)

    def attention(q: mx.array, k: Any, v: Any, **_: Any) -> mx.array:
        # The dependency makes MLX write the K/V.
        return softmax(depends(q, [k, v]), -1)

    with ExitStack() as patches:
        for name, kernel in (("rms_norm", of_first), ("rope", of_first), ("scaled_dot_product_attention", attention)):
            patches.enter_context(patch.object(mx.fast, name, kernel))
        yield


def measure(run: Callable[[int], object], count: int) -> tuple[float, float]:
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
        run(count)
        return time.thread_time() - start, inside[0]


def load(folder: Path) -> dict[str, Callable[[int], object]]:
    from tiny import make_drafter, make_target

    types = (["sliding_attention"] * 4 + ["full_attention"]) * 7
    target = make_target(folder / "target", "e2b", layer_types=types, num_hidden_layers=35, num_kv_shared_layers=20)
    drafter = make_drafter(folder / "target-assistant", "e2b")
    # mlx-lm and mlx-vlm expect a config in this form.
    config = json.loads((target / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("vision_config", "audio_config")}
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": config["text_config"]["vocab_size"]}))
    model = mlx_mtp.load(target)
    options = mlx_mtp.GenerationOptions(ignore_eos=True)
    runs: dict[str, Callable[[int], object]] = {
        f"mlx-mtp k = {k}": lambda n, k=k: model.generate(PROMPT, options, max_tokens=n, num_draft_tokens=k)
        for k in (0, 1, 3)
    }
    for peer in ("mlx-lm", "mlx-vlm"):
        try:
            settings = load_peer(peer, target, drafter, mx.float32)
        except ImportError as error:
            print(f"{peer} left out: {error}", file=sys.stderr)
            continue
        runs |= {name: lambda n, run=run: run(PROMPT, Sampling(), n) for name, run in settings.items()}
    return runs


if __name__ == "__main__":
    main()
