"""The layouts of published checkpoints: which tensor names a folder has, and which parameters they fill.

The layouts of Hugging Face, mlx-lm and mlx-vlm have different names. `target_names` and `drafter_names` map all of them
to the parameter names of `Target` and `Drafter`. `vision_names` and `audio_names` do it for the media parts.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from mlx_mtp.errors import WeightsError

from .config import DrafterConfig, TargetConfig
from .media_config import AudioConfig, UnifiedAudioConfig, UnifiedVisionConfig, VisionConfig
from .tensors import have_equal_content, read_checkpoint

logger = logging.getLogger(__name__)

# mlx-lm's prefix of the parameter names of a Gemma 4 target, in files and in quantization overrides. The parameters of
# a head of its own do not have this prefix.
MLX_PREFIX = "language_model.model."

_VISION = ("vision_tower.", "embed_vision.", "vision_embedder.")
_AUDIO = ("audio_tower.", "embed_audio.")
_OTHER_MODALITIES = (*_VISION, *_AUDIO, "multi_modal_projector.")
# The bounds of the towers' clipped layers, and cached rotary tables.
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
_ROTARY_TABLE = "rotary_emb"
_UNUSED = (*_BOUNDS, _ROTARY_TABLE)
_HEAD = "lm_head."
_EMBEDDING = "embed_tokens."
_KV_MODULES = ("self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm.", "self_attn.v_norm.")


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
        {name.removeprefix(prefix): info for name, info in named.items() if name.startswith(prefix)}
        for prefix in (_HEAD, _EMBEDDING)
    )
    if not head:
        if not config.is_tied:
            raise WeightsError(
                f"{folder}: tensor lm_head.weight is missing, but tie_word_embeddings is false in {config.path.name}: "
                "expected a head of its own"
            )
        return config
    own_head = head.keys() != embedding.keys() or not all(
        have_equal_content(head[name], embedding[name]) for name in head
    )
    if own_head and config.is_tied:
        logger.warning(
            "%s: tie_word_embeddings is true, but lm_head.weight is not the embedding: lm_head.weight is used", folder
        )
    return replace(config, text=replace(config.text, own_head=own_head))


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


def is_media(key: str) -> bool:
    """Return whether a checkpoint's tensor belongs to a media part."""
    return plain_name(key).startswith((*_VISION, *_AUDIO))


def vision_names(key: str, config: VisionConfig | UnifiedVisionConfig) -> list[str]:
    """Return the parameter names of the vision model that a checkpoint's tensor fills; [] if it is not used."""
    return _media_names(key, _VISION, clips=isinstance(config, VisionConfig) and config.use_clipped_linears)


def audio_names(key: str, config: AudioConfig | UnifiedAudioConfig) -> list[str]:
    """Return the parameter names of the audio model that a checkpoint's tensor fills; [] if it is not used."""
    return _media_names(key, _AUDIO, clips=isinstance(config, AudioConfig) and config.use_clipped_linears)


def _media_names(key: str, parts: tuple[str, ...], *, clips: bool) -> list[str]:
    name = plain_name(key)
    is_unused = _ROTARY_TABLE in name or (name.endswith(_BOUNDS) and not clips)
    return [name] if name.startswith(parts) and not is_unused else []


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


def check_shape(folder: Path, key: str, found: tuple[int, ...], shape: tuple[int, ...], parts: int) -> None:
    """Raise WeightsError unless a tensor of shape `found` fills `parts` parameters of shape `shape`."""
    expected = [*shape[:-2], shape[-2] * parts, shape[-1]] if parts > 1 else list(shape)
    if list(found) != expected:
        raise WeightsError(f"{folder}: tensor {key} has shape {list(found)}, expected {expected} from config.json")
