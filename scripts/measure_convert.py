"""Measure the time and peak memory of the conversion of a large synthetic checkpoint, with mlx-mtp and with mlx-lm.

    python scripts/measure_convert.py --layout 12b --gigabytes 6

The script writes a random bfloat16 checkpoint to a temporary folder. The checkpoint has the shapes of the named model,
and enough layers to reach the size. Each converter quantizes it in its own process. The script then removes all files.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from subprocess import run
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

# On Linux, a process's peak includes its parent's memory before exec. A small process between them excludes this one.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

Shapes = dict[str, tuple[int, ...]]

VOCAB_SIZE = 262144
SHARD_BYTES = 2 << 30
BYTES_PER_VALUE = 2
# The converter's stated memory bound is twice the largest tensor plus this size.
SPARE_BYTES = 500e6


class Layout(NamedTuple):
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    global_kv_heads: int
    head_dim: int = 256
    global_head_dim: int = 512


LAYOUTS = {"12b": Layout(3840, 15360, 16, 8, 1), "31b": Layout(5376, 21504, 32, 16, 4)}


class Measurement(NamedTuple):
    seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of converting a large synthetic checkpoint.")
    parser.add_argument("--layout", choices=LAYOUTS, default="12b", help="Shapes of which model (default: 12b).")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="Size of the checkpoint at least (default: 6).")
    parser.add_argument("--folder", type=Path, help="Where to put temporary files (default: the system's).")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        shapes = write_checkpoint(folder / "source", LAYOUTS[args.layout], args.gigabytes * 1e9)
        largest = max(prod(shape) for shape in shapes.values()) * BYTES_PER_VALUE
        total = sum(prod(shape) for shape in shapes.values()) * BYTES_PER_VALUE
        bound = 2 * largest + SPARE_BYTES
        print(f"checkpoint {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
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
    done = run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{done.stderr}")
    return Measurement(seconds, int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024))


def write_checkpoint(folder: Path, layout: Layout, size: float) -> Shapes:
    """Write a checkpoint of at least `size` bytes, and return its tensors' shapes."""
    folder.mkdir()
    layer_types = ["full_attention"]
    while sum(prod(shape) for shape in target_shapes(layout, layer_types).values()) * BYTES_PER_VALUE < size:
        kind = "full_attention" if len(layer_types) % 6 == 0 else "sliding_attention"
        layer_types.insert(0, kind)
    shapes = target_shapes(layout, layer_types)
    (folder / "config.json").write_text(json.dumps(target_config(layout, layer_types)))
    Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    # A repeated block of values costs a converter as much as new values, and is much faster to write.
    normal = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02
    values = (normal.view(np.uint32) >> 16).astype(np.uint16)
    shards = list(split(shapes))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_shard(folder / name, shard, values)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shapes


def split(shapes: Shapes) -> Iterator[Shapes]:
    """Yield the tensors in groups of about SHARD_BYTES bytes."""
    shard: Shapes = {}
    for name, shape in shapes.items():
        shard[name] = shape
        if sum(prod(shape) for shape in shard.values()) * BYTES_PER_VALUE > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_shard(path: Path, shapes: Shapes, values: NDArray[np.uint16]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * BYTES_PER_VALUE
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            count = prod(shape)
            for start in range(0, count, values.size):
                stream.write(values[: count - start].data)


def target_shapes(layout: Layout, layer_types: list[str]) -> Shapes:
    hidden, width = layout.hidden_size, layout.intermediate_size
    shapes: Shapes = {"embed_tokens.weight": (VOCAB_SIZE, hidden), "norm.weight": (hidden,)}
    for index, kind in enumerate(layer_types):
        is_full = kind == "full_attention"
        head_dim = layout.global_head_dim if is_full else layout.head_dim
        kv_width = (layout.global_kv_heads if is_full else layout.kv_heads) * head_dim
        layer: Shapes = {
            "self_attn.q_proj.weight": (layout.heads * head_dim, hidden),
            "self_attn.k_proj.weight": (kv_width, hidden),
            "self_attn.o_proj.weight": (hidden, layout.heads * head_dim),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
            "mlp.gate_proj.weight": (width, hidden),
            "mlp.up_proj.weight": (width, hidden),
            "mlp.down_proj.weight": (hidden, width),
            "layer_scalar": (1,),
        }
        if not is_full:
            layer["self_attn.v_proj.weight"] = (kv_width, hidden)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            layer[f"{norm}_layernorm.weight"] = (hidden,)
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return {f"model.language_model.{name}": shape for name, shape in shapes.items()}


def target_config(layout: Layout, layer_types: list[str]) -> dict[str, Any]:
    text = {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.kv_heads,
        "num_global_key_value_heads": layout.global_kv_heads,
        "head_dim": layout.head_dim,
        "global_head_dim": layout.global_head_dim,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "sliding_window": 1024,
        "max_position_embeddings": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    }
    top = {"model_type": "gemma4", "vocab_size": VOCAB_SIZE, "eos_token_id": 1, "dtype": "bfloat16"}
    return top | {"text_config": text}


if __name__ == "__main__":
    main()
