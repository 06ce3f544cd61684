"""Undeclared fields of requests: the fields without an effect here, and the values of other fields without an effect.

docs/server.md names all these fields.
"""

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, LiteralString

from pydantic_core import PydanticCustomError

logger = logging.getLogger(__name__)

# These fields have no effect on the answer of a local server with one model. Any value is accepted.
NO_EFFECT = {
    # Fields of OpenAI.
    "access_programs", "background_options", "client_metadata", "context_management", "max_tool_calls",
    "metadata", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user", "verbosity",
    "web_search_options",
    # Fields of routers and SDKs.
    "api_key", "cache_control", "caching", "citation_options", "drop_params", "extra_headers", "models",
    "num_retries", "provider", "providerOptions", "provider_options", "route", "timeout", "trace", "usage",
    # Fields of chat front ends.
    "background_tasks", "chat_id", "citations", "features", "filter_ids", "id", "message_id", "model_item",
    "parent_id", "request_id", "rid", "session_id", "tool_ids", "tool_servers", "variables",
    # Fields of Ollama, llama.cpp and LM Studio.
    "cache_prompt", "draft_model", "dry_allowed_length", "dry_base", "dry_penalty_last_n",
    "dry_sequence_breakers", "dynatemp_exponent", "id_slot", "keep_alive", "low_vram", "mirostat_eta",
    "mirostat_tau", "n_cache_reuse", "n_discard", "n_keep", "num_batch", "num_ctx", "num_gpu", "num_keep",
    "num_thread", "parse_tool_calls", "raw_slots", "return_progress", "return_tokens", "slot_id",
    "speculative.n_max", "speculative.n_min", "speculative.p_min", "speculative.type", "timings_per_token",
    "ttl", "use_mlock", "use_mmap",
    # Fields of vLLM, SGLang and the Hugging Face servers.
    "cache_salt", "details", "detokenize", "early_stopping", "guided_decoding_backend", "incremental_output",
    "kv_transfer_params", "mm_processor_kwargs", "priority", "spaces_between_special_tokens",
    "stream_reasoning",
}  # fmt: skip
# A field with one of these values asks for nothing.
_NOTHING: tuple[Any, ...] = (False, "", [], {}, 0)
# These fields would change the answer, but the server does not support them.
NOT_HONOURED = {
    # Fields of OpenAI.
    "audio", "background", "conversation", "data_sources", "echo", "function_call", "functions",
    "previous_response_id", "prompt", "suffix",
    # Fields of routers and front ends.
    "container", "deferred", "enable_search", "extra_body", "files", "images", "mcp_servers", "negative_prompt",
    "plugins", "safe_prompt", "search_parameters", "system", "transforms", "videos",
    # Fields of llama.cpp and Ollama.
    "dry_multiplier", "dynatemp_range", "format", "image_data", "json_schema", "lora", "min_keep", "mirostat",
    "n_indent", "n_probs", "options", "penalize_nl", "penalty_prompt", "post_sampling_probs", "raw",
    "response_fields", "samplers", "template", "top_a",
    # Fields of vLLM, SGLang, mlx-lm and the Hugging Face servers.
    "adapters", "allowed_token_ids", "bad_words", "bad_words_ids", "chat_template", "documents",
    "guided_choice", "guided_grammar", "guided_json", "guided_regex", "include_stop_str_in_output",
    "logit_processors", "logits_processors", "lora_path", "no_repeat_ngram_size", "no_stop_trim",
    "penalty_alpha", "prompt_logprobs", "return_full_text", "return_token_ids", "return_tokens_as_token_ids",
    "role_mapping", "stop_token_ids", "structured_outputs", "truncate", "truncate_prompt_tokens",
    "use_beam_search", "vllm_xargs", "watermark", "add_special_tokens", "continue_final_message",
}  # fmt: skip
# An unsupported field with one of these values asks for nothing, so the server accepts it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(NOT_HONOURED, _NOTHING),
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "cfg_scale": (1,),
    "do_sample": (True,),
    "function_call": (*_NOTHING, "none", "auto"),
    "guidance_scale": (1,),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "n": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "reasoning_format": ("", "auto", "deepseek", "parsed"),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "t_max_predict_ms": (0, -1),
    "t_max_prompt_ms": (0, -1),
    "tfs_z": (1,),
    "tool_choice": ("none", "auto"),
    "top_n_sigma": (0, -1),
    "truncation": ("disabled", "auto"),
    "typical": (1,),
    "typical_p": (1,),
}
# These unsupported fields have a replacement, which the error message names.
_INSTEAD = {
    "conversation": "nothing is stored here: send its items as input",
    "function_call": "send tool_choice",
    "functions": "send tools",
    "guided_grammar": "send grammar",
    "guided_json": "send response_format",
    "guided_regex": "send regex",
    "previous_response_id": "no response is found, as `store` is always false here: send its items as input",
    "response_format": "send text.format",
    "system": "send a message of role system",
}
# A name with at least this share of characters in common with a field (difflib ratio) counts as misspelt.
_SIMILAR = 0.85
_MOST_COMPARED = 20
_LONGEST = 50


def refuse(code: LiteralString, name: str, message: str, status: int = 400) -> PydanticCustomError:
    """Return the error that refuses the request's field `name`. `code` is the code of OpenAI's error object."""
    return PydanticCustomError(code, "{message}", {"param": name, "message": message, "status": status})


def check_others(others: Mapping[str, Any], declared: Collection[str], elsewhere: Collection[str]) -> None:
    """Check the fields of a request that the request does not declare.

    `declared` are the names of the request's own fields. If a request gives one field under two names, `others` holds
    the second name. `elsewhere` are the names of the fields of all endpoints.

    Raises PydanticCustomError if an undeclared field asks for an unsupported feature, or if its name is nearly the name
    of a known field.
    """
    for name, value in others.items():
        is_other = (name in NEUTRAL or name in elsewhere) and name not in NO_EFFECT and name not in declared
        if is_other and value not in NEUTRAL.get(name, _NOTHING):
            raise refuse("unsupported_parameter", name, _unsupported(name, value))
    known = [*declared, *NEUTRAL, *NO_EFFECT]
    in_lower_case = {name.lower(): name for name in reversed(known)}
    for index, name in enumerate(unknown(others, {*declared, *elsewhere})):
        similar = in_lower_case.get(name.lower())
        # A comparison takes time and the client chooses the number of names, so only the first names are compared.
        if similar is None and index < _MOST_COMPARED:
            similar = next(iter(get_close_matches(name[:_LONGEST], known, n=1, cutoff=_SIMILAR)), None)
        if similar is not None:
            raise refuse("unknown_parameter", name, f"unknown parameter: {name!r}: did you mean {similar!r}?")


def _unsupported(name: str, value: Any) -> str:
    found = f"unsupported parameter: {name!r} is {json.dumps(value)[:100]}"
    if name in _INSTEAD:
        return f"{found}: {_INSTEAD[name]}"
    neutral = NEUTRAL.get(name, _NOTHING)
    other = "" if neutral is _NOTHING else f" or send {' or '.join(json.dumps(value) for value in neutral)}"
    return f"{found}, which cannot be done here: leave it out{other}"


def unknown(others: Iterable[str], fields: Collection[str]) -> list[str]:
    """Return the names that the server does not know. `fields` are the field names of all endpoints."""
    return [name for name in others if name not in NO_EFFECT and name not in NEUTRAL and name not in fields]


@lru_cache(maxsize=1000)
def warn_once(name: str) -> None:
    """Log that the server ignores a part of a request, once per name."""
    logger.warning("%r of a request is ignored", name[:100])
