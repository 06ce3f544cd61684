"""The tensors of checkpoint folders: which tensors they hold, under which names, and how they fill a module.

The layouts of Hugging Face, mlx-lm and mlx-vlm have different names. `target_names` and `drafter_names` map all of them
to the parameter names of `Target` and `Drafter`. Headers are read without the tensors, so a bad checkpoint fails at
once.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_mtp.errors import WeightsError

from .config import DrafterConfig, Quantization, TargetConfig, read_json
from .files import fault

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
# The types of unquantized weights, as safetensors spells them.
FLOAT_TYPES = ("F32", "F16", "BF16")
# mlx-lm's prefix of the parameter names of a Gemma 4 target, in files and in quantization overrides. The parameters of
# a head of its own do not have this prefix.
MLX_PREFIX = "language_model.model."

# The number of steps in which weights are read, so that progress is visible.
_STEPS = 50
_OTHER_MODALITIES = (
    "vision_tower.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "vision_embedder.",
    "multi_modal_projector.",
)
# The bounds of the towers' clipped layers, and cached rotary tables.
_UNUSED = ("input_min", "input_max", "output_min", "output_max", "rotary_emb")
_HEAD = "lm_head."
_EMBEDDING = "embed_tokens."
# The number of bytes of two tensors that are compared at a time.
_COMPARED = 1 << 24
_KV_MODULES = ("self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm.", "self_attn.v_norm.")


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: bytes `start`..`end` of `file`.

    `dtype` is spelled as in safetensors (`BF16`, `F32`, ...).
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.start


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a checkpoint folder by its name in the file, from the headers alone.

    If several files hold a tensor, the file that the index names for it is used.

    Raises WeightsError if there is no safetensors file, a shard of the index is missing, a file is truncated, a tensor
    of the index is in no file, or no index chooses between two files with the same tensor.
    """
    index = folder / INDEX_NAME
    weight_map = _read_index(index) if index.is_file() else {}
    files = [folder / name for name in sorted(set(weight_map.values()))] or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: the folder has no model*.safetensors")
    copies: dict[str, list[TensorInfo]] = {}
    for file in files:
        for name, info in read_header(file).items():
            copies.setdefault(name, []).append(info)
    for name, shard in weight_map.items():
        if name not in copies:
            raise WeightsError(f"{index}: names tensor {name} in {shard}, which does not hold it")
    return {name: _choose_copy(folder, name, found, weight_map.get(name)) for name, found in copies.items()}


def _read_index(index: Path) -> dict[str, str]:
    """Return the file name of each tensor in an index. Raises WeightsError if one of the files is missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index}: field weight_map must name a file for each tensor, found {weight_map!r:.200}")
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index}: names {name}, which is not in the folder")
    return weight_map


def _choose_copy(folder: Path, name: str, copies: list[TensorInfo], shard: str | None) -> TensorInfo:
    if len(copies) == 1:
        return copies[0]
    for info in copies:
        if shard is not None and info.file == folder / shard:
            return info
    files = " and ".join(info.file.name for info in copies[:2])
    if shard is None:
        reason = f"no {INDEX_NAME} says which one is meant: remove the older file"
    else:
        reason = f"{INDEX_NAME} names {shard} for it, which does not hold it"
    raise WeightsError(f"{folder}: {files} both hold tensor {name}, and {reason}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file. Raises WeightsError if it is truncated or no safetensors file."""
    if (reason := fault(file)) is not None:
        raise WeightsError(f"{file}: {reason}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise WeightsError(
                f"{file}: truncated or not a safetensors file: expected a header of {header_size} bytes, "
                f"found {size} bytes in all"
            )
        header = stream.read(header_size)
    base = 8 + header_size
    tensors = {}
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), base + start, base + end)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{file}: not a safetensors file: its header cannot be read: {error!r}") from None
    expected = max((tensor.end for tensor in tensors.values()), default=base)
    if expected != size:
        raise WeightsError(f"{file}: truncated: its header describes {expected} bytes, found {size}")
    return tensors


def mlx_name(name: str) -> str:
    """Return mlx-lm's name of a parameter or a module of `Target`."""
    return f"language_model.{name}" if name.startswith(_HEAD.removesuffix(".")) else MLX_PREFIX + name


def plain_name(key: str) -> str:
    """Return the name of a tensor or a module without the prefix of its layout.

    The prefixes are `model.language_model.` (Hugging Face), `language_model.model.` (mlx-lm), and `model.` or
    `language_model.` (text decoders alone).
    """
    return key.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")


def resolve_head(config: TargetConfig) -> TargetConfig:
    """Return the config with `text.own_head` set from the weights, by the rule of transformers.

    A head in the checkpoint is used if it differs from the embedding. If `tie_word_embeddings` is true, such a head is
    used too, with a warning.

    Raises WeightsError if `tie_word_embeddings` is false and there is no head, or if the checkpoint cannot be read.
    """
    folder = config.path.parent
    named = {plain_name(key): info for key, info in read_checkpoint(folder).items()}
    head, embedding = (
        {name.removeprefix(part): info for name, info in named.items() if name.startswith(part)}
        for part in (_HEAD, _EMBEDDING)
    )
    if not head:
        if not config.is_tied:
            raise WeightsError(
                f"{folder}: tensor lm_head.weight is missing, but tie_word_embeddings is false in {config.path.name}: "
                "expected a head of its own"
            )
        return config
    own_head = head.keys() != embedding.keys() or not all(_equal(head[name], embedding[name]) for name in head)
    if own_head and config.is_tied:
        logger.warning(
            "%s: tie_word_embeddings is true, but lm_head.weight is not the embedding: lm_head.weight is used", folder
        )
    return replace(config, text=replace(config.text, own_head=own_head))


def _equal(left: TensorInfo, right: TensorInfo) -> bool:
    """Return whether two tensors in files have the same type, shape and bytes. Stop reading at the first difference."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    with left.file.open("rb") as one, right.file.open("rb") as other:
        one.seek(left.start)
        other.seek(right.start)
        for start in range(0, left.nbytes, _COMPARED):
            size = min(_COMPARED, left.nbytes - start)
            if one.read(size) != other.read(size):
                return False
    return True


def target_names(key: str, config: TargetConfig) -> list[str]:
    """Return the parameter names of `Target` that a checkpoint's tensor fills; [] if it is not used.

    Two names mean that the tensor is split in halves along its second last axis (fused expert projections).
    """
    name = plain_name(key)
    if name.startswith(_HEAD):
        return [name] if config.text.own_head else []
    if name.startswith(_OTHER_MODALITIES) or any(part in name for part in _UNUSED):
        return []
    if name.startswith("layers.") and any(module in name for module in _KV_MODULES):
        index = name.split(".")[1]
        # Published E2B and E4B checkpoints have unused K/V projections in the layers that share another layer's K/V.
        if index.isdigit() and int(index) < len(config.text.layers) and not config.text.layers[int(index)].has_kv:
            return []
    if name.endswith(".experts.gate_up_proj"):
        experts = name.removesuffix("gate_up_proj")
        return [f"{experts}switch_glu.gate_proj.weight", f"{experts}switch_glu.up_proj.weight"]
    if name.endswith(".experts.down_proj"):
        return [name.removesuffix("down_proj") + "switch_glu.down_proj.weight"]
    return [name]


def drafter_names(key: str, config: DrafterConfig) -> list[str]:
    """Return the parameter names of `Drafter` that a checkpoint's tensor fills; [] if it is not used.

    The published names are the names of the parameters. A drafter owns no K/V.
    """
    unused = "lm_head" in key or "rotary_emb" in key or any(module in key for module in _KV_MODULES)
    return [] if unused else [key]


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


def match_tensors(
    folder: Path, tensors: Iterable[str], names: Callable[[str], list[str]], expected: Iterable[str]
) -> dict[str, list[str]]:
    """Match the checkpoint's tensors to a model. Return each used tensor with the parameters that it fills.

    Raises WeightsError if no tensor or two tensors fill a parameter, or if a tensor fills no parameter of the model.
    """
    sources: dict[str, str] = {}
    wanted = set(expected)
    for key in tensors:
        for name in names(key):
            if name not in wanted:
                raise WeightsError(f"{folder}: tensor {key} belongs to no part of the model that config.json describes")
            if name in sources:
                raise WeightsError(f"{folder}: tensors {sources[name]} and {key} both hold {name}")
            sources[name] = key
    missing = sorted(wanted - sources.keys())
    if missing:
        raise WeightsError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    matched: dict[str, list[str]] = {}
    for name, key in sources.items():
        matched.setdefault(key, []).append(name)
    return matched


def fill_module(
    module: nn.Module,
    folder: Path,
    names: Callable[[str], list[str]],
    quantization: Quantization | None,
    left: str | None = None,
    on_read: Callable[[int], None] | None = None,
) -> dict[str, TensorInfo]:
    """Load a checkpoint folder into a module, and quantize the modules whose scales the checkpoint holds.

    `left` is a part of the module whose parameters stay in the files, after the same checks. The function returns the
    places of these parameters, by their names in that part. These parameters must never be evaluated. `on_read` is
    called with the number of bytes of each read; their sum is that of `count_bytes`. If `on_read` raises, the exception
    is passed on.

    Raises WeightsError if a tensor is missing, unexpected or truncated, or has the wrong shape.
    """
    tensors = read_checkpoint(folder)
    present = {name for key in tensors for name in names(key)}
    if quantization is not None:
        try:
            _quantize_modules(module, quantization, present)
        except ValueError as error:
            raise WeightsError(f"{folder}: config.json gives a quantization its weights cannot have: {error}") from None
    parameters = lazy_parameters(module)
    matched = match_tensors(folder, tensors, names, parameters)
    for key, filled in matched.items():
        check_shape(folder, key, tensors[key].shape, parameters[filled[0]].shape, len(filled))
        if mx.issubdtype(parameters[filled[0]].dtype, mx.floating) and tensors[key].dtype not in FLOAT_TYPES:
            raise WeightsError(
                f"{folder}: tensor {key} is {tensors[key].dtype}, expected one of {', '.join(FLOAT_TYPES)}"
            )
    unread: dict[str, TensorInfo] = {}
    for key, filled in list(matched.items()):
        if _is_left(filled, left):
            unread[filled[0]] = tensors[key]
            del matched[key]
    # Arrays are kept by file, because two files may hold tensors of the same name.
    arrays: dict[Path, dict[str, mx.array]] = {
        file: mx.load(str(file))  # type: ignore[misc]
        for file in sorted({tensors[key].file for key in matched})
    }
    weights = []
    for key, filled in matched.items():
        # MLX loads lazily, so only the arrays that are taken here are read.
        array = arrays[tensors[key].file][key]
        parts = mx.split(array, len(filled), axis=-2) if len(filled) > 1 else [array]
        weights += list(zip(filled, parts, strict=True))
    module.load_weights(weights, strict=False)
    del arrays, weights
    _read({key: tensors[key].nbytes for key in matched}, matched, lazy_parameters(module), on_read)
    return {name.removeprefix(f"{left}."): info for name, info in unread.items()}


def count_bytes(folder: Path, names: Callable[[str], list[str]], left: str | None = None) -> int:
    """Return the number of bytes that `fill_module` reads from a checkpoint folder."""
    tensors = read_checkpoint(folder).items()
    return sum(info.nbytes for key, info in tensors if (filled := names(key)) and not _is_left(filled, left))


def _is_left(filled: list[str], left: str | None) -> bool:
    return left is not None and filled[0].startswith(f"{left}.")


def _read(
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


def _quantize_modules(module: nn.Module, quantization: Quantization, present: set[str]) -> None:
    # The names of overrides follow the names of the tensors, in any layout. An override that fits no module is ignored,
    # as in mlx-lm.
    overrides = {plain_name(name): choice for name, choice in quantization.overrides.items()}

    def parameters(path: str, leaf: nn.Module) -> bool | dict[str, object]:
        if f"{path}.scales" not in present:
            return False
        chosen = overrides.get(plain_name(path)) or quantization
        return {"group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    nn.quantize(module, quantization.group_size, quantization.bits, mode=quantization.mode, class_predicate=parameters)


def check_shape(folder: Path, key: str, found: tuple[int, ...], shape: tuple[int, ...], parts: int) -> None:
    """Raise WeightsError unless a tensor of shape `found` fills `parts` parameters of shape `shape`."""
    expected = [*shape[:-2], shape[-2] * parts, shape[-1]] if parts > 1 else list(shape)
    if list(found) != expected:
        raise WeightsError(f"{folder}: tensor {key} has shape {list(found)}, expected {expected} from config.json")


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
