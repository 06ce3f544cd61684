"""Choice of the quantization of each module, and checks of the options for weights."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn

from mlx_mtp.checkpoints.config import Quantization
from mlx_mtp.errors import OptionError

logger = logging.getLogger(__name__)

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# The default group size and bits of each mode. Modes other than affine support no other values.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
WEIGHT_DTYPES = ("float16", "bfloat16", "float32")
# The names are mlx-lm's: first the bits of most modules, then the bits of the few modules that matter more.
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
UNQUANTIZED_BITS = 16
DRAFTER_BITS = (*AFFINE_BITS, UNQUANTIZED_BITS)
_DRAFTER_DEFAULT = Quantization(64, 4)
# The router's few weights choose the experts. mlx-lm also keeps them at 8 bits.
_ROUTER = "router.proj"
_ROUTER_QUANTIZATION = Quantization(64, 8)
# The projections in the blocks of the vision and audio towers.
_BLOCK_PROJECTION = ".linear"
_MEDIA_BITS = 8


@dataclass(frozen=True)
class WeightOptions:
    """Options for weights, with the names of the command line's flags. None means that the flag is not given."""

    quantize: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str = "affine"
    quant_predicate: str | None = None
    dtype: str | None = None
    drafter_q_bits: int | None = None
    draft_vocab: int | None = None
    draft_vocab_text: Path | None = None


def check_options(options: WeightOptions) -> None:
    """Check the options for weights.

    Raises OptionError if a flag's value is not possible or contradicts another flag. The error names the first such
    flag.
    """
    affine = options.q_mode == "affine"
    _check("--q-mode", options.q_mode, tuple(MODES))
    group_size, bits = MODES[options.q_mode]
    reason = "" if affine else f" with --q-mode {options.q_mode}"
    _check("--q-bits", options.q_bits, AFFINE_BITS if affine else (bits,), reason)
    _check("--q-group-size", options.q_group_size, AFFINE_GROUP_SIZES if affine else (group_size,), reason)
    _check("--quant-predicate", options.quant_predicate, RECIPES)
    _check("--dtype", options.dtype, WEIGHT_DTYPES)
    _check("--drafter-q-bits", options.drafter_q_bits, DRAFTER_BITS)
    if options.draft_vocab is not None and options.draft_vocab < 1:
        raise OptionError(f"--draft-vocab: expected at least 1, found {options.draft_vocab}")
    if options.draft_vocab_text is not None and options.draft_vocab is None:
        raise OptionError(f"--draft-vocab-text: expected --draft-vocab with it, found {options.draft_vocab_text} alone")
    if options.quant_predicate and not affine:
        raise OptionError(f"--quant-predicate: expected --q-mode affine, found {options.q_mode}")
    if options.quant_predicate and options.q_bits:
        raise OptionError(f"--q-bits: expected none with --quant-predicate, which chooses them, found {options.q_bits}")
    given = {
        "--q-bits": options.q_bits,
        "--q-group-size": options.q_group_size,
        "--q-mode": None if affine else options.q_mode,
        "--quant-predicate": options.quant_predicate,
    }
    for flag, value in given.items():
        if value is not None and not options.quantize:
            raise OptionError(f"{flag}: expected --quantize with it, found {value} alone")


def _check(flag: str, value: object, expected: tuple[object, ...], reason: str = "") -> None:
    if value is not None and value not in expected:
        choices = ", ".join(str(choice) for choice in expected)
        raise OptionError(f"{flag}: expected {'one of ' if len(expected) > 1 else ''}{choices}{reason}, found {value}")


def quantize_target(target: nn.Module, options: WeightOptions) -> Quantization | None:
    """Return the quantization of a target, with overrides by module path, or None if it is not quantized.

    Raises OptionError if the group size that the options give does not divide a weight's columns.
    """
    if not options.quantize:
        return None
    group_size, bits = MODES[options.q_mode]
    default = Quantization(options.q_group_size or group_size, options.q_bits or bits, options.q_mode)
    modules = _quantizable(target)
    chosen = dict.fromkeys(modules, default)
    if options.quant_predicate is not None:
        # mlx-lm imports transformers, which takes seconds. Only a recipe needs it.
        from mlx_lm.convert import mixed_quant_predicate_builder

        default = replace(default, bits=int(options.quant_predicate.split("_")[1]))
        # The predicate's annotation in mlx-lm names an argument that the predicate does not take.
        predicate: Any = mixed_quant_predicate_builder(options.quant_predicate, target, default.group_size)
        chosen = {path: Quantization(**predicate(path, module)) for path, module in modules.items()}
    chosen |= {path: _ROUTER_QUANTIZATION for path in modules if path.endswith(_ROUTER)}
    return _with_overrides(modules, default, chosen, options.q_group_size is None)


def quantize_media(media: nn.Module, options: WeightOptions) -> Quantization | None:
    """Return the quantization of a vision or audio model, or None if it is not quantized.

    The projections of its blocks get 8 bits, because fewer bits change the features much more. All other weights are
    few and stay unquantized.
    """
    if not options.quantize:
        return None
    # Affine groups are not as small as those of nvfp4.
    group_size = max(options.q_group_size or MODES[options.q_mode][0], AFFINE_GROUP_SIZES[0])
    default = Quantization(group_size, _MEDIA_BITS)
    modules = _quantizable(media)
    blocks = {path: module for path, module in modules.items() if path.endswith(_BLOCK_PROJECTION)}
    fitted = _with_overrides(blocks, default, dict.fromkeys(blocks, default), True)
    others: dict[str, Quantization | Literal[False]] = dict.fromkeys(modules.keys() - blocks.keys(), False)
    return replace(fitted, overrides=fitted.overrides | others)


def quantize_drafter(drafter: nn.Module, has_centroids: bool, bits: int | None) -> Quantization | None:
    """Return the quantization of a drafter, or None if it is not quantized.

    By default, a drafter with a dense head is quantized, because each draft step reads the whole head. A drafter with a
    centroid head is not quantized, because it is small and a draft step reads few rows of the head.
    """
    if bits is None:
        bits = UNQUANTIZED_BITS if has_centroids else _DRAFTER_DEFAULT.bits
    if bits == UNQUANTIZED_BITS:
        return None
    default = replace(_DRAFTER_DEFAULT, bits=bits)
    modules = _quantizable(drafter)
    return _with_overrides(modules, default, dict.fromkeys(modules, default), True)


def parameter_quantization(module: nn.Module, quantization: Quantization | None) -> dict[str, Quantization]:
    """Return the quantization of each quantized parameter, by parameter name."""
    if quantization is None:
        return {}
    chosen = {path: quantization.overrides.get(path, quantization) for path in _quantizable(module)}
    return {f"{path}.weight": choice for path, choice in chosen.items() if choice}


def _quantizable(module: nn.Module) -> dict[str, nn.Module]:
    return {path: leaf for path, leaf in module.named_modules() if hasattr(leaf, "to_quantized")}


def _with_overrides(
    modules: dict[str, nn.Module],
    default: Quantization,
    chosen: dict[str, Quantization],
    is_default: bool,
) -> Quantization:
    overrides: dict[str, Quantization | Literal[False]] = {}
    for path, module in modules.items():
        fitted = _fit(path, module, chosen[path], is_default)
        if fitted != default:
            overrides[path] = fitted
    whole = sorted(path for path, choice in overrides.items() if not choice)
    if whole:
        names = ", ".join(whole[:2]) + (", ..." if len(whole) > 2 else "")
        logger.warning(
            "weights stay unquantized, because no group size divides their columns: %d (%s)", len(whole), names
        )
    return replace(default, overrides=overrides)


def _fit(path: str, module: nn.Module, choice: Quantization, is_default: bool) -> Quantization | Literal[False]:
    """Return the choice, or a change of it if its group size does not divide the weight's columns.

    A group size by default may change: to the smallest group size in the affine mode, or to False, which leaves the
    weight unquantized. Raises OptionError if the user gave the group size.
    """
    columns = module.weight.shape[-1]
    smallest = AFFINE_GROUP_SIZES[:1] if is_default and choice.mode == "affine" else ()
    for size in (choice.group_size, *smallest):
        if columns % size == 0:
            return replace(choice, group_size=size)
    if is_default:
        return False
    raise OptionError(
        f"tensor {path}.weight has {columns} columns, not divisible by the group size of {choice.group_size}; "
        "choose another --q-group-size or --q-mode"
    )
