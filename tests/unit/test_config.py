"""Reading config.json: the published models, their other spellings, and the errors for a bad file."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.paths import PUBLISHED

from mlx_mtp.checkpoints.config import (
    DrafterConfig,
    LayerConfig,
    Quantization,
    SamplingDefaults,
    TargetConfig,
    read_drafter_config,
    read_target_config,
)
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.errors import ConfigError
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target

Json = dict[str, Any]

NAMES = ("E2B", "E4B", "12B", "26B", "31B")
# The last layers that own K/V, sliding and full. The drafter reads their K/V.
DRAFT_SOURCES = {"E2B": (13, 14), "E4B": (22, 23), "12B": (46, 47), "26B": (28, 29), "31B": (58, 59)}
TARGET_PARAMETERS = {"E2B": 4.63e9, "E4B": 7.46e9, "12B": 11.91e9, "26B": 25.23e9, "31B": 30.70e9}
DRAFTER_PARAMETERS = {"E2B": 77.73e6, "E4B": 78.5e6, "12B": 422.9e6, "26B": 419.7e6, "31B": 469.5e6}

# Required fields and a model that needs each. Without them, a tensor's shape or a computation is a guess.
TARGET_FIELDS = {
    "text_config.hidden_size": "31B",
    "text_config.intermediate_size": "31B",
    "text_config.num_hidden_layers": "31B",
    "text_config.layer_types": "31B",
    "text_config.num_attention_heads": "31B",
    "text_config.num_key_value_heads": "31B",
    "text_config.num_global_key_value_heads": "31B",
    "text_config.head_dim": "31B",
    "text_config.global_head_dim": "31B",
    "text_config.attention_k_eq_v": "31B",
    "text_config.num_kv_shared_layers": "E2B",
    "text_config.use_double_wide_mlp": "E2B",
    "text_config.vocab_size": "31B",
    "text_config.hidden_size_per_layer_input": "E2B",
    "text_config.vocab_size_per_layer_input": "E2B",
    "text_config.enable_moe_block": "26B",
    "text_config.num_experts": "26B",
    "text_config.top_k_experts": "26B",
    "text_config.moe_intermediate_size": "26B",
    "text_config.sliding_window": "31B",
    "text_config.rms_norm_eps": "31B",
    "text_config.max_position_embeddings": "31B",
    "text_config.final_logit_softcapping": "31B",
    "text_config.rope_parameters": "31B",
    "text_config.rope_parameters.sliding_attention": "31B",
    "text_config.rope_parameters.full_attention": "31B",
    "text_config.rope_parameters.full_attention.rope_type": "31B",
    "text_config.rope_parameters.full_attention.rope_theta": "31B",
    "text_config.rope_parameters.full_attention.partial_rotary_factor": "31B",
    "model_type": "31B",
}
DRAFTER_FIELDS = {
    "backbone_hidden_size": "E2B",
    "use_ordered_embeddings": "E2B",
    "num_centroids": "E2B",
    "centroid_intermediate_top_k": "E2B",
    "text_config.hidden_size": "E2B",
    "text_config.intermediate_size": "E2B",
    "text_config.num_hidden_layers": "E2B",
    "text_config.layer_types": "E2B",
    "text_config.num_attention_heads": "E2B",
    "text_config.num_key_value_heads": "E2B",
    "text_config.head_dim": "E2B",
    "text_config.global_head_dim": "E2B",
    "text_config.attention_k_eq_v": "12B",
    "text_config.num_global_key_value_heads": "12B",
    "text_config.vocab_size": "E2B",
    "text_config.final_logit_softcapping": "E2B",
    "model_type": "E2B",
}
# Each entry is a field and a value of the wrong type or range.
WRONG_VALUES: list[tuple[str, Any]] = [
    ("model_type", None),
    ("text_config", []),
    ("text_config.model_type", 3),
    ("text_config.hidden_size", "5376 wide"),
    ("text_config.hidden_size", True),
    ("text_config.hidden_size", 5376.5),
    ("text_config.hidden_size", 0),
    ("text_config.hidden_size", None),
    ("text_config.head_dim", -1),
    ("text_config.num_hidden_layers", 0),
    ("text_config.num_kv_shared_layers", -1),
    ("text_config.num_kv_shared_layers", 61),
    ("text_config.num_kv_shared_layers", 60),
    ("text_config.num_kv_shared_layers", 55),
    ("text_config.rms_norm_eps", "nan"),
    ("text_config.rms_norm_eps", 0),
    ("text_config.attention_k_eq_v", 1),
    ("text_config.use_double_wide_mlp", "false"),
    ("text_config.enable_moe_block", None),
    ("text_config.final_logit_softcapping", "-30"),
    ("text_config.final_logit_softcapping", -30.0),
    ("text_config.rope_parameters", {"rope_theta": 1e6}),
    ("text_config.rope_parameters.full_attention.rope_type", "yarn"),
    ("text_config.rope_parameters.full_attention.rope_theta", None),
    ("text_config.layer_types", "full_attention"),
    ("text_config.layer_types", ["full_attention"] * 59),
    ("text_config.layer_types", ["full_attention"] * 59 + ["chunked_attention"]),
    ("text_config.layer_types", ["full_attention"] * 59 + ["sliding_attention"]),
    ("text_config.layer_types", [["full_attention"]] * 60),
    ("text_config.hidden_activation", "silu"),
    ("text_config.attention_bias", True),
    ("text_config.use_bidirectional_attention", "all"),
    ("dtype", 32),
    ("quantization", 4),
    ("quantization", {"bits": 4}),
    ("quantization", {"group_size": "64.5", "bits": 4}),
    ("quantization", {"group_size": 64, "bits": None}),
]
# Values that a hand-edited file can hold anywhere. They are accepted or raise ConfigError, and nothing else.
JUNK: list[Any] = [None, "x", -1, 0, 1.5, True, [], [None], [[]], {}, {"x": None}, {"x": {}}]


def published_target(name: str) -> Json:
    return read(PUBLISHED / name)


def published_drafter(name: str) -> Json:
    return read(PUBLISHED / name / "drafter")


def read(folder: Path) -> Json:
    config: Json = json.loads((folder / "config.json").read_text())
    return config


def write(folder: Path, config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def place(config: Json, field: str) -> tuple[Json, str]:
    """Return the object that holds a field written with dots, and the field's own name."""
    *parents, name = field.split(".")
    for parent in parents:
        config = config[parent]
    return config, name


def without(config: Json, field: str) -> Json:
    config = copy.deepcopy(config)
    fields, name = place(config, field)
    del fields[name]
    return config


def changed(config: Json, field: str, value: Any) -> Json:
    config = copy.deepcopy(config)
    fields, name = place(config, field)
    fields[name] = value
    return config


def target(folder: Path, config: Json) -> TargetConfig:
    return read_target_config(write(folder, config))


def drafter(folder: Path, config: Json) -> DrafterConfig:
    return read_drafter_config(write(folder, config))


def refused(read: Callable[[Path], Any], folder: Path, *words: str) -> str:
    """Return the message of the ConfigError that `read` raises. It must contain all words."""
    with pytest.raises(ConfigError) as caught:
        read(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


@pytest.mark.parametrize("name", NAMES)
def test_draft_sources(name: str, tmp_path: Path) -> None:
    text = target(tmp_path, published_target(name)).text
    assert (text.last_kv_layer("sliding_attention"), text.last_kv_layer("full_attention")) == DRAFT_SOURCES[name]


@pytest.mark.parametrize("name", NAMES)
def test_layer_table(name: str, tmp_path: Path) -> None:
    config = published_target(name)["text_config"]
    layers = target(tmp_path, published_target(name)).text.layers
    owners = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    sources = dict(zip(("sliding_attention", "full_attention"), DRAFT_SOURCES[name], strict=True))
    assert len(layers) == config["num_hidden_layers"]
    for index, (layer, layer_type) in enumerate(zip(layers, config["layer_types"], strict=True)):
        is_full = layer_type == "full_attention"
        assert layer == LayerConfig(
            layer_type=layer_type,
            head_dim=512 if is_full else 256,
            num_kv_heads=(is_full and config["num_global_key_value_heads"]) or config["num_key_value_heads"],
            k_eq_v=is_full and name not in ("E2B", "E4B"),
            has_kv=index < owners,
            kv_layer=index if index < owners else sources[layer_type],
            intermediate_size=12288 if name == "E2B" and index >= 15 else config["intermediate_size"],
        )


def test_global_kv_heads_need_k_eq_v(tmp_path: Path) -> None:
    """As in transformers: without K == V, full layers have as many K/V heads as the sliding layers."""
    config = changed(published_target("31B"), "text_config.attention_k_eq_v", False)
    assert {layer.num_kv_heads for layer in target(tmp_path, config).text.layers} == {16}


def test_text_fields(tmp_path: Path) -> None:
    text = target(tmp_path, published_target("E4B")).text
    assert (text.hidden_size, text.num_attention_heads, text.vocab_size) == (2560, 8, 262144)
    assert (text.sliding_window, text.max_position_embeddings) == (512, 131072)
    assert (text.per_layer_input_size, text.per_layer_vocab_size, text.final_logit_softcapping) == (256, 262144, 30.0)
    assert (text.rope["sliding_attention"].theta, text.rope["sliding_attention"].rotated_fraction) == (1e4, 1.0)
    assert (text.rope["full_attention"].theta, text.rope["full_attention"].rotated_fraction) == (1e6, 0.25)
    moe = target(tmp_path, published_target("26B")).text
    assert (moe.num_experts, moe.top_k_experts, moe.moe_intermediate_size) == (128, 8, 704)
    assert (moe.per_layer_input_size, moe.per_layer_vocab_size) == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_drafter_fields(name: str, tmp_path: Path) -> None:
    config = drafter(tmp_path, published_drafter(name))
    text = published_target(name)["text_config"]
    kv_heads = text["num_key_value_heads"]
    global_kv_heads = text["num_global_key_value_heads"] or kv_heads
    assert [layer.head_dim for layer in config.text.layers] == [256, 256, 256, 512]
    assert [layer.num_kv_heads for layer in config.text.layers] == [kv_heads] * 3 + [global_kv_heads]
    assert not any(layer.has_kv for layer in config.text.layers)
    assert config.backbone_hidden_size == text["hidden_size"]
    assert (config.num_centroids, config.centroid_top_k) == ((2048, 32) if name in ("E2B", "E4B") else (0, 0))
    assert (config.draft_position, config.text.final_logit_softcapping) == ("bonus", None)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts(name: str, tmp_path: Path) -> None:
    """The counts are the published sizes. The models are lazy, so no weight is computed."""
    text = target(tmp_path / "target", published_target(name)).text
    assert _parameters(Target(text)) == pytest.approx(TARGET_PARAMETERS[name], rel=1e-3)
    config = drafter(tmp_path / "drafter", published_drafter(name))
    assert _parameters(Drafter(config)) == pytest.approx(DRAFTER_PARAMETERS[name], rel=1e-3)


def _parameters(module: Any) -> int:
    # These are buffers in the reference, and not parameters.
    buffers = ("layer_scalar", "token_ordering")
    return sum(array.size for name, array in lazy_parameters(module).items() if not name.endswith(buffers))


def resaved(folder: Path, config: Json, *, flat: bool = False) -> Json:
    """Return the config as transformers writes it: the whole config, or only its text part."""
    source = transformers.AutoConfig.from_pretrained(write(folder / "source", config))
    (source.text_config if flat else source).save_pretrained(folder / "saved")
    saved: Json = json.loads((folder / "saved" / "config.json").read_text())
    return saved


@pytest.mark.parametrize("name", NAMES)
def test_resaved_target(name: str, tmp_path: Path) -> None:
    published = published_target(name)
    expected = target(tmp_path, published).text
    nested, flat = resaved(tmp_path / "nested", published), resaved(tmp_path / "flat", published, flat=True)
    assert "per_layer_config" in nested["text_config"]
    assert "global_head_dim" not in nested["text_config"]
    assert "text_config" not in flat
    assert target(tmp_path, nested | {"eos_token_id": 1}).text == expected
    assert target(tmp_path, flat).text == expected


@pytest.mark.parametrize("name", NAMES)
def test_resaved_drafter(name: str, tmp_path: Path) -> None:
    published = published_drafter(name)
    expected = drafter(tmp_path, published)
    saved = resaved(tmp_path / "saved", published)
    assert "per_layer_config" in saved["text_config"]
    assert drafter(tmp_path, saved) == expected
    assert drafter(tmp_path, saved.pop("text_config") | saved) == expected


def test_resaved_unified_loses_fields(tmp_path: Path) -> None:
    """transformers' unified text config has no field for per-layer inputs or experts."""
    config = published_target("12B")
    expected = target(tmp_path, config).text
    known = transformers.Gemma4UnifiedTextConfig().to_dict().keys() | {"global_head_dim", "num_global_key_value_heads"}
    config["text_config"] = {key: value for key, value in config["text_config"].items() if key in known}
    saved = resaved(tmp_path / "saved", config)
    assert not {"hidden_size_per_layer_input", "enable_moe_block"} & saved["text_config"].keys()
    assert target(tmp_path, saved).text == expected


@pytest.mark.parametrize("name", NAMES)
def test_flat_published_spelling(name: str, tmp_path: Path) -> None:
    published = published_target(name)
    expected = target(tmp_path, published)
    assert target(tmp_path, published | published.pop("text_config")).text == expected.text


def test_layer_keys_with_and_without_zeros(tmp_path: Path) -> None:
    config = published_target("31B")
    expected = target(tmp_path, config).text
    entry = {"head_dim": 512, "num_key_value_heads": 4}
    del config["text_config"]["global_head_dim"], config["text_config"]["num_global_key_value_heads"]
    for spelling in ("{}", "{:02d}"):
        config["text_config"]["per_layer_config"] = {spelling.format(i): entry for i in range(5, 60, 6)}
        assert target(tmp_path, config).text == expected


@pytest.mark.parametrize(("field", "name"), TARGET_FIELDS.items())
def test_missing_target_field(field: str, name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, without(published_target(name), field))
    message = refused(read_target_config, folder, str(folder / "config.json"), field.rsplit(".", 1)[-1])
    assert "missing" in message


@pytest.mark.parametrize(("field", "name"), DRAFTER_FIELDS.items())
def test_missing_drafter_field(field: str, name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, without(published_drafter(name), field))
    message = refused(read_drafter_config, folder, str(folder / "config.json"), field)
    assert "missing" in message


def test_fields_that_decide_nothing_may_be_missing(tmp_path: Path) -> None:
    """One mirror of the 12B assistant omits a field of the head that it does not have."""
    expected = drafter(tmp_path, published_drafter("12B"))
    for field in ("centroid_intermediate_top_k", "num_centroids", "tie_word_embeddings"):
        assert drafter(tmp_path, without(published_drafter("12B"), field)) == expected
    dense = target(tmp_path, published_target("31B"))
    for field in ("num_experts", "top_k_experts", "vocab_size_per_layer_input", "attention_dropout"):
        assert target(tmp_path, without(published_target("31B"), f"text_config.{field}")) == dense


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES)
def test_wrong_value(field: str, value: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, changed(published_target("31B"), field, value))
    refused(read_target_config, folder, str(folder / "config.json"), field.rsplit(".", 1)[-1])


@pytest.mark.parametrize(
    ("field", "odd", "plain"),
    [
        ("text_config.hidden_size", "5376", 5376),
        ("text_config.hidden_size", 5376.0, 5376),
        ("vocab_size", "262144", 262144),
        ("text_config.rms_norm_eps", "1e-6", 1e-6),
        ("text_config.final_logit_softcapping", "30", 30.0),
        ("text_config.rope_parameters.full_attention.rope_theta", "1e6", 1e6),
        ("quantization", {"group_size": "64", "bits": "3"}, {"group_size": 64, "bits": 3}),
        (
            "quantization_config",
            {"group_size": 64, "bits": 4, "mode": None, "embed_tokens": {"group_size": 64.0, "bits": "8"}},
            {"group_size": 64, "bits": 4, "embed_tokens": {"group_size": 64, "bits": 8}},
        ),
    ],
)
def test_numbers_as_strings(field: str, odd: Any, plain: Any, tmp_path: Path) -> None:
    published = published_target("31B")
    assert target(tmp_path, changed(published, field, odd)) == target(tmp_path, changed(published, field, plain))


@pytest.mark.parametrize(
    "field", ["hidden_activation", "attention_bias", "tie_word_embeddings", "use_bidirectional_attention"]
)
def test_null_is_as_left_out(field: str, tmp_path: Path) -> None:
    for read, published in ((target, published_target("31B")), (drafter, published_drafter("E2B"))):
        plain = published | {"text_config": published["text_config"] | {field: None}, "tie_word_embeddings": None}
        assert read(tmp_path, plain) == read(tmp_path, published)
    published = published_drafter("E2B")
    assert drafter(tmp_path, published | {"draft_position": None, "draft_vocab_size": None}) == drafter(
        tmp_path, published
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_config.rms_norm_eps", float("nan")),
        ("text_config.num_attention_heads", 30),
        ("text_config.rope_parameters.full_attention.partial_rotary_factor", 1.5),
        ("text_config.top_k_experts", 129),
    ],
)
def test_value_that_contradicts_another(field: str, value: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, changed(published_target("26B"), field, value))
    refused(read_target_config, folder, str(folder / "config.json"), field.rsplit(".", 1)[-1])


@pytest.mark.parametrize("name", ["E2B", "12B", "26B"])
def test_junk_is_refused_as_config_error(name: str, tmp_path: Path) -> None:
    published = published_target(name)
    text = [f"text_config.{key}" for key in published["text_config"]]
    rope = [f"text_config.rope_parameters.{kind}" for kind in ("full_attention", "sliding_attention")]
    spellings = ["text_config.per_layer_config", "quantization", "quantization_config", "vocab_size"]
    for field in [*published, *text, *rope, *spellings]:
        for value in JUNK:
            _read_or_refuse(read_target_config, write(tmp_path, changed(published, field, value)))


@pytest.mark.parametrize("name", ["E2B", "12B"])
def test_junk_in_a_drafter(name: str, tmp_path: Path) -> None:
    published = published_drafter(name)
    text = [f"text_config.{key}" for key in published["text_config"]]
    for field in [*published, *text, "draft_position", "text_config.per_layer_config"]:
        for value in JUNK:
            _read_or_refuse(read_drafter_config, write(tmp_path, changed(published, field, value)))


def _read_or_refuse(read: Callable[[Path], Any], folder: Path) -> None:
    with contextlib.suppress(ConfigError):
        read(folder)


def test_layer_count_and_table_disagree(tmp_path: Path) -> None:
    folder = write(tmp_path, changed(published_target("31B"), "text_config.num_hidden_layers", 59))
    refused(read_target_config, folder, "config.json", "layer_types", "59")


def test_unknown_model_type(tmp_path: Path) -> None:
    folder = write(tmp_path, published_target("E2B") | {"model_type": "gemma3"})
    refused(read_target_config, folder, "config.json", "model_type", "'gemma3'", "gemma4_unified")
    refused(read_drafter_config, folder, "config.json", "model_type", "'gemma3'", "gemma4_assistant")


@pytest.mark.parametrize("name", ["E2B", "12B"])
def test_target_and_drafter_swapped(name: str, tmp_path: Path) -> None:
    refused(read_target_config, write(tmp_path, published_drafter(name)), "model_type", "drafter", "--drafter")
    refused(read_drafter_config, write(tmp_path, published_target(name)), "model_type", "is a target")


def test_vocab_sizes_disagree(tmp_path: Path) -> None:
    folder = write(tmp_path, published_target("E2B") | {"vocab_size": 1000})
    refused(read_target_config, folder, "config.json", "vocab_size", "text_config.vocab_size", "1000", "262144")
    assert target(tmp_path, published_target("E2B") | {"vocab_size": 262144}).text.vocab_size == 262144
    top_level = without(published_target("E2B"), "text_config.vocab_size") | {"vocab_size": 262144}
    assert target(tmp_path, top_level).text.vocab_size == 262144


@pytest.mark.parametrize("spelling", ["quantization", "quantization_config"])
def test_quantization(spelling: str, tmp_path: Path) -> None:
    router = "language_model.model.layers.0.router.proj"
    entry = {"group_size": 64, "bits": 4, router: {"group_size": 64, "bits": 8}, "embed_tokens": False}
    config = target(tmp_path, published_target("26B") | {spelling: entry})
    assert config.quantization == Quantization(64, 4, "affine", {router: Quantization(64, 8), "embed_tokens": False})
    mode = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert drafter(tmp_path, published_drafter("E2B") | {spelling: mode}).quantization == Quantization(32, 4, "mxfp4")


def test_no_quantization(tmp_path: Path) -> None:
    assert target(tmp_path, published_target("26B")).quantization is None
    assert target(tmp_path, published_target("26B") | {"quantization": None}).quantization is None


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_external_quantization(method: str, tmp_path: Path) -> None:
    entry = {"quant_method": method, "bits": 4, "group_size": 64}
    folder = write(tmp_path, published_target("E2B") | {"quantization_config": entry})
    refused(read_target_config, folder, "config.json", "quantization_config", method)
    folder = write(tmp_path, published_drafter("E2B") | {"quantization_config": entry})
    refused(read_drafter_config, folder, "config.json", "quantization_config", method)


def test_stop_ids(tmp_path: Path) -> None:
    """generation_config.json lists the most stop ids and comes first. config.json and its text config follow."""
    config = published_target("E2B")
    assert target(tmp_path, config).eos_token_ids == (1, 106)
    assert target(tmp_path, without(config, "eos_token_id")).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106, 50]}')
    assert target(tmp_path, config).eos_token_ids == (1, 106, 50)
    (tmp_path / "generation_config.json").write_text('{"top_k": 64}')
    assert target(tmp_path, config).eos_token_ids == (1, 106)
    none = without(without(config, "eos_token_id"), "text_config.eos_token_id")
    refused(read_target_config, write(tmp_path, none), "eos_token_id", "missing")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, (0.0, 0, 1.0)),
        ({"do_sample": True, "temperature": 0.8, "top_k": 64, "top_p": 0.95}, (0.8, 64, 0.95)),
        ({"do_sample": True, "top_k": 10}, (1.0, 10, 1.0)),
        ({"do_sample": False, "temperature": 1.0, "top_k": 64}, (0.0, 64, 1.0)),
        ({"temperature": 1.0}, (0.0, 0, 1.0)),
        # Zero is valid, also as "leave nothing out". Numbers have several spellings.
        ({"do_sample": False, "temperature": 0.0}, (0.0, 0, 1.0)),
        ({"do_sample": True, "temperature": 0}, (0.0, 0, 1.0)),
        ({"do_sample": True, "top_k": -1}, (1.0, 0, 1.0)),
        ({"do_sample": True, "top_p": 0}, (1.0, 0, 0.0)),
        ({"do_sample": True, "temperature": "0.7", "top_k": "40", "top_p": "0.9"}, (0.7, 40, 0.9)),
        ({"do_sample": "true", "top_k": 64.0, "top_p": 1}, (1.0, 64, 1.0)),
        ({"do_sample": True, "temperature": None, "top_k": None, "top_p": None}, (1.0, 0, 1.0)),
    ],
)
def test_sampling_defaults(
    generation: Json, expected: tuple[float, int, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The defaults follow Hugging Face: without do_sample, decoding is greedy."""
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    sampling = target(tmp_path, published_target("E2B")).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected
    assert not caplog.messages


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "warm"),
        ("top_k", 1.5),
        ("top_k", [64]),
        ("top_p", 2),
        ("top_p", True),
        ("min_p", "NaN"),
        ("repetition_penalty", 0),
        ("eos_token_id", "x"),
        ("suppress_tokens", [-1]),
    ],
)
def test_a_generation_config_never_makes_a_folder_unreadable(
    field: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7, field: value}))
    config = target(tmp_path, published_target("E2B"))
    assert config.sampling == SamplingDefaults(temperature=1.0, top_k=0 if field == "top_k" else 7)
    assert (config.eos_token_ids, config.suppress_tokens) == ((1, 106), ())
    (message,) = caplog.messages
    assert "generation_config.json" in message
    assert field in message


def test_a_generation_config_that_is_no_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in ('{"top_k": ', "[1]", ""):
        (tmp_path / "generation_config.json").write_text(text)
        config = target(tmp_path, published_target("E2B"))
        assert (config.sampling, config.eos_token_ids) == (SamplingDefaults(), (1, 106))
        assert "generation_config.json" in caplog.messages.pop()
        caplog.clear()


def test_what_is_honoured_of_a_generation_config_and_what_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"min_p": 0.1, "repetition_penalty": "1.2", "typical_p": 1.0, "num_beams": 1}))
    assert target(tmp_path, published_target("E2B")).sampling == SamplingDefaults(min_p=0.1, repetition_penalty=1.2)
    assert not caplog.messages
    path.write_text(json.dumps({"no_repeat_ngram_size": 3, "forced_eos_token_id": 1, "bad_words_ids": None}))
    target(tmp_path, published_target("E2B"))
    (message,) = caplog.messages
    assert "forced_eos_token_id 1, no_repeat_ngram_size 3" in message


@pytest.mark.parametrize(
    ("written", "expected"), [([2, 2.0, "3", None], (2, 3)), (5, (5,)), ([7, 10**6], (7,)), (None, ())]
)
def test_token_ids_in_every_spelling(written: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    """Ids outside of the vocabulary are not suppressed."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": written, "eos_token_id": "106"}))
    config = target(tmp_path, published_target("E2B"))
    assert (config.suppress_tokens, config.eos_token_ids) == (expected, (106,))
    assert target(tmp_path, changed(published_target("E2B"), "eos_token_id", [1.0, "5"])).eos_token_ids == (106,)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", "text_config.dtype"])
def test_dtype(field: str, tmp_path: Path) -> None:
    config = without(published_target("E2B"), "dtype")
    assert target(tmp_path, config).dtype is None
    assert target(tmp_path, changed(config, field, "float16")).dtype == "float16"


def test_draft_position(tmp_path: Path) -> None:
    for position in ("bonus", "last"):
        assert drafter(tmp_path, published_drafter("E2B") | {"draft_position": position}).draft_position == position
    folder = write(tmp_path, published_drafter("E2B") | {"draft_position": "next"})
    refused(read_drafter_config, folder, "config.json", "draft_position", "bonus", "last", "'next'")


def test_centroids_must_fit_the_vocabulary(tmp_path: Path) -> None:
    folder = write(tmp_path, published_drafter("E2B") | {"num_centroids": 2047})
    refused(read_drafter_config, folder, "num_centroids", "262144", "2047")
    folder = write(tmp_path, published_drafter("E2B") | {"centroid_intermediate_top_k": 2049})
    refused(read_drafter_config, folder, "centroid_intermediate_top_k", "2048", "2049")


@pytest.mark.parametrize("field", ["hidden_size_per_layer_input", "enable_moe_block"])
def test_drafter_with_target_parts(field: str, tmp_path: Path) -> None:
    config = published_drafter("E2B")
    config["text_config"] |= {"vocab_size_per_layer_input": 512, "num_experts": 8, "top_k_experts": 2}
    config["text_config"] |= {"moe_intermediate_size": 64, field: True if field == "enable_moe_block" else 256}
    refused(read_drafter_config, write(tmp_path, config), "config.json", "drafter", "not supported")


@pytest.mark.parametrize("read", [read_target_config, read_drafter_config])
def test_unreadable_files(read: Callable[[Path], Any], tmp_path: Path) -> None:
    refused(read, tmp_path / "absent", str(tmp_path / "absent"), "no such folder")
    refused(read, tmp_path, str(tmp_path), "no config.json")
    refused(read, write(tmp_path, '{"model_type": '), str(tmp_path / "config.json"), "JSON")
    refused(read, write(tmp_path, "[]"), str(tmp_path / "config.json"), "object", "list")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(read, tmp_path, str(tmp_path / "config.json"), "JSON")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(read, tmp_path, str(tmp_path / "config.json"))
