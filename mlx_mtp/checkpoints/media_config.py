"""The typed configuration of the media parts of a target: images and sound.

A config.json with media has the objects `vision_config` and `audio_config`, each of which may be null. E2B, E4B, 26B
and 31B have towers. The 12B model ("unified") has none: it embeds pixels and samples directly.
"""

from dataclasses import dataclass
from typing import Any

from .config import TargetConfig, read_json
from .fields import Fields

# The log-mel spectrum of a sound has this number of bins.
MEL_BINS = 128
# The published configs of 26B and 31B leave out these fields, and transformers then takes these values. All published
# towers have them. The size of the position table is compared with the tensor, as all sizes are.
_LEFT_OUT: dict[str, Any] = {
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower of E2B, E4B, 26B and 31B.

    `patch_size` is in pixels, and `pooling_kernel_size` in patches: so many patches, squared, make a token.
    `position_embedding_size` is the largest number of patches in a row or a column of a picture.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    rms_norm_eps: float
    rope_theta: float
    standardize: bool
    use_clipped_linears: bool


@dataclass(frozen=True)
class UnifiedVisionConfig:
    """The vision embedder of 12B. A patch of `patch_size` pixels, squared, makes a token.

    This is `model_patch_size` in config.json, which has smaller patches under the name `patch_size`.
    """

    embed_dim: int
    position_embedding_size: int
    patch_size: int
    rms_norm_eps: float


@dataclass(frozen=True)
class AudioConfig:
    """The audio tower of E2B and E4B.

    `context` is the number of rows that a row attends to, its own included. `residual_weight` is the factor of the
    feed-forward blocks. Activations are clipped to `activation_limit` (`gradient_clipping` in config.json).
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    conv_channels: tuple[int, int]
    conv_kernel_size: int
    context: int
    logit_cap: float
    residual_weight: float
    activation_limit: float
    output_size: int
    rms_norm_eps: float
    use_clipped_linears: bool


@dataclass(frozen=True)
class UnifiedAudioConfig:
    """The audio embedder of 12B. `samples_per_token` samples make a token."""

    samples_per_token: int
    rms_norm_eps: float


@dataclass(frozen=True)
class MediaIds:
    """The ids of the placeholders of media, and of the tokens before and after them.

    The ids of a modality that the checkpoint lacks are None. So is `video`, if config.json does not give it.
    """

    image: int | None = None
    image_start: int | None = None
    image_end: int | None = None
    video: int | None = None
    audio: int | None = None
    audio_start: int | None = None
    audio_end: int | None = None


@dataclass(frozen=True)
class MediaConfig:
    """The media parts of a target. A part is None if config.json does not describe it.

    `hidden_size` is the width of the text decoder, and so of the features. With `sees_both_ways`, the rows of a picture
    see each other in both directions in sliding layers (`use_bidirectional_attention` of the text decoder).
    """

    hidden_size: int
    sees_both_ways: bool
    vision: VisionConfig | UnifiedVisionConfig | None
    audio: AudioConfig | UnifiedAudioConfig | None
    ids: MediaIds


def read_media_config(target: TargetConfig) -> MediaConfig:
    """Read the media parts of a target's config.json.

    Raises ConfigError if the file is incomplete, or describes a part that is not supported.
    """
    root = Fields(read_json(target.path), target.path)
    unified = target.model_type.startswith("gemma4_unified")
    vision: VisionConfig | UnifiedVisionConfig | None = None
    audio: AudioConfig | UnifiedAudioConfig | None = None
    if "vision_config" in root:
        fields = _media_fields(root, "vision", unified)
        vision = _read_unified_vision(fields) if unified else _read_vision(fields)
    if "audio_config" in root:
        fields = _media_fields(root, "audio", unified)
        audio = _read_unified_audio(fields) if unified else _read_audio(fields)
    ids = _read_ids(root, target.text.vocab_size, has_vision=vision is not None, has_audio=audio is not None)
    text = root.object("text_config") if "text_config" in root else root
    return MediaConfig(
        hidden_size=target.text.hidden_size,
        sees_both_ways="use_bidirectional_attention" in text,
        vision=vision,
        audio=audio,
        ids=ids,
    )


def _media_fields(root: Fields, modality: str, unified: bool) -> Fields:
    fields = root.object(f"{modality}_config")
    fields.expect("model_type", (f"gemma4_unified_{modality}" if unified else f"gemma4_{modality}",))
    return fields


def _read_vision(given: Fields) -> VisionConfig:
    fields = Fields(_LEFT_OUT | given.values, given.path, given.prefix)
    fields.expect("hidden_activation", ("gelu_pytorch_tanh",))
    fields.expect("attention_bias", (False,))
    rope = fields.object("rope_parameters")
    # Both types are the same rotation, by column and by row.
    rope.expect("rope_type", ("default", "axial"))
    heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    _check_multiple(fields, "num_attention_heads", kv_heads, "K/V heads")
    head_dim = fields.integer("head_dim")
    _check_multiple(fields, "head_dim", 4, "values that two pairs need")
    return VisionConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        patch_size=fields.integer("patch_size"),
        pooling_kernel_size=fields.integer("pooling_kernel_size"),
        position_embedding_size=fields.integer("position_embedding_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope.number("rope_theta"),
        standardize=fields.boolean("standardize"),
        use_clipped_linears=fields.boolean("use_clipped_linears"),
    )


def _read_unified_vision(fields: Fields) -> UnifiedVisionConfig:
    embed_dim = fields.integer("mm_embed_dim")
    patch_size = fields.integer("patch_size") * fields.integer("pooling_kernel_size")
    fields.expect("model_patch_size", (patch_size,))
    # The projection takes the embedder's output as it is.
    fields.expect("output_proj_dims", (embed_dim,))
    return UnifiedVisionConfig(
        embed_dim=embed_dim,
        position_embedding_size=fields.integer("mm_posemb_size"),
        patch_size=patch_size,
        rms_norm_eps=fields.number("rms_norm_eps"),
    )


def _read_audio(fields: Fields) -> AudioConfig:
    context = fields.integer("attention_context_left", 2) - 1
    fields.expect("hidden_act", ("silu",))
    fields.expect("attention_context_right", (0,))
    # The reference computes in chunks. With chunks of another size, its distances between rows would be shifted.
    fields.expect("attention_chunk_size", (context,))
    heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    _check_multiple(fields, "hidden_size", 2 * heads, "values of two for each head")
    return AudioConfig(
        hidden_size=hidden_size,
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        conv_channels=_read_channels(fields),
        conv_kernel_size=fields.integer("conv_kernel_size"),
        context=context,
        logit_cap=fields.number("attention_logit_cap"),
        residual_weight=fields.number("residual_weight"),
        activation_limit=fields.number("gradient_clipping"),
        output_size=fields.integer("output_proj_dims"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        use_clipped_linears=fields.boolean("use_clipped_linears"),
    )


def _read_channels(fields: Fields) -> tuple[int, int]:
    """Return the channels of the two convolutions. The first number is also that of mel bins, as in the reference."""
    name = "subsampling_conv_channels"
    value = fields.require(name)
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise fields.error(name, f"must be a list of two positive integers, found {value!r}")
    if value[0] != MEL_BINS:
        raise fields.error(name, f"must begin with {MEL_BINS}, the number of mel bins, found {value!r}")
    return value[0], value[1]


def _read_unified_audio(fields: Fields) -> UnifiedAudioConfig:
    samples = fields.integer("audio_embed_dim")
    # The published config has the number under these names too.
    for name in ("audio_samples_per_token", "hidden_size", "output_proj_dims"):
        fields.expect(name, (samples,))
    return UnifiedAudioConfig(samples_per_token=samples, rms_norm_eps=fields.number("rms_norm_eps"))


def _check_multiple(fields: Fields, name: str, factor: int, what: str) -> None:
    value = fields.integer(name)
    if value % factor:
        raise fields.error(name, f"must be a multiple of the {factor} {what}, found {value}")


def _read_ids(root: Fields, vocab_size: int, *, has_vision: bool, has_audio: bool) -> MediaIds:
    def token(name: str) -> int:
        value = root.integer(name, 0)
        if value >= vocab_size:
            raise root.error(name, f"must be below the vocabulary of {vocab_size}, found {value}")
        return value

    # Some configs spell this field in two ways, and some in one of them.
    audio_end = "eoa_token_index" if "eoa_token_index" in root else "eoa_token_id"
    return MediaIds(
        image=token("image_token_id") if has_vision else None,
        image_start=token("boi_token_id") if has_vision else None,
        image_end=token("eoi_token_id") if has_vision else None,
        video=token("video_token_id") if has_vision and "video_token_id" in root else None,
        audio=token("audio_token_id") if has_audio else None,
        audio_start=token("boa_token_id") if has_audio else None,
        audio_end=token(audio_end) if has_audio else None,
    )
