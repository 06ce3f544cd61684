"""Tiny random targets with media parts in Hugging Face layout, with every feature of their variant.

The weights are random but not trivial: bounds clip, norms and scales differ from 1, and position tables are random. An
omitted or wrong part of the computation changes the features.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from .tiny import VOCAB_SIZE, Tensors, linear, make_target, norm, normal

MEL_BINS = 128
# Samples of a token of 12B.
FRAME_SIZE = 640
# The last ids of the vocabulary. Their embeddings are zero, so that no text has them.
MEDIA_IDS = {
    "image_token_id": VOCAB_SIZE - 3,
    "audio_token_id": VOCAB_SIZE - 4,
    "video_token_id": VOCAB_SIZE - 5,
    "boi_token_id": VOCAB_SIZE - 6,
    "eoi_token_id": VOCAB_SIZE - 7,
    "boa_token_id": VOCAB_SIZE - 8,
    "eoa_token_index": VOCAB_SIZE - 9,
}
# The largest number of patches in a row or a column. Published models have 10240, and 1120 for 12B.
_TABLE = 1024

# The tower of E2B and E4B has bounds. That of 26B and 31B standardizes, and its head is no power of two.
_CLIPPED: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": _TABLE,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": False,
    "use_clipped_linears": True,
}
_STANDARDIZED = _CLIPPED | {
    "hidden_size": 144,
    "intermediate_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 72,
    "standardize": True,
    "use_clipped_linears": False,
}
_UNIFIED_VISION: dict[str, Any] = {
    "model_type": "gemma4_unified_vision",
    "mm_embed_dim": 96,
    "mm_posemb_size": _TABLE,
    "model_patch_size": 48,
    "num_soft_tokens": 280,
    "output_proj_dims": 96,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "rms_norm_eps": 1e-6,
}
_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "subsampling_conv_channels": [MEL_BINS, 8],
    "conv_kernel_size": 5,
    "residual_weight": 0.5,
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_logit_cap": 50.0,
    "attention_invalid_logits_value": -1e9,
    "use_clipped_linears": True,
    "rms_norm_eps": 1e-6,
    "gradient_clipping": 1e10,
    "output_proj_dims": 96,
}
_UNIFIED_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_unified_audio",
    "audio_embed_dim": FRAME_SIZE,
    "audio_samples_per_token": FRAME_SIZE,
    "hidden_size": FRAME_SIZE,
    "output_proj_dims": FRAME_SIZE,
    "rms_norm_eps": 1e-6,
}
_VISION = {"e2b": _CLIPPED, "26b": _STANDARDIZED, "31b": _STANDARDIZED, "12b": _UNIFIED_VISION}
_SOUND = {"e2b": _AUDIO, "12b": _UNIFIED_AUDIO}


def make_media_target(
    folder: Path, variant: str, *, vision: dict[str, Any] | None = None, audio: dict[str, Any] | None = None
) -> Path:
    """Write a target checkpoint with its media parts. `vision` and `audio` are changes to the two configs."""
    vision_config = _VISION[variant] | (vision or {})
    audio_config = _SOUND[variant] | (audio or {}) if variant in _SOUND else None
    make_target(folder, variant, vision_config=vision_config, audio_config=audio_config, **MEDIA_IDS)
    hidden_size = json.loads((folder / "config.json").read_text())["text_config"]["hidden_size"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.embed_tokens.weight"][min(MEDIA_IDS.values()) :] = 0
    rng = np.random.default_rng(2000)
    media = _vision_tensors(vision_config, hidden_size, rng)
    if audio_config is not None:
        media |= _audio_tensors(audio_config, hidden_size, rng)
    tensors |= {f"model.{name}": value for name, value in media.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_pixels(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Return a picture, [height, width, 3] of values 0 to 1. It has large shapes as well as noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / 100
    waves = np.sin(rows[..., None] * [1, 2, 3] + columns[..., None] * [3, 1, 2] + seed)
    pixels = 0.5 + 0.3 * waves + rng.normal(0, 0.1, (height, width, 3))
    return np.asarray(np.clip(pixels * 255, 0, 255).round() / 255, np.float32)


def random_mel(frames: int, seed: int = 0) -> NDArray[np.float32]:
    """Return log-mel frames [frames, bins] in the range of those of a sound."""
    return normal(np.random.default_rng(seed), 2.0, frames, MEL_BINS) - np.float32(3)


def random_samples(frames: int, seed: int = 0) -> NDArray[np.float32]:
    """Return frames of samples from -1 to 1, [frames, samples]."""
    return np.asarray(np.clip(normal(np.random.default_rng(seed), 0.3, frames, FRAME_SIZE), -1, 1), np.float32)


def _vision_tensors(config: dict[str, Any], hidden_size: int, rng: np.random.Generator) -> Tensors:
    if "mm_embed_dim" in config:
        return _unified_vision_tensors(config, hidden_size, rng)
    size, tower = config["hidden_size"], "vision_tower"
    tensors = {
        f"{tower}.patch_embedder.input_proj.weight": linear(rng, size, 3 * config["patch_size"] ** 2),
        f"{tower}.patch_embedder.position_embedding_table": normal(
            rng, 0.3, 2, config["position_embedding_size"], size
        ),
        "embed_vision.embedding_projection.weight": linear(rng, hidden_size, size),
    }
    if config["standardize"]:
        tensors[f"{tower}.std_bias"] = normal(rng, 1.0, size)
        tensors[f"{tower}.std_scale"] = norm(rng, size, 0.5)
    for index in range(config["num_hidden_layers"]):
        layer = _vision_layer(config, rng)
        tensors |= {f"{tower}.encoder.layers.{index}.{name}": value for name, value in layer.items()}
    return tensors


def _vision_layer(config: dict[str, Any], rng: np.random.Generator) -> Tensors:
    size, width, clips = config["hidden_size"], config["intermediate_size"], config["use_clipped_linears"]
    heads, kv_heads = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    # With larger scores, an input that differs by its last bit would change the features by 2e-4.
    tensors = {f"self_attn.{name}_norm.weight": norm(rng, config["head_dim"], 0.5) for name in "qk"}
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        tensors[f"{name}_layernorm.weight"] = norm(rng, size)
    shapes = {
        "self_attn.q_proj": (heads, size),
        "self_attn.k_proj": (kv_heads, size),
        "self_attn.v_proj": (kv_heads, size),
        "self_attn.o_proj": (size, heads),
        "mlp.gate_proj": (width, size),
        "mlp.up_proj": (width, size),
        "mlp.down_proj": (size, width),
    }
    return tensors | _clipped_tensors(shapes, clips, rng)


def _unified_vision_tensors(config: dict[str, Any], hidden_size: int, rng: np.random.Generator) -> Tensors:
    size, values = config["mm_embed_dim"], 3 * config["model_patch_size"] ** 2
    norms = {"patch_ln1": values, "patch_ln2": size, "pos_norm": size}
    tensors = {f"vision_embedder.{name}.weight": norm(rng, width) for name, width in norms.items()}
    return tensors | {
        **{f"vision_embedder.{name}.bias": normal(rng, 0.1, width) for name, width in norms.items()},
        "vision_embedder.patch_dense.weight": linear(rng, size, values),
        "vision_embedder.patch_dense.bias": normal(rng, 0.1, size),
        "vision_embedder.pos_embedding": normal(rng, 0.3, config["mm_posemb_size"], 2, size),
        "embed_vision.embedding_projection.weight": linear(rng, hidden_size, size),
    }


def _audio_tensors(config: dict[str, Any], hidden_size: int, rng: np.random.Generator) -> Tensors:
    if "audio_embed_dim" in config:
        return {"embed_audio.embedding_projection.weight": linear(rng, hidden_size, config["audio_embed_dim"])}
    size, output = config["hidden_size"], config["output_proj_dims"]
    first, second = config["subsampling_conv_channels"]
    convolutions = "audio_tower.subsample_conv_projection"
    tensors = {
        f"{convolutions}.layer0.conv.weight": normal(rng, 0.3, first, 1, 3, 3),
        f"{convolutions}.layer0.norm.weight": norm(rng, first),
        f"{convolutions}.layer1.conv.weight": normal(rng, (9 * first) ** -0.5, second, first, 3, 3),
        f"{convolutions}.layer1.norm.weight": norm(rng, second),
        f"{convolutions}.input_proj_linear.weight": linear(rng, size, first // 4 * second),
        "audio_tower.output_proj.weight": linear(rng, output, size),
        "audio_tower.output_proj.bias": normal(rng, 0.1, output),
        "embed_audio.embedding_projection.weight": linear(rng, hidden_size, output),
    }
    for index in range(config["num_hidden_layers"]):
        tensors |= {f"audio_tower.layers.{index}.{name}": value for name, value in _audio_layer(config, rng).items()}
    return tensors


def _audio_layer(config: dict[str, Any], rng: np.random.Generator) -> Tensors:
    size = config["hidden_size"]
    shapes = {f"self_attn.{name}": (size, size) for name in ("q_proj", "k_proj", "v_proj", "post")}
    shapes |= {"lconv1d.linear_start": (2 * size, size), "lconv1d.linear_end": (size, size)}
    norms = ["norm_pre_attn", "norm_post_attn", "norm_out", "lconv1d.pre_layer_norm", "lconv1d.conv_norm"]
    for block in ("feed_forward1", "feed_forward2"):
        shapes |= {f"{block}.ffw_layer_1": (4 * size, size), f"{block}.ffw_layer_2": (size, 4 * size)}
        norms += [f"{block}.pre_layer_norm", f"{block}.post_layer_norm"]
    return {
        **{f"{name}.weight": norm(rng, size) for name in norms},
        "self_attn.relative_k_proj.weight": linear(rng, size, size),
        "self_attn.per_dim_scale": normal(rng, 0.5, size // config["num_attention_heads"]),
        "lconv1d.depthwise_conv1d.weight": normal(rng, 0.5, size, 1, config["conv_kernel_size"]),
        **_clipped_tensors(shapes, config["use_clipped_linears"], rng),
    }


def _clipped_tensors(shapes: dict[str, tuple[int, int]], clips: bool, rng: np.random.Generator) -> Tensors:
    """Return linear layers, with bounds that clip a good part of the values if `clips`."""
    tensors = {f"{name}.linear.weight": linear(rng, *shape) for name, shape in shapes.items()}
    if clips:
        for name in shapes:
            for side in ("input", "output"):
                tensors[f"{name}.{side}_min"] = np.array(-rng.uniform(1, 2), np.float32)
                tensors[f"{name}.{side}_max"] = np.array(rng.uniform(1, 2), np.float32)
    return tensors
