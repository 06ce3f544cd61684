"""Plan the memory of published models, as `mlx-mtp generate --dry-run` does, without their weights.

    python scripts/measure.py memory tests/support/published/* --max-context 8192

Each model gets a folder with the headers of a converted checkpoint and no data: the files have their full size, but
take no space on disk. The weights are quantized as by the converter. The output has the bytes of all weights, the peak
of the plan, the peak with the per-layer embeddings on disk, and the K/V of 1000 tokens.
"""

import argparse
import tempfile
from pathlib import Path

import mlx.nn as nn

from mlx_mtp.checkpoints.config import Quantization
from mlx_mtp.checkpoints.layouts import MLX_PREFIX
from mlx_mtp.convert.quantization import WeightOptions, quantize_drafter, quantize_target
from mlx_mtp.loading import plan_memory

from .random_weights import Weights
from .sizes import UNQUANTIZED_BITS, add_bits, add_folder, empty_drafter, empty_target, read_json, write_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, several=True)
    add_bits(parser)
    parser.add_argument("--max-context", type=int, default=8192, help="Tokens of prompt and answer (%(default)s).")


def run(args: argparse.Namespace) -> None:
    print(f"{'':6}{'weights, GB':>14}{'peak, GB':>12}{'mapped, GB':>12}{'K/V of 1000, MB':>17}")
    for source in args.folders:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_headers(source, folder, args.bits)
            plan = plan_memory(folder, max_context=args.max_context, per_layer_embeddings="resident")
            mapped = "-"
            if plan.per_layer_embeddings:
                smaller = plan_memory(folder, max_context=args.max_context, per_layer_embeddings="mapped")
                mapped = gigabytes(smaller.peak)
        print(
            f"{source.name:6}{gigabytes(plan.resident):>14}{gigabytes(plan.peak):>12}{mapped:>12}"
            f"{1000 * plan.kv_per_token / 1e6:>17.1f}"
        )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def write_headers(source: Path, folder: Path, bits: int) -> None:
    """Write the configs and the headers of a pair with the published sizes, in the converter's layout."""
    is_quantized = bits < UNQUANTIZED_BITS
    options = WeightOptions(is_quantized, bits if is_quantized else None, drafter_q_bits=None if is_quantized else bits)
    write_config(folder, read_json(source))
    write_config(folder / "drafter", read_json(source / "drafter"))
    target, drafter = empty_target(folder), empty_drafter(folder / "drafter")
    has_centroids = drafter.masked_embedding is not None
    apply(target, quantize_target(target, options))
    apply(drafter, quantize_drafter(drafter, has_centroids, options.drafter_q_bits))
    Weights(target, MLX_PREFIX, "bfloat16").write_header(folder)
    Weights(drafter, "", "bfloat16").write_header(folder / "drafter")


def apply(module: nn.Module, quantization: Quantization | None) -> None:
    """Quantize a module. Nothing is computed, because only shapes and types are used."""
    if quantization is None:
        return

    def parameters(path: str, leaf: nn.Module) -> bool | dict[str, object]:
        if not hasattr(leaf, "to_quantized"):
            return False
        chosen = quantization.overrides.get(path) or quantization
        return {"group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    nn.quantize(module, class_predicate=parameters)
