"""The conversion: check all input, write a new folder, then move the folder to its place."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import (
    DrafterConfig,
    Quantization,
    TargetConfig,
    TextConfig,
    read_drafter_config,
    read_json,
    read_target_config,
)
from mlx_mtp.checkpoints.files import BYTE_ORDER_MARK, fault, read_text
from mlx_mtp.checkpoints.hub import DRAFTER_FOLDER, resolve_folder
from mlx_mtp.checkpoints.layouts import (
    audio_names,
    check_shape,
    drafter_names,
    is_media,
    match_tensors,
    mlx_name,
    resolve_head,
    target_names,
    vision_names,
)
from mlx_mtp.checkpoints.media_config import read_media_config
from mlx_mtp.checkpoints.output_files import check_output, existing_parent, new_folder
from mlx_mtp.checkpoints.tensors import (
    DTYPES,
    FLOAT_TYPES,
    INDEX_NAME,
    INTEGER_TYPES,
    TensorInfo,
    dtype_name,
    read_checkpoint,
)
from mlx_mtp.checkpoints.weights import channels_second, lazy_parameters, token_ids
from mlx_mtp.errors import ConfigError, HubError, OptionError, OutputError, TokenizerError, WeightsError
from mlx_mtp.gemma4.audio import audio_model
from mlx_mtp.gemma4.draft_vocab import Ids, check_draft_vocab, choose_ids
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target
from mlx_mtp.gemma4.vision import vision_model
from mlx_mtp.loading import check_pair, find_drafter, how_to_name_a_drafter
from mlx_mtp.text.tokenizer import TEMPLATES_FOLDER, check_tokenizer, load_tokenizer

from .quantization import (
    WEIGHT_DTYPES,
    WeightOptions,
    check_options,
    parameter_quantization,
    quantize_drafter,
    quantize_media,
    quantize_target,
)
from .safetensors_writer import (
    BLOCK_BYTES,
    Conversion,
    index_text,
    parameter_count,
    plan_shards,
    shard_size,
    stored_bytes,
    write_shard,
)

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_GENERATION_CONFIG = "generation_config.json"
# The files that say how pictures and sounds become arrays.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# The modalities besides text, with the fields of config.json that describe their parts. A video needs the image part.
_MEDIA_FIELDS = {"image": "vision_config", "audio": "audio_config"}
MODALITIES = ("text", *_MEDIA_FIELDS)
# Model types of checkpoints that hold only a text decoder, and the model type for which mlx-lm expects our names.
_TEXT_ONLY_TYPES = {"gemma4_text": "gemma4", "gemma4_unified_text": "gemma4_unified"}


@dataclass(frozen=True)
class Options:
    """Options of a conversion. The command line's help describes each option.

    `drafter` is "auto", "none", a folder or a hub id. `modalities` are of `MODALITIES`; None means all that the
    checkpoint has.
    """

    hf_path: str
    mlx_path: Path
    drafter: str = "auto"
    weights: WeightOptions = field(default_factory=WeightOptions)
    overwrite: bool = False
    revision: str | None = None
    upload_repo: str | None = None
    modalities: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FolderPlan:
    """Planned content of one output folder, for the target or for the drafter.

    All dictionaries have file names as keys. `copies` holds the paths of source files that are copied.
    """

    shards: dict[str, list[Conversion]]
    texts: dict[str, str]
    copies: dict[str, Path]
    arrays: dict[str, dict[str, mx.array]] = field(default_factory=dict)

    @property
    def conversions(self) -> list[Conversion]:
        """The conversions of all shards, in order."""
        return [conversion for shard in self.shards.values() for conversion in shard]

    @property
    def nbytes(self) -> int:
        """Size of the folder's files in bytes."""
        texts = sum(len(text.encode()) for text in self.texts.values())
        copies = sum(file.stat().st_size for file in self.copies.values())
        arrays = sum(array.nbytes for file in self.arrays.values() for array in file.values())
        return texts + copies + arrays + sum(shard_size(shard) for shard in self.shards.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean number of stored bits per weight, scales and biases included."""
        return stored_bytes(self.conversions) * 8 / parameter_count(self.conversions)


@dataclass(frozen=True)
class Summary:
    """Result of a conversion.

    `drafter` is None if the target was converted alone. `advice` tells the user how to name a drafter.
    """

    folder: Path
    target: FolderPlan
    drafter: FolderPlan | None
    advice: str


def convert(
    options: Options, block_bytes: int = BLOCK_BYTES, progress: Callable[[int, int], object] | None = None
) -> Summary:
    """Convert a target and its drafter to one folder.

    All checks come before the first write. The folder appears only when it is complete. `progress` gets two numbers of
    source bytes after each block: the bytes done since the last call, and the total.

    Raises OutputError if the folder exists, cannot be written or does not fit the disk, and other MTPError subclasses
    if the options, the checkpoints or the hub cause an error.
    """
    check_options(options.weights)
    _check_modalities(options.modalities)
    if (text := options.weights.draft_vocab_text) is not None and (reason := fault(text)) is not None:
        raise OptionError(f"--draft-vocab-text: {text}: {reason}")
    if options.drafter == "none":
        _check_no_drafter(options.weights, "found none")
    if options.upload_repo is not None:
        _check_repo_id(options.upload_repo)
    output = Path(os.path.abspath(options.mlx_path))
    check_output(output, "--mlx-path", options.overwrite)
    folder = resolve_folder(options.hf_path, options.revision)
    target, drafter = _plan(options, folder, output)
    plans = {"": target} | ({} if drafter is None else {DRAFTER_FOLDER: drafter})
    _check_disk(output, sum(plan.nbytes for plan in plans.values()))
    total = sum(conversion.source_bytes for plan in plans.values() for conversion in plan.conversions)
    with new_folder(output) as new:
        for name, plan in plans.items():
            (new / name).mkdir(exist_ok=True)
            _write(new / name, plan, block_bytes, lambda done: progress(done, total) if progress else None)
    if options.upload_repo is not None:
        _upload(output, options.upload_repo)
    return Summary(output, target, drafter, how_to_name_a_drafter(read_target_config(folder)))


def _check_modalities(modalities: tuple[str, ...] | None) -> None:
    if modalities is not None and not {"text"} <= set(modalities) <= set(MODALITIES):
        expected = "text, or text with image or audio or both, with commas between them"
        raise OptionError(f"--modalities: expected {expected}, found {','.join(modalities)!r}")


def _plan(options: Options, folder: Path, output: Path) -> tuple[FolderPlan, FolderPlan | None]:
    config = read_target_config(folder)
    drafter_folder = _find_drafter(options, config)
    for source in (folder, drafter_folder):
        if source is not None and source.resolve().is_relative_to(output.resolve()):
            raise OutputError(f"{output}: would replace the checkpoint it is made from, {source}")
    if drafter_folder is None:
        return _plan_target(resolve_head(config), options), None
    drafter_config = read_drafter_config(drafter_folder)
    check_pair(config, drafter_config)
    config = resolve_head(config)
    return _plan_target(config, options), _plan_drafter(drafter_config, options.weights, config)


def _find_drafter(options: Options, config: TargetConfig) -> Path | None:
    if options.drafter == "none":
        return None
    if options.drafter != "auto":
        return resolve_folder(options.drafter)
    found = find_drafter(options.hf_path, config.path.parent)
    if found is None:
        _check_no_drafter(options.weights, f"but none was found; {how_to_name_a_drafter(config)}")
    return found


def _check_no_drafter(options: WeightOptions, found: str) -> None:
    """Raise OptionError for an option that means nothing without a drafter."""
    for flag, value in (("--drafter-q-bits", options.drafter_q_bits), ("--draft-vocab", options.draft_vocab)):
        if value is not None:
            raise OptionError(f"{flag}: expected a drafter with it, {found}")


def _plan_target(config: TargetConfig, options: Options) -> FolderPlan:
    source = config.path.parent
    _check_unquantized(config)
    tensors = read_checkpoint(source)
    target = Target(config.text)
    quantization = quantize_target(target, options.weights)
    dtype = options.weights.dtype or _own_dtype(config, tensors)
    conversions = _plan_conversions(
        target, source, tensors, partial(target_names, config=config), dtype, quantization, mlx_name
    )
    media = _media_parts(config, tensors, options.modalities)
    towers = _plan_media(media.values(), source, tensors, dtype, options.weights)
    shards = plan_shards(conversions + towers)
    tokenizer = _copies(source, *_TOKENIZER_FILES, f"{TEMPLATES_FOLDER}/*.jinja")
    if not {"tokenizer.json", "tokenizer.model"} & tokenizer.keys():
        raise TokenizerError(f"{source}: the folder has no tokenizer.json or tokenizer.model")
    check_tokenizer(source)
    fields = _target_fields(config, media.keys()) | _weight_fields(dtype, quantization, mlx_name, towers)
    for part in ("text_config", *(_MEDIA_FIELDS[modality] for modality in media)):
        fields[part] |= {"dtype": dtype}
    texts = {
        "config.json": json.dumps(fields, indent=4, sort_keys=True),
        INDEX_NAME: index_text(shards),
        "README.md": _model_card(options, source, has_pictures="image" in media),
    }
    copies = _copies(source, _GENERATION_CONFIG, *(_PROCESSOR_FILES if media else ()))
    return FolderPlan(shards, texts, tokenizer | copies)


class _MediaPart(NamedTuple):
    """A vision or audio model without weights, and the function from a tensor's name to the parameters it fills."""

    model: nn.Module
    names: Callable[[str], list[str]]


def _media_parts(
    config: TargetConfig, tensors: dict[str, TensorInfo], modalities: tuple[str, ...] | None
) -> dict[str, _MediaPart]:
    """Return the media parts to convert, by modality. A part that has no tensors does not count.

    Raises OptionError if the checkpoint lacks a modality that is asked for, and ConfigError if config.json does not
    describe the parts.
    """
    found: dict[str, _MediaPart] = {}
    if modalities != ("text",) and any(map(is_media, tensors)):
        try:
            media = read_media_config(config)
        except ConfigError as error:
            raise ConfigError(f"{error} (--modalities text leaves the media parts out)") from None
        if media.vision is not None:
            vision = vision_model(media.vision, media.hidden_size)
            found["image"] = _MediaPart(vision, partial(vision_names, config=media.vision))
        if media.audio is not None:
            audio = audio_model(media.audio, media.hidden_size)
            found["audio"] = _MediaPart(audio, partial(audio_names, config=media.audio))
        found = {modality: part for modality, part in found.items() if any(map(part.names, tensors))}
    for modality in modalities or ():
        if modality not in ("text", *found):
            known = ", ".join(("text", *found))
            raise OptionError(f"--modalities: {config.path.parent} has only {known}, found {modality}")
    return {modality: part for modality, part in found.items() if modalities is None or modality in modalities}


def _plan_media(
    parts: Iterable[_MediaPart], source: Path, tensors: dict[str, TensorInfo], dtype: str, options: WeightOptions
) -> list[Conversion]:
    """Return the conversions of media parts. Their names are the published ones without `model.`, as in mlx-vlm."""
    conversions = []
    for model, names in parts:
        quantization = quantize_media(model, options)
        conversions += _plan_conversions(model, source, tensors, names, dtype, quantization, str)
    return conversions


def _plan_drafter(config: DrafterConfig, options: WeightOptions, target: TargetConfig) -> FolderPlan:
    source = config.path.parent
    _check_unquantized(config)
    tensors = read_checkpoint(source)
    drafter = Drafter(config)
    quantization = quantize_drafter(drafter, config.num_centroids > 0, options.drafter_q_bits)
    dtype = options.dtype
    if dtype is None:
        by_default = config.num_centroids > 0 and options.drafter_q_bits is None
        dtype = "bfloat16" if by_default else _own_dtype(config, tensors)
    conversions = _plan_conversions(
        drafter, source, tensors, partial(drafter_names, config=config), dtype, quantization, str
    )
    fields = read_json(config.path) | _weight_fields(dtype, quantization, str)
    shards = {"model.safetensors": conversions}
    arrays = {}
    if options.draft_vocab is not None:
        ids = _draft_vocab(config, options.draft_vocab, options.draft_vocab_text, target)
        shards = {"model.safetensors": [_prune_head(conversion, ids) for conversion in conversions]}
        arrays = {"model-draft-vocab.safetensors": {"draft_vocab_ids": mx.array(ids)}}
        fields["draft_vocab_size"] = len(ids)
    # The drafter is one file of any size, because its layout has no index.
    texts = {"config.json": json.dumps(fields, indent=4, sort_keys=True)}
    return FolderPlan(shards, texts, _copies(source, _GENERATION_CONFIG), arrays)


def _draft_vocab(config: DrafterConfig, size: int, text: Path | None, target: TargetConfig) -> Ids:
    check_draft_vocab(config, size)
    texts: Iterator[list[int]] = iter(())
    if text is not None:
        tokenizer = load_tokenizer(target.path.parent, target.eos_token_ids)
        texts = (tokenizer.encode(line, add_special_tokens=False) for line in _texts(text))
    return choose_ids(texts, target.eos_token_ids, config.text.vocab_size, size)


def _texts(file: Path) -> Iterator[str]:
    """Yield the lines of a file. For a line of JSON, yield the strings in it instead."""
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--draft-vocab-text: {file}: cannot be read: {error}") from None
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = line
        yield from _strings(entry)


def _strings(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict | list):
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _strings(part)


def _prune_head(conversion: Conversion, ids: Ids) -> Conversion:
    """Limit the conversion of the drafter's head to these rows. Return any other conversion unchanged."""
    if conversion.name != "model.embed_tokens.weight":
        return conversion
    return replace(conversion, shape=(len(ids), *conversion.shape[1:]), rows=tuple(ids.tolist()))


def _copies(source: Path, *patterns: str) -> dict[str, Path]:
    """Return the source files that match the patterns, with their paths relative to the source as keys."""
    files = (file for pattern in patterns for file in sorted(source.glob(pattern)))
    return {str(file.relative_to(source)): file for file in files if file.is_file()}


def _check_unquantized(config: TargetConfig | DrafterConfig) -> None:
    if config.quantization is not None:
        raise ConfigError(
            f"{config.path}: the checkpoint is quantized already ({config.quantization.bits} bits): "
            "expected an unquantized one"
        )


def _own_dtype(config: TargetConfig | DrafterConfig, tensors: dict[str, TensorInfo]) -> str:
    """Return the checkpoint's dtype from its config, or else the common type of all its float tensors.

    Raises ConfigError if the config names another type, or if the tensors have no common type.
    """
    if config.dtype in WEIGHT_DTYPES:
        return config.dtype
    if config.dtype is not None:
        expected = ", ".join(WEIGHT_DTYPES)
        raise ConfigError(
            f"{config.path}: field dtype must be one of {expected}, found {config.dtype}; choose with --dtype"
        )
    found = {dtype_name(DTYPES[tensor.dtype].mlx) for tensor in tensors.values() if tensor.dtype in FLOAT_TYPES}
    if len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise ConfigError(f"{config.path}: field dtype is missing, and the tensors' are {names}; choose with --dtype")
    return found.pop()


def _plan_conversions(
    module: nn.Module,
    source: Path,
    tensors: dict[str, TensorInfo],
    names: Callable[[str], list[str]],
    dtype: str,
    quantization: Quantization | None,
    rename: Callable[[str], str],
) -> list[Conversion]:
    """Return a conversion for each parameter of the module, in the module's order, with names from `rename`.

    A convolution keeps the order of its channels, and a scalar its type.

    Raises WeightsError if a tensor is missing or unexpected, or has a wrong shape or a type that cannot be converted.
    """
    parameters = lazy_parameters(module)
    shapes = {name: array.shape for name, array in parameters.items()}
    quantized = parameter_quantization(module, quantization)
    matched = match_tensors(source, tensors, names, shapes)
    for key in channels_second(module, tensors, matched, parameters):
        shapes[matched[key][0]] = tensors[key].shape
    conversions = {}
    for key, filled in matched.items():
        for part, name in enumerate(filled):
            # These parameters hold token ids, not weights. MLX uses int32 for indices.
            is_index = name.endswith(("token_ordering", "draft_vocab_ids"))
            check_shape(source, key, tensors[key].shape, shapes[name], len(filled))
            _check_type(source, key, tensors[key], is_index)
            kept = DTYPES[tensors[key].dtype].mlx if shapes[name] == () else getattr(mx, dtype)
            stored = mx.int32 if is_index else kept
            conversions[name] = Conversion(
                rename(name), tensors[key], shapes[name], stored, quantized.get(name), part, len(filled)
            )
    return [conversions[name] for name in shapes]


def _check_type(source: Path, key: str, tensor: TensorInfo, is_index: bool) -> None:
    dtypes = (*INTEGER_TYPES, *FLOAT_TYPES) if is_index else FLOAT_TYPES
    if tensor.dtype not in dtypes:
        raise WeightsError(f"{source}: tensor {key} has type {tensor.dtype}, expected one of {', '.join(dtypes)}")
    if is_index:
        arrays: dict[str, mx.array] = mx.load(str(tensor.file))  # type: ignore[assignment]
        token_ids(source, key, arrays[key])


def _weight_fields(
    dtype: str, quantization: Quantization | None, rename: Callable[[str], str], media: Iterable[Conversion] = ()
) -> dict[str, Any]:
    """Return the fields of config.json that describe the weights, in mlx-lm's format.

    `media` are the conversions of media parts. Those that are quantized otherwise than most weights are named.
    """
    if quantization is None:
        return {"dtype": dtype}
    default = _parameters(quantization)
    overrides = {rename(path): _parameters(choice) for path, choice in quantization.overrides.items() if choice}
    for conversion in media:
        if conversion.quantization is not None and (chosen := _parameters(conversion.quantization)) != default:
            overrides[conversion.name.removesuffix(".weight")] = chosen
    fields = default | overrides
    return {"dtype": dtype, "quantization": fields, "quantization_config": fields}


def _parameters(quantization: Quantization) -> dict[str, Any]:
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}


def _target_fields(config: TargetConfig, modalities: Iterable[str]) -> dict[str, Any]:
    """Return the fields of the target's config.json, with the names that published checkpoints use.

    Each field for which mlx-lm has its own default value is present. `modalities` are those of the media parts that
    are kept.
    """
    fields = read_json(config.path)
    if config.model_type in _TEXT_ONLY_TYPES:
        kept = ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings", "transformers_version")
        fields = {name: fields[name] for name in kept if name in fields} | {"text_config": fields}
    kept_parts = {_MEDIA_FIELDS[modality] for modality in modalities}
    dropped = {"torch_dtype", "_name_or_path", *_MEDIA_FIELDS.values()} - kept_parts
    fields = {name: value for name, value in fields.items() if name not in dropped}
    for part in kept_parts:
        fields[part] = {name: value for name, value in fields[part].items() if name != "torch_dtype"}
    fields["model_type"] = _TEXT_ONLY_TYPES.get(config.model_type, config.model_type)
    fields["vocab_size"] = config.text.vocab_size
    text = {
        name: value for name, value in fields["text_config"].items() if name not in ("per_layer_config", "torch_dtype")
    }
    fields["text_config"] = text | _published_fields(config)
    # mlx-lm reads the field in text_config, transformers reads the field at the top level.
    for place in (fields, fields["text_config"]):
        place["tie_word_embeddings"] = not config.text.own_head
    return fields


def _published_fields(config: TargetConfig) -> dict[str, Any]:
    text = config.text
    sliding, full = (_attention(config, text, layer_type) for layer_type in ("sliding_attention", "full_attention"))
    k_eq_v = full[2]
    if not k_eq_v and sliding[1] != full[1]:
        raise ConfigError(
            f"{config.path}: field per_layer_config must give full-attention layers the {sliding[1]} K/V heads of the "
            f"others, found {full[1]}"
        )
    fields: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "head_dim": sliding[0],
        "global_head_dim": full[0],
        "num_key_value_heads": sliding[1],
        "num_global_key_value_heads": full[1] if k_eq_v else None,
        "num_kv_shared_layers": sum(not layer.has_kv for layer in text.layers),
        "hidden_size_per_layer_input": text.per_layer_input_size,
        "enable_moe_block": text.num_experts > 0,
    }
    if text.num_experts:
        fields |= {
            "num_experts": text.num_experts,
            "top_k_experts": text.top_k_experts,
            "moe_intermediate_size": text.moe_intermediate_size,
        }
    if text.per_layer_input_size:
        fields["vocab_size_per_layer_input"] = text.per_layer_vocab_size
    return fields


def _attention(config: TargetConfig, text: TextConfig, layer_type: str) -> tuple[int, int, bool]:
    """Return the head size, the number of K/V heads, and whether keys equal values, for all layers of one type."""
    shapes = {
        (layer.head_dim, layer.num_kv_heads, layer.k_eq_v) for layer in text.layers if layer.layer_type == layer_type
    }
    if len(shapes) > 1:
        raise ConfigError(
            f"{config.path}: field per_layer_config must be alike for all {layer_type} layers, found {sorted(shapes)}"
        )
    return shapes.pop()


def _license(readme: Path) -> str | None:
    """Return the license from the source's model card, or None if the card has none.

    If the card cannot be read, log a warning and return None: the conversion does not need the license.
    """
    from huggingface_hub import ModelCard

    if not readme.is_file():
        return None
    try:
        text = readme.read_text(encoding="utf-8-sig", errors="replace")
        found = ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("license")
    # YAML can fail with many kinds of exceptions, and can hold any data.
    except Exception as error:
        logger.warning("%s: its license is not copied: %s", readme, " ".join(str(error).split()))
        return None
    return found if isinstance(found, str) else None


def _model_card(options: Options, source: Path, *, has_pictures: bool) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=None if Path(options.hf_path).exists() else options.hf_path,
        library_name="mlx",
        license=_license(source / "README.md"),
        pipeline_tag="image-text-to-text" if has_pictures else "text-generation",
        tags=["mlx"],
    )
    name = options.upload_repo or options.mlx_path.name
    return f"""---
{data.to_yaml()}
---

# {name}

{Path(options.hf_path).name} in MLX format, for mlx-mtp and mlx-lm. Its drafter for
speculative decoding, if it has one, is in `{DRAFTER_FOLDER}/`.

```bash
python -m mlx_mtp.generate --model {name} --prompt "Hello"
```
"""


def _check_disk(output: Path, needed: int) -> None:
    parent = existing_parent(output)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OutputError(f"{output}: needs {needed:,} bytes, found {free:,} free on the disk of {parent}")


def _write(folder: Path, plan: FolderPlan, block_bytes: int, advance: Callable[[int], object]) -> None:
    for name, shard in plan.shards.items():
        write_shard(folder / name, shard, block_bytes, advance)
    for name, arrays in plan.arrays.items():
        mx.save_safetensors(str(folder / name), arrays, metadata={"format": "mlx"})
    for name, text in plan.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, file in plan.copies.items():
        (folder / name).parent.mkdir(exist_ok=True)
        # The copy has no byte order mark, because other readers of JSON and templates do not expect it.
        (folder / name).write_bytes(file.read_bytes().removeprefix(BYTE_ORDER_MARK))


def _check_repo_id(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"--upload-repo: expected a hub repository's id, found {repo}: {error}") from None


def _upload(folder: Path, repo: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HubError(f"{repo}: upload failed, the converted model is in {folder}: {reason}") from error
