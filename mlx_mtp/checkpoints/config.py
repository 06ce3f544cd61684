"""Typed configurations of a checkpoint folder. Only this module reads `config.json`.

Two spellings of the same model are accepted: the published spelling (`global_head_dim`, `num_global_key_value_heads`),
and the spelling of transformers when it saves a model again (`per_layer_config`). If a field decides a tensor's shape
and is missing, that is an error. The field never gets a default.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_mtp.errors import ConfigError

from .fields import Fields, as_number
from .files import check_links, fault, read_text

logger = logging.getLogger(__name__)

LayerType = Literal["sliding_attention", "full_attention"]
DraftPosition = Literal["bonus", "last"]

TARGET_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
LAYER_TYPES: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
DRAFT_POSITIONS: tuple[DraftPosition, ...] = ("bonus", "last")
# The files of a checkpoint that the package reads.
_CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "model*.safetensors*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)

# Fields of generation_config.json that would change the text but are not supported, with the values that change
# nothing.
_IGNORED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding of one layer type: `theta`, and the fraction of the head that is rotated."""

    theta: float
    rotated_fraction: float


@dataclass(frozen=True)
class LayerConfig:
    """The settings that differ between the layers of one decoder.

    `kv_layer` is the index of the layer whose K/V this layer attends to: its own index, or the index of an earlier
    layer if K/V are shared.
    """

    layer_type: LayerType
    head_dim: int
    num_kv_heads: int
    k_eq_v: bool
    has_kv: bool
    kv_layer: int
    intermediate_size: int


@dataclass(frozen=True)
class TextConfig:
    """A text decoder: the target's, or the drafter's (whose layers own no K/V).

    `own_head` is true if the output head is not the embedding. The weights decide this, not config.json: see
    `layouts.resolve_head`.
    """

    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float
    sliding_window: int
    max_position_embeddings: int
    final_logit_softcapping: float | None
    layers: tuple[LayerConfig, ...]
    rope: dict[LayerType, RopeConfig]
    per_layer_input_size: int
    per_layer_vocab_size: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    # The repr of a config is part of a model's fingerprint. It leaves this field out: a head has a parameter of its
    # own.
    own_head: bool = field(default=False, repr=False)

    def last_kv_layer(self, layer_type: LayerType) -> int:
        """Return the index of the last layer of this type that owns K/V; the drafter reads its K/V."""
        return max(i for i, layer in enumerate(self.layers) if layer.has_kv and layer.layer_type == layer_type)


@dataclass(frozen=True)
class Quantization:
    """The MLX quantization of a checkpoint: the default, and overrides by the module's name in the config.

    An override is a set of parameters, or False for a module that is not quantized.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    overrides: dict[str, "Quantization | Literal[False]"] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling of the model's makers (`generation_config.json`), as transformers reads it.

    The temperature is 0 without `do_sample`. There are no filters if the checkpoint names none. `top_p` 0 keeps only
    the most likely token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class TargetConfig:
    """A target checkpoint's `config.json`, with the stop ids and sampling of its `generation_config.json`.

    `suppress_tokens` also comes from `generation_config.json`. It holds the ids in the vocabulary that the model never
    generates, with any options. `is_tied` is `tie_word_embeddings` of the top level, as in transformers.
    """

    path: Path
    model_type: str
    text: TextConfig
    quantization: Quantization | None
    eos_token_ids: tuple[int, ...]
    sampling: SamplingDefaults
    dtype: str | None
    suppress_tokens: tuple[int, ...] = ()
    is_tied: bool = True


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter ("assistant") checkpoint's `config.json`.

    `num_centroids` is 0 for a dense head. `draft_vocab_size` is the number of tokens that a dense head can draft, or 0
    for the whole vocabulary. `draft_position` is the position that all draft steps of a round share: `bonus` is the
    index of the bonus token (as in transformers), and `last` is one less (as in some other engines).
    """

    path: Path
    model_type: str
    text: TextConfig
    backbone_hidden_size: int
    num_centroids: int
    centroid_top_k: int
    draft_position: DraftPosition
    quantization: Quantization | None
    dtype: str | None
    draft_vocab_size: int = 0


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises ConfigError if the file is missing or unreadable, or does not hold an object.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: no such folder")
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise ConfigError(f"{path.parent}: the folder has no {path.name}") from None
        raise ConfigError(f"{path}: cannot be read as JSON: {fault(path) or error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_target_config(folder: Path) -> TargetConfig:
    """Read the target configuration of a checkpoint folder.

    Raises ConfigError if the file is missing or incomplete, or does not describe a Gemma 4 target.
    """
    root = _read_config(folder, TARGET_TYPES, "target")
    text = _text_fields(root)
    vocab_size = _vocab_size(root, text)
    generation = _read_generation_config(folder / "generation_config.json")
    return TargetConfig(
        path=root.path,
        model_type=root.string("model_type"),
        text=_read_text(text, vocab_size, shares_all=False),
        quantization=_read_quantization(root),
        eos_token_ids=_read_eos(generation, root, text),
        sampling=_read_sampling(generation),
        dtype=_read_dtype(root, text),
        suppress_tokens=tuple(i for i in _read_ids(generation, "suppress_tokens") if i < vocab_size),
        is_tied=root.boolean("tie_word_embeddings") if "tie_word_embeddings" in root else True,
    )


def read_drafter_config(folder: Path) -> DrafterConfig:
    """Read the drafter configuration of a checkpoint folder.

    Raises ConfigError if the file is missing or incomplete, or does not describe a Gemma 4 assistant.
    """
    root = _read_config(folder, DRAFTER_TYPES, "drafter")
    text = _text_fields(root)
    vocab_size = _vocab_size(root, text)
    num_centroids = top_k = 0
    if root.boolean("use_ordered_embeddings"):
        num_centroids = root.integer("num_centroids")
        top_k = root.integer("centroid_intermediate_top_k")
        if vocab_size % num_centroids:
            raise root.error("num_centroids", f"must divide the vocabulary of {vocab_size}, found {num_centroids}")
        if top_k > num_centroids:
            raise root.error("centroid_intermediate_top_k", f"must be at most {num_centroids}, found {top_k}")
    position = root.values["draft_position"] if "draft_position" in root else "bonus"
    if position not in DRAFT_POSITIONS:
        raise root.error("draft_position", f"must be one of {', '.join(DRAFT_POSITIONS)}, found {position!r}")
    draft_vocab_size = root.integer("draft_vocab_size", 0) if "draft_vocab_size" in root else 0
    if draft_vocab_size > (0 if num_centroids else vocab_size):
        expected = "be absent with use_ordered_embeddings" if num_centroids else f"be at most {vocab_size}"
        raise root.error("draft_vocab_size", f"must {expected}, found {draft_vocab_size}")
    config = _read_text(text, vocab_size, shares_all=True)
    if config.per_layer_input_size or config.num_experts:
        raise ConfigError(f"{root.path}: a drafter with per-layer inputs or experts is not supported")
    return DrafterConfig(
        path=root.path,
        model_type=root.string("model_type"),
        text=config,
        backbone_hidden_size=root.integer("backbone_hidden_size"),
        num_centroids=num_centroids,
        centroid_top_k=top_k,
        draft_position=position,
        quantization=_read_quantization(root),
        dtype=_read_dtype(root, text),
        draft_vocab_size=draft_vocab_size,
    )


def _read_config(folder: Path, supported: tuple[str, ...], role: str) -> Fields:
    path = folder / "config.json"
    check_links(folder, _CHECKPOINT_FILES)
    root = Fields(read_json(path), path)
    model_type = root.string("model_type")
    if model_type in supported:
        return root
    hint = ""
    if model_type in DRAFTER_TYPES:
        hint = "; this is a drafter, pass it with --drafter"
    elif model_type in TARGET_TYPES:
        hint = "; this is a target, not a drafter"
    raise root.error("model_type", f"must be a Gemma 4 {role}'s ({', '.join(supported)}), found {model_type!r}{hint}")


def _text_fields(root: Fields) -> Fields:
    return root.object("text_config") if "text_config" in root else root


def _vocab_size(root: Fields, text: Fields) -> int:
    """Return the vocabulary size of the text config or the top level. If both give a size, they must agree."""
    sizes = {fields.integer("vocab_size") for fields in (root, text) if "vocab_size" in fields}
    if len(sizes) > 1:
        raise root.error("vocab_size", f"and {text.prefix}vocab_size disagree: {sorted(sizes)}")
    return sizes.pop() if sizes else text.integer("vocab_size")


def _read_text(text: Fields, vocab_size: int, *, shares_all: bool) -> TextConfig:
    _reject_unsupported(text, is_drafter=shares_all)
    # transformers' unified text config has no field for per-layer inputs or experts. They are lost when it saves a
    # model again.
    unified = "model_type" in text and "unified" in text.string("model_type")
    per_layer = 0 if unified and "hidden_size_per_layer_input" not in text else _per_layer_size(text)
    moe = not (unified and "enable_moe_block" not in text) and text.boolean("enable_moe_block")
    num_experts = text.integer("num_experts") if moe else 0
    top_k = text.integer("top_k_experts") if moe else 0
    if top_k > num_experts:
        raise text.error("top_k_experts", f"must be at most the {num_experts} experts, found {top_k}")
    softcap = text.require("final_logit_softcapping")
    return TextConfig(
        hidden_size=text.integer("hidden_size"),
        num_attention_heads=text.integer("num_attention_heads"),
        vocab_size=vocab_size,
        rms_norm_eps=text.number("rms_norm_eps"),
        sliding_window=text.integer("sliding_window"),
        max_position_embeddings=text.integer("max_position_embeddings"),
        final_logit_softcapping=None if softcap is None else text.number("final_logit_softcapping"),
        layers=_read_layers(text, shares_all=shares_all),
        rope=_read_rope(text),
        per_layer_input_size=per_layer,
        per_layer_vocab_size=text.integer("vocab_size_per_layer_input") if per_layer else 0,
        num_experts=num_experts,
        top_k_experts=top_k,
        moe_intermediate_size=text.integer("moe_intermediate_size") if moe else 0,
    )


def _per_layer_size(text: Fields) -> int:
    return 0 if text.require("hidden_size_per_layer_input") is None else text.integer("hidden_size_per_layer_input", 0)


def _reject_unsupported(text: Fields, *, is_drafter: bool) -> None:
    """Raise ConfigError for a variation that no Gemma 4 checkpoint has and that would give wrong results silently."""
    supported: dict[str, tuple[Any, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        # The weights decide whether a target has a head of its own.
        "tie_word_embeddings": (True,) if is_drafter else (True, False),
        "use_bidirectional_attention": ("vision",),
    }
    for name, values in supported.items():
        text.expect(name, values)


def _read_layers(text: Fields, *, shares_all: bool) -> tuple[LayerConfig, ...]:
    count = text.integer("num_hidden_layers")
    types: list[LayerType] = text.require("layer_types")
    if not isinstance(types, list) or len(types) != count or not all(t in LAYER_TYPES for t in types):
        raise text.error("layer_types", f"must name {count} layers, each {' or '.join(LAYER_TYPES)}, found {types!r}")
    if types[-1] != "full_attention":
        raise text.error("layer_types", f"must end with full_attention, found {types[-1]!r}")
    shared = count if shares_all else text.integer("num_kv_shared_layers", 0)
    if shared > count:
        raise text.error("num_kv_shared_layers", f"must be at most {count}, found {shared}")
    owners = types[: count - shared]
    if not shares_all and set(owners) != set(LAYER_TYPES):
        raise text.error("num_kv_shared_layers", f"leaves no K/V of each layer type: {shared} of {count} layers")
    k_eq_v = text.boolean("attention_k_eq_v")
    double_wide = text.boolean("use_double_wide_mlp")
    width, heads = text.integer("intermediate_size"), text.integer("num_attention_heads")
    layers = []
    for index, layer_type in enumerate(types):
        head_dim, kv_heads = _attention_shape(text, index, layer_type, k_eq_v)
        if heads % kv_heads:
            raise text.error("num_attention_heads", f"must be a multiple of the {kv_heads} K/V heads, found {heads}")
        has_kv = index < count - shared
        # A drafter's layers read the target's K/V, so they have no source inside the drafter.
        source = index if has_kv or shares_all else max(i for i, t in enumerate(owners) if t == layer_type)
        layers.append(
            LayerConfig(
                layer_type=layer_type,
                head_dim=head_dim,
                num_kv_heads=kv_heads,
                k_eq_v=k_eq_v and layer_type == "full_attention",
                has_kv=has_kv,
                kv_layer=source,
                intermediate_size=width * (2 if double_wide and not has_kv and not shares_all else 1),
            )
        )
    return tuple(layers)


def _attention_shape(text: Fields, index: int, layer_type: LayerType, k_eq_v: bool) -> tuple[int, int]:
    """Return head size and number of K/V heads of one layer, from either spelling of full-attention layers."""
    head_dim, kv_heads = text.integer("head_dim"), text.integer("num_key_value_heads")
    if "per_layer_config" in text:
        per_layer = text.object("per_layer_config")
        # Keys are layer indices, with or without leading zeros.
        keys = [key for key in per_layer.values if key.isdigit() and int(key) == index]
        if not keys:
            return head_dim, kv_heads
        entry = per_layer.object(keys[0])
        return (
            entry.integer("head_dim") if "head_dim" in entry else head_dim,
            entry.integer("num_key_value_heads") if "num_key_value_heads" in entry else kv_heads,
        )
    if layer_type == "sliding_attention":
        return head_dim, kv_heads
    if "global_head_dim" not in text:
        raise text.error("global_head_dim", "is missing, and so is per_layer_config")
    if k_eq_v and text.require("num_global_key_value_heads") is not None:
        kv_heads = text.integer("num_global_key_value_heads")
    return text.integer("global_head_dim"), kv_heads


def _read_rope(text: Fields) -> dict[LayerType, RopeConfig]:
    parameters = text.object("rope_parameters")
    rope: dict[LayerType, RopeConfig] = {}
    for layer_type in LAYER_TYPES:
        fields = parameters.object(layer_type)
        kind = fields.string("rope_type")
        if kind not in ("default", "proportional"):
            raise fields.error("rope_type", f"must be default or proportional, found {kind!r}")
        fraction = fields.number("partial_rotary_factor") if kind == "proportional" else 1.0
        if fraction > 1:
            raise fields.error("partial_rotary_factor", f"must be at most 1, found {fraction}")
        rope[layer_type] = RopeConfig(fields.number("rope_theta"), fraction)
    return rope


def _read_quantization(root: Fields) -> Quantization | None:
    name = "quantization" if "quantization" in root else "quantization_config"
    if name not in root:
        return None
    fields = root.object(name)
    if "quant_method" in fields:
        method = fields.values["quant_method"]
        raise root.error(name, f"is {method!r}, which MLX cannot read; convert the unquantized checkpoint instead")
    default = _read_quantization_entry(fields)
    overrides: dict[str, Quantization | Literal[False]] = {}
    for key, value in fields.values.items():
        if isinstance(value, dict):
            overrides[key] = _read_quantization_entry(fields.object(key))
        elif value is False:
            overrides[key] = False
    return Quantization(default.group_size, default.bits, default.mode, overrides)


def _read_quantization_entry(fields: Fields) -> Quantization:
    mode = fields.string("mode") if "mode" in fields else "affine"
    return Quantization(fields.integer("group_size"), fields.integer("bits"), mode)


def _read_generation_config(path: Path) -> Fields:
    """Read the fields of `generation_config.json`.

    All fields are optional, so a file that cannot be read only gives a warning.
    """
    values: dict[str, Any] = {}
    if path.is_file():
        try:
            values = read_json(path)
        except ConfigError as error:
            logger.warning("%s; the defaults are used", error)
    ignored = [name for name, neutral in _IGNORED.items() if values.get(name) not in (None, [], {}, *neutral)]
    if ignored:
        logger.warning("%s: not honoured: %s", path, ", ".join(f"{name} {values[name]!r:.40}" for name in ignored))
    return Fields(values, path)


def _read_eos(generation: Fields, root: Fields, text: Fields) -> tuple[int, ...]:
    """Return the stop ids of `generation_config.json`, or else of `config.json`.

    Only `generation_config.json` lists all stop ids.
    """
    for fields in (generation, root, text):
        ids = _read_ids(fields, "eos_token_id")
        if ids:
            return ids
    raise root.error("eos_token_id", "is missing or names no token, and so it is in generation_config.json")


def _read_sampling(generation: Fields) -> SamplingDefaults:
    none = SamplingDefaults()

    def number(name: str, default: float, is_valid: Callable[[float], bool]) -> float:
        value = generation.values.get(name)
        if value is None:
            return default
        found = as_number(value)
        if found is None or not is_valid(found):
            logger.warning("%s: field %s cannot be used, found %r: %s is taken", generation.path, name, value, default)
            return default
        return found

    samples = generation.values.get("do_sample") in (True, "true", "True")
    temperature = number("temperature", 1.0, lambda x: x >= 0)
    # Zero and negative numbers mean no filter.
    top_k = number("top_k", none.top_k, float.is_integer)
    return SamplingDefaults(
        temperature=temperature if samples else 0.0,
        top_k=max(0, int(top_k)),
        top_p=number("top_p", none.top_p, lambda x: 0 <= x <= 1),
        min_p=number("min_p", none.min_p, lambda x: 0 <= x <= 1),
        repetition_penalty=number("repetition_penalty", none.repetition_penalty, lambda x: x > 0),
    )


def _read_ids(fields: Fields, name: str) -> tuple[int, ...]:
    """Return the token ids of a field that holds one id, a list of ids, or nothing.

    A value that is no id is left out with a warning.
    """
    value = fields.values.get(name)
    ids = []
    for item in value if isinstance(value, list) else [value]:
        number = as_number(item)
        if number is not None and number >= 0 and number.is_integer():
            ids.append(int(number))
        elif item is not None:
            logger.warning("%s: field %s must hold token ids, found %r, which is left out", fields.path, name, item)
    return tuple(dict.fromkeys(ids))


def _read_dtype(root: Fields, text: Fields) -> str | None:
    for fields in (root, text):
        for name in ("dtype", "torch_dtype"):
            if name in fields:
                return fields.string(name)
    return None
