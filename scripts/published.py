"""Configs of the published models, as far as public: sizes of real models without their weights."""

import copy
from typing import Any

Json = dict[str, Any]

NAMES = ("E2B", "E4B", "12B", "26B", "31B")
# The fields in which the text configs of the published targets differ.
TARGETS: dict[str, Json] = {
    "E2B": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
    },
    "E4B": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
    },
    "12B": {
        "model_type": "gemma4_unified_text",
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
    },
    "26B": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31B": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
    },
}
# Hidden size, intermediate size and number of attention heads of each drafter.
DRAFTERS = {
    "E2B": (256, 2048, 4),
    "E4B": (256, 2048, 4),
    "12B": (1024, 8192, 16),
    "26B": (1024, 8192, 16),
    "31B": (1024, 8192, 32),
}


def published_target(name: str) -> Json:
    text = _text(TARGETS[name])
    small = name in ("E2B", "E4B")
    text |= {
        "attention_k_eq_v": not small,
        "sliding_window": 512 if small else 1024,
        "max_position_embeddings": 131072 if small else 262144,
        "use_bidirectional_attention": None if small else "vision",
        "final_logit_softcapping": 30.0,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4_unified" if name == "12B" else "gemma4",
        "text_config": text,
        "vision_config": None,
        "audio_config": None,
        "image_token_id": 258880,
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def published_drafter(name: str) -> Json:
    hidden_size, intermediate_size, heads = DRAFTERS[name]
    target = published_target(name)["text_config"]
    kept = ("model_type", "num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v", "sliding_window")
    text = _text({key: target[key] for key in (*kept, "max_position_embeddings")})
    text |= {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "vocab_size_per_layer_input": 0,
    }
    unified = name == "12B"
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": name in ("E2B", "E4B"),
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def _text(differences: Json) -> Json:
    text = {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": None,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    }
    text |= copy.deepcopy(differences)
    return text | {"num_hidden_layers": len(text.get("layer_types", ()))}
