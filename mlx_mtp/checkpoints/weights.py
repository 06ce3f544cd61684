"""The weights of a module: filled from the tensors of a checkpoint folder, and quantized as these are."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_mtp.errors import WeightsError

from .config import Quantization
from .layouts import check_shape, match_tensors, plain_name
from .tensors import FLOAT_TYPES, TensorInfo, read_checkpoint

# The number of steps in which weights are read, so that progress is visible.
_STEPS = 50


def lazy_parameters(module: nn.Module) -> dict[str, mx.array]:
    """Return every parameter of a module by name, for its shape and type.

    Nothing is computed, because MLX initialises parameters lazily.
    """
    parameters: dict[str, mx.array] = tree_flatten(module.parameters(), destination={})  # type: ignore[assignment]
    return parameters


def fingerprint(module: nn.Module, config: str) -> str:
    """Return a name for a loaded model, made from its config and its parameters.

    The shape, the type and the first bytes of every parameter count. Per-layer embeddings are left out, because mapped
    embeddings are not parameters.
    """
    digest = hashlib.sha256(config.encode())
    for name, parameter in sorted(lazy_parameters(module).items()):
        if not name.startswith("embed_tokens_per_layer"):
            digest.update(f"{name} {parameter.shape} {parameter.dtype}".encode())
            # A few bytes of the first rows are used.
            first = parameter.reshape(-1, parameter.shape[-1])[:4, :16]
            digest.update(np.array(mx.contiguous(first).view(mx.uint8)).data)
    return digest.hexdigest()[:32]


def fill_module(
    module: nn.Module,
    folder: Path,
    names: Callable[[str], list[str]],
    quantization: Quantization | None,
    *,
    is_unread: Callable[[str], bool] = lambda _: False,
    cut: Callable[[str, mx.array], mx.array] = lambda _, tensor: tensor,
    on_read: Callable[[int], None] | None = None,
) -> dict[str, TensorInfo]:
    """Load a checkpoint folder into a module, and quantize the modules whose scales the checkpoint holds.

    The weight of a convolution may have its input channels last, as in MLX, or second, as in PyTorch.

    The parameters with names that are `is_unread` stay in the files, after the same checks. The function returns their
    places. These parameters must never be evaluated. `cut` returns the part of a parameter that is kept, by its name;
    the rest is freed after each read. `on_read` is called with the number of bytes of each read; their sum is that of
    `count_bytes`. If `on_read` raises, the exception is passed on.

    Raises WeightsError if a tensor is missing, unexpected or truncated, or has the wrong shape.
    """
    tensors = read_checkpoint(folder)
    present = {name for key in tensors for name in names(key)}
    if quantization is not None:
        _quantize_modules(module, folder, quantization, present)
    parameters = lazy_parameters(module)
    matched = match_tensors(folder, tensors, names, parameters)
    swapped = channels_second(module, tensors, matched, parameters)
    for key, filled in matched.items():
        parameter = parameters[filled[0]]
        parameter = mx.moveaxis(parameter, -1, 1) if key in swapped else parameter
        _check_tensor(folder, key, tensors[key], parameter, len(filled))
    stay = {key: filled[0] for key, filled in matched.items() if is_unread(filled[0])}
    read = {key: filled for key, filled in matched.items() if key not in stay}
    weights = [(name, cut(name, array)) for name, array in _lazy_weights(tensors, read, swapped)]
    module.load_weights(weights, strict=False)
    # Otherwise this list would keep the tensors that parameters were cut from.
    del weights
    _evaluate({key: tensors[key].nbytes for key in read}, read, lazy_parameters(module), on_read)
    return {name: tensors[key] for key, name in stay.items()}


def count_bytes(
    folder: Path, names: Callable[[str], list[str]], is_unread: Callable[[str], bool] = lambda _: False
) -> int:
    """Return the number of bytes that `fill_module` reads from a checkpoint folder."""
    tensors = read_checkpoint(folder).items()
    return sum(info.nbytes for key, info in tensors if (filled := names(key)) and not is_unread(filled[0]))


def _check_tensor(folder: Path, key: str, tensor: TensorInfo, parameter: mx.array, parts: int) -> None:
    """Raise WeightsError unless a tensor has the shape and type to fill `parts` parameters like this one."""
    check_shape(folder, key, tensor.shape, parameter.shape, parts)
    if mx.issubdtype(parameter.dtype, mx.floating) and tensor.dtype not in FLOAT_TYPES:
        raise WeightsError(f"{folder}: tensor {key} is {tensor.dtype}, expected one of {', '.join(FLOAT_TYPES)}")


def channels_second(
    module: nn.Module,
    tensors: dict[str, TensorInfo],
    matched: dict[str, list[str]],
    parameters: dict[str, mx.array],
) -> set[str]:
    """Return the tensors that hold a convolution's weight with its input channels second."""
    convolutions = (name for name, part in module.named_modules() if isinstance(part, nn.Conv1d | nn.Conv2d))
    weights = {f"{name}.weight" for name in convolutions}
    found = set()
    for key, (name, *_) in matched.items():
        if name in weights:
            outputs, *kernel, inputs = parameters[name].shape
            if tensors[key].shape == (outputs, inputs, *kernel) != parameters[name].shape:
                found.add(key)
    return found


def _lazy_weights(
    tensors: dict[str, TensorInfo], matched: dict[str, list[str]], swapped: set[str]
) -> list[tuple[str, mx.array]]:
    """Return the parameters that the tensors fill, by name. Nothing is read yet."""
    # Arrays are kept by file, because two files may hold tensors of the same name.
    arrays: dict[Path, dict[str, mx.array]] = {
        file: mx.load(str(file))  # type: ignore[misc]
        for file in sorted({tensors[key].file for key in matched})
    }
    weights = []
    for key, filled in matched.items():
        # MLX loads lazily, so only the arrays that are taken here are read.
        array = arrays[tensors[key].file][key]
        if key in swapped:
            array = mx.contiguous(mx.moveaxis(array, 1, -1))
        parts = mx.split(array, len(filled), axis=-2) if len(filled) > 1 else [array]
        weights += list(zip(filled, parts, strict=True))
    return weights


def _evaluate(
    sizes: dict[str, int],
    matched: dict[str, list[str]],
    parameters: dict[str, mx.array],
    on_read: Callable[[int], None] | None,
) -> None:
    """Read the tensors of `sizes` into the parameters that they fill, in steps if there is an `on_read`."""
    step, size, group = sum(sizes.values()) / (1 if on_read is None else _STEPS), 0, list[mx.array]()
    # The tensors are in the order of the files.
    for index, (key, nbytes) in enumerate(sizes.items(), start=1):
        group += [parameters[name] for name in matched[key]]
        size += nbytes
        if size >= step or index == len(sizes):
            mx.eval(group)
            if on_read is not None:
                on_read(size)
            size, group = 0, []


def _quantize_modules(module: nn.Module, folder: Path, quantization: Quantization, present: set[str]) -> None:
    """Quantize the modules whose scales are `present`. Raises WeightsError if their shapes do not allow it."""
    # The names of overrides follow the names of the tensors, in any layout. An override that fits no module is ignored,
    # as in mlx-lm.
    overrides = {plain_name(name): choice for name, choice in quantization.overrides.items()}

    def parameters(path: str, leaf: nn.Module) -> bool | dict[str, object]:
        if f"{path}.scales" not in present:
            return False
        chosen = overrides.get(plain_name(path)) or quantization
        return {"group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    try:
        nn.quantize(module, group_size, bits, mode=mode, class_predicate=parameters)
    except ValueError as error:
        raise WeightsError(f"{folder}: config.json gives a quantization its weights cannot have: {error}") from None


def token_ids(folder: Path, key: str, values: mx.array, vocab_size: int = 2**31) -> mx.array:
    """Return a tensor of different token ids as int32. The tensor may have a float type that kept the ids.

    Raises WeightsError if the values are not different token ids, as after a cast that rounds.
    """
    found = np.array(values.astype(mx.float32) if mx.issubdtype(values.dtype, mx.floating) else values)
    ids = np.unique(found[(found == np.floor(found)) & (found >= 0) & (found < vocab_size)])
    if len(ids) != found.size:
        raise WeightsError(
            f"{folder}: tensor {key} must hold {found.size} different token ids, found {len(ids)} in {values.dtype}"
        )
    return mx.array(found.astype(np.int32))
