"""Models of the size that a config describes, without a checkpoint's weights.

A folder holds the target's `config.json`, and the drafter's in its subfolder `drafter`, as the converter writes them.
`tests/support/published` has such a folder for each published model.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_mtp.checkpoints.config import read_drafter_config, read_target_config
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.layers import spread_layer_scalars
from mlx_mtp.gemma4.target import Target

Json = dict[str, Any]

GROUP_SIZE = 64
UNQUANTIZED_BITS = 16


def add_folder(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    help_text = "Folder with config.json and drafter/config.json, for example tests/support/published/E2B."
    if several:
        parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=help_text)
    else:
        parser.add_argument("folder", type=Path, metavar="FOLDER", help=help_text)


def add_bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, default=4, help="Bits of the weights; 16: not quantized (%(default)s).")


def read_json(folder: Path) -> Json:
    config: Json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def empty_target(folder: Path) -> Target:
    return Target(read_target_config(folder).text)


def empty_drafter(folder: Path) -> Drafter:
    return Drafter(read_drafter_config(folder))


def weightless_pair(folder: Path, bits: int) -> tuple[Target, Drafter]:
    """Return a target and a drafter whose weights are zeros that take no memory.

    They are quantized, unless `bits` is 16, and fused like a loaded pair.
    """
    target, drafter = empty_target(folder), empty_drafter(folder / "drafter")
    for module in (target, drafter):
        module.set_dtype(mx.bfloat16)
        quantize(module, bits)
    for layer in [*target.layers, *drafter.model.layers]:
        layer.self_attn.fuse()
        layer.mlp.fuse()
    for module in (target, drafter):
        _drop_weights(module)
    for layers in (target.layers, drafter.model.layers):
        spread_layer_scalars(layers)
    return target, drafter


def weightless_mlx_lm_model(folder: Path, bits: int) -> Any:
    """Return mlx-lm's model of the target, with weights that take no memory."""
    from mlx_lm.models import gemma4_text

    model = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(read_json(folder)["text_config"]))
    model.set_dtype(mx.bfloat16)
    quantize(model, bits)
    _drop_weights(model)
    # The frequencies of rotations are arrays of their modules, but no parameters.
    mx.eval([value for module in model.modules() for value in module.values() if isinstance(value, mx.array)])
    return model


def quantize(module: nn.Module, bits: int) -> None:
    """Quantize a module to affine groups of `GROUP_SIZE`. 16 bits leave it as it is."""
    if bits < UNQUANTIZED_BITS:
        nn.quantize(module, GROUP_SIZE, bits)


def _drop_weights(module: nn.Module) -> None:
    """Replace each parameter with one zero that is broadcast to its shape."""
    module.update(tree_map(lambda p: mx.broadcast_to(mx.zeros((), p.dtype), p.shape), module.parameters()))
    mx.eval(module.parameters())


def with_layers(config: Json, count: int) -> Json:
    """Return a target's config with another number of layers, of the same types in the same order.

    The first five layers own K/V. In E2B, they include both layer types.
    """
    text = config["text_config"]
    types = text["layer_types"]
    shared = max(0, min(text["num_kv_shared_layers"], count - 5))
    changes = {
        "layer_types": (types * (1 + count // len(types)))[-count:],
        "num_hidden_layers": count,
        "num_kv_shared_layers": shared,
    }
    return config | {"text_config": text | changes}


def write_config(folder: Path, config: Json) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
