"""Tiny random Gemma 4 pairs in Hugging Face layout, with every feature of their variant.

The weights are random but not trivial: norms, layer scalars and expert scales differ from 1. The logits depend on the
context. An omitted or wrong part of the computation changes the logits and the greedy text.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlx_mtp import DEMO_PAIR
from mlx_mtp.checkpoints.config import DrafterConfig, TargetConfig, read_drafter_config, read_target_config
from mlx_mtp.checkpoints.layouts import MLX_PREFIX, drafter_names, target_names
from mlx_mtp.checkpoints.weights import fill_module
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.layers import spread_layer_scalars
from mlx_mtp.gemma4.target import Target

VARIANTS = ("e2b", "12b", "26b", "31b")
VOCAB_SIZE = 512
WINDOW = 16
# The first ids of the tokenizer. The ids from FIRST_TEXT_ID on are bytes and pairs of letters.
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|turn>",
    "<turn|>",
    "<|think|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool>",
    "<tool|>",
    '<|"|>',
)
FIRST_TEXT_ID = len(SPECIAL_TOKENS)
STOP_IDS = (1, 5, 7)

Tensors = dict[str, NDArray[Any]]

_CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{%- if thinks and messages[0]['role'] != 'system' -%}
<|turn>system
<|think|>
<turn|>
{% endif -%}
{%- for message in messages -%}
<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% if thinks and message['role'] == 'system' %}<|think|>
{% endif %}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' %}{{ part['text'] | trim }}{% else %}{{ '<|' + part['type'] + '|>' }}{% endif -%}
{%- endfor -%}
{%- endif %}<turn|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|turn>model
{% endif -%}
"""

# As in the published models, full-attention layers with K/V of their own stand between sliding layers.
_OTHER_TYPES = ["sliding_attention", "full_attention"] * 2
_E2B_TYPES = [*_OTHER_TYPES, "sliding_attention", "full_attention"]
_DRAFTER_TYPES = ["sliding_attention"] * 3 + ["full_attention"]

# The fields in which the variants' text configs differ.
_VARIANT: dict[str, dict[str, Any]] = {
    "e2b": {
        "layer_types": _E2B_TYPES,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "12b": {
        "model_type": "gemma4_unified_text",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "use_bidirectional_attention": "vision",
    },
    "26b": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "use_bidirectional_attention": "vision",
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "31b": {
        "hidden_size": 128,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_key_value_heads": 4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "use_bidirectional_attention": "vision",
    },
}


def make_target(folder: Path, variant: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a target checkpoint with its tokenizer. Overrides are fields of config.json or of its text config."""
    text = _text_config(_OTHER_TYPES) | _VARIANT[variant]
    config = {
        "architectures": [f"{'Gemma4Unified' if variant == '12b' else 'Gemma4'}ForConditionalGeneration"],
        "model_type": "gemma4_unified" if variant == "12b" else "gemma4",
        "text_config": text,
        "vision_config": None,
        "audio_config": None,
        "boi_token_id": 255999,
        "eoi_token_id": 258882,
        "image_token_id": 258880,
        "video_token_id": 258884,
        "boa_token_id": 256000,
        "eoa_token_index": 258883,
        "audio_token_id": 258881,
        "eos_token_id": [1, 5],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    _override(config, overrides)
    tensors = _target_tensors(text, np.random.default_rng(seed))
    if variant == "e2b":
        # One tensor of a modality that the text decoder does not use.
        tensors["model.vision_tower.patch_embedder.input_proj.weight"] = np.ones((4, 4), np.float32)
    _write(folder, config, tensors, is_assistant=False)
    return folder


def make_drafter(folder: Path, variant: str, seed: int = 0, **overrides: Any) -> Path:
    """Write the checkpoint of a drafter that fits the variant's target: a centroid head for e2b, else a dense head."""
    backbone = (_text_config(_OTHER_TYPES) | _VARIANT[variant])["hidden_size"]
    kept = ("model_type", "head_dim", "global_head_dim", "num_key_value_heads", "num_global_key_value_heads")
    text = _text_config(_DRAFTER_TYPES) | {name: _VARIANT[variant][name] for name in kept if name in _VARIANT[variant]}
    text |= {
        "attention_k_eq_v": variant != "e2b",
        "num_kv_shared_layers": len(_DRAFTER_TYPES),
        "final_logit_softcapping": None,
        "vocab_size_per_layer_input": 0,
    }
    unified = "Unified" if variant == "12b" else ""
    config = {
        "architectures": [f"Gemma4{unified}AssistantForCausalLM"],
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": backbone,
        "use_ordered_embeddings": variant == "e2b",
        "num_centroids": 32,
        "centroid_intermediate_top_k": 4,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    _override(config, overrides)
    _write(folder, config, _drafter_tensors(config, np.random.default_rng(seed + 1000)), is_assistant=True)
    return folder


def make_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer of 512 tokens with Gemma's special tokens, and a small chat template."""
    pieces, merges = _pieces()
    vocab = {piece: index for index, piece in enumerate((*SPECIAL_TOKENS, *pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
    config = {f"{name}_token": token for name, token in names.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    return folder


def make_gemma_tokenizer(folder: Path) -> Path:
    """Write a small tokenizer in the form of Gemma's own: "▁" for a blank, and unknown characters as bytes."""
    make_tokenizer(folder)
    pieces = [
        *SPECIAL_TOKENS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"abcdefghijklmnopqrstuvwxyz▁日\n",
        "▁a",
        "he",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("h", "e")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def unpack_demo_pair(folder: Path) -> None:
    """Write the demo pair in Hugging Face layout, with its tensor names, to `target/` and `assistant/`."""
    for source, name in ((DEMO_PAIR, "target"), (DEMO_PAIR / "drafter", "assistant")):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("drafter", "*.index.json", "README.md"))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_PAIR / file, folder / "assistant")
    weights = folder / "target" / "model.safetensors"
    # NumPy has no bfloat16.
    arrays: dict[str, mx.array] = mx.load(str(weights))  # type: ignore[assignment]
    tensors = {name.replace(MLX_PREFIX, "model.language_model.", 1): value for name, value in arrays.items()}
    mx.eval(tensors)
    mx.save_safetensors(str(weights), tensors, metadata={"format": "pt"})


def load_target(folder: Path) -> tuple[Target, TargetConfig]:
    """Load the target of a checkpoint folder. It is quantized if the checkpoint is."""
    config = read_target_config(folder)
    target = Target(config.text)
    fill_module(target, folder, partial(target_names, config=config), config.quantization)
    spread_layer_scalars(target.layers)
    return target, config


def load_drafter(folder: Path) -> tuple[Drafter, DrafterConfig]:
    """Load the drafter of a checkpoint folder. It is quantized if the checkpoint is."""
    config = read_drafter_config(folder)
    drafter = Drafter(config)
    fill_module(drafter, folder, partial(drafter_names, config=config), config.quantization)
    spread_layer_scalars(drafter.model.layers)
    return drafter, config


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Return `<bos>` and `count - 1` random ids of tokens that are not special."""
    return [2, *np.random.default_rng(seed).integers(FIRST_TEXT_ID, VOCAB_SIZE, count - 1).tolist()]


def _text_config(layer_types: list[str]) -> dict[str, Any]:
    return {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": None,
        "layer_types": layer_types,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": WINDOW,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    }


def _override(config: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Set each field in the text config if it is there, else at the top level."""
    text = config["text_config"]
    for name, value in overrides.items():
        (text if name in text else config)[name] = value
    text["num_hidden_layers"] = len(text["layer_types"])
    if config["model_type"].endswith("assistant"):
        text["num_kv_shared_layers"] = len(text["layer_types"])


def _target_tensors(text: dict[str, Any], rng: np.random.Generator) -> Tensors:
    hidden, layers, per_layer = text["hidden_size"], len(text["layer_types"]), text["hidden_size_per_layer_input"]
    # Small embeddings come before a large final norm. Otherwise a tied head repeats the last token.
    tensors = {
        "embed_tokens.weight": normal(rng, 0.12 * hidden**-0.5, text["vocab_size"], hidden),
        "norm.weight": norm(rng, hidden, 8.0),
    }
    if per_layer:
        tensors |= {
            "embed_tokens_per_layer.weight": normal(rng, 0.1, text["vocab_size_per_layer_input"], layers * per_layer),
            "per_layer_model_projection.weight": linear(rng, layers * per_layer, hidden),
            "per_layer_projection_norm.weight": norm(rng, per_layer),
        }
    for index in range(layers):
        tensors |= {f"layers.{index}.{name}": value for name, value in _layer_tensors(text, index, rng).items()}
    return {f"model.language_model.{name}": value for name, value in tensors.items()}


def _drafter_tensors(config: dict[str, Any], rng: np.random.Generator) -> Tensors:
    text, backbone = config["text_config"], config["backbone_hidden_size"]
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    tensors = {
        "pre_projection.weight": linear(rng, hidden, 2 * backbone),
        "post_projection.weight": linear(rng, backbone, hidden),
        "model.embed_tokens.weight": normal(rng, 0.3, vocab, hidden),
        "model.norm.weight": norm(rng, hidden),
    }
    if config["use_ordered_embeddings"]:
        tensors["masked_embedding.centroids.weight"] = linear(rng, config["num_centroids"], hidden)
        tensors["masked_embedding.token_ordering"] = rng.permutation(vocab).astype(np.int64)
    for index in range(len(text["layer_types"])):
        layer = _layer_tensors(text, index, rng, owns_kv=False)
        tensors |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    return tensors


def _layer_tensors(text: dict[str, Any], index: int, rng: np.random.Generator, *, owns_kv: bool = True) -> Tensors:
    hidden = text["hidden_size"]
    tensors = _attention_tensors(text, text["layer_types"][index] == "full_attention", rng, owns_kv=owns_kv)
    shared = index >= len(text["layer_types"]) - text["num_kv_shared_layers"]
    width = text["intermediate_size"] * (2 if text["use_double_wide_mlp"] and shared else 1)
    tensors |= {
        "mlp.gate_proj.weight": linear(rng, width, hidden),
        "mlp.up_proj.weight": linear(rng, width, hidden),
        "mlp.down_proj.weight": linear(rng, hidden, width),
        "layer_scalar": rng.uniform(0.8, 1.1, 1).astype(np.float32),
    }
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if text["enable_moe_block"]:
        norms += ["pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
        tensors |= _expert_tensors(text, rng)
    if per_layer := text["hidden_size_per_layer_input"]:
        norms += ["post_per_layer_input_norm"]
        tensors["per_layer_input_gate.weight"] = linear(rng, per_layer, hidden)
        tensors["per_layer_projection.weight"] = linear(rng, hidden, per_layer)
    return tensors | {f"{name}.weight": norm(rng, hidden) for name in norms}


def _attention_tensors(text: dict[str, Any], is_full: bool, rng: np.random.Generator, *, owns_kv: bool) -> Tensors:
    """Return projections and norms. As published, layers with shared K/V also have unused projections of their own."""
    hidden, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    head_dim = text["global_head_dim"] if is_full else text["head_dim"]
    k_eq_v = is_full and text["attention_k_eq_v"]
    if k_eq_v and text["num_global_key_value_heads"]:
        kv_heads = text["num_global_key_value_heads"]
    tensors = {
        "self_attn.q_proj.weight": linear(rng, heads * head_dim, hidden),
        "self_attn.o_proj.weight": linear(rng, hidden, heads * head_dim),
        "self_attn.q_norm.weight": norm(rng, head_dim, 0.5),
    }
    if owns_kv:
        tensors["self_attn.k_proj.weight"] = linear(rng, kv_heads * head_dim, hidden)
        tensors["self_attn.k_norm.weight"] = norm(rng, head_dim, 0.5)
        if not k_eq_v:
            tensors["self_attn.v_proj.weight"] = linear(rng, kv_heads * head_dim, hidden)
    return tensors


def _expert_tensors(text: dict[str, Any], rng: np.random.Generator) -> Tensors:
    hidden, experts, width = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    return {
        "router.proj.weight": normal(rng, 1.0, experts, hidden),
        "router.scale": norm(rng, hidden),
        "router.per_expert_scale": norm(rng, experts),
        "experts.gate_up_proj": normal(rng, hidden**-0.5, experts, 2 * width, hidden),
        "experts.down_proj": normal(rng, width**-0.5, experts, hidden, width),
    }


def normal(rng: np.random.Generator, scale: float, *shape: int) -> NDArray[Any]:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def linear(rng: np.random.Generator, out_size: int, in_size: int) -> NDArray[Any]:
    return normal(rng, 1.5 * in_size**-0.5, out_size, in_size)


def norm(rng: np.random.Generator, size: int, scale: float = 1.0) -> NDArray[Any]:
    return (scale * rng.uniform(0.6, 1.4, size)).astype(np.float32)


def _pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Return 256 bytes and 240 pairs of letters, and the merges that make the pairs."""
    vowels, consonants = "aeiou", "bcdfghjklmnpqrstvwxyz"
    pairs = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyzABCD"]
    pairs += [(c, v) for c in consonants for v in vowels] + [(v, c) for c in consonants for v in vowels]
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in pairs)], pairs


def _write(folder: Path, config: dict[str, Any], tensors: Tensors, *, is_assistant: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": list(STOP_IDS)}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    assistant = {"is_assistant": True, "num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
    (folder / "generation_config.json").write_text(json.dumps(generation | (assistant if is_assistant else sampling)))
    make_tokenizer(folder)
