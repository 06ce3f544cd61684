"""The media parts of a checkpoint: their config, the tensors they need, and the errors for a bad folder."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import transformers
from support.paths import PUBLISHED
from support.tiny_media import random_mel, random_pixels

from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.checkpoints.layouts import audio_names, target_names, vision_names
from mlx_mtp.checkpoints.media_config import (
    AudioConfig,
    MediaConfig,
    MediaIds,
    UnifiedAudioConfig,
    UnifiedVisionConfig,
    VisionConfig,
    read_media_config,
)
from mlx_mtp.checkpoints.tensors import read_checkpoint
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.errors import ConfigError, WeightsError
from mlx_mtp.gemma4 import vision
from mlx_mtp.gemma4.audio import audio_model
from mlx_mtp.gemma4.media_towers import MediaTowers, load_media
from mlx_mtp.gemma4.vision import vision_model

Json = dict[str, Any]
TinyMedia = Callable[[str], Path]

# The media fields of published config.json files.
IDS = {
    "image_token_id": 258880,
    "audio_token_id": 258881,
    "video_token_id": 258884,
    "boi_token_id": 255999,
    "eoi_token_id": 258882,
    "boa_token_id": 256000,
    "eoa_token_index": 258883,
}
SMALL_VISION: Json = {
    "model_type": "gemma4_vision",
    "attention_bias": False,
    "default_output_length": 280,
    "global_head_dim": 64,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 16,
    "num_key_value_heads": 12,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": False,
    "use_clipped_linears": True,
}
LARGE_VISION: Json = {
    "model_type": "gemma4_vision",
    "default_output_length": 280,
    "global_head_dim": 72,
    "head_dim": 72,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "patch_size": 16,
    "standardize": True,
    "use_clipped_linears": False,
}
UNIFIED_VISION: Json = {
    "model_type": "gemma4_unified_vision",
    "mm_embed_dim": 3840,
    "mm_posemb_size": 1120,
    "model_patch_size": 48,
    "num_soft_tokens": 280,
    "output_proj_dims": 3840,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "rms_norm_eps": 1e-06,
}
AUDIO: Json = {
    "model_type": "gemma4_audio",
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_invalid_logits_value": -1e9,
    "attention_logit_cap": 50.0,
    "conv_kernel_size": 5,
    "gradient_clipping": 1e10,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "output_proj_dims": 1536,
    "residual_weight": 0.5,
    "rms_norm_eps": 1e-06,
    "subsampling_conv_channels": [128, 32],
    "use_clipped_linears": True,
}
UNIFIED_AUDIO: Json = {
    "model_type": "gemma4_unified_audio",
    "audio_embed_dim": 640,
    "audio_samples_per_token": 640,
    "hidden_size": 640,
    "output_proj_dims": 640,
    "rms_norm_eps": 1e-06,
}
MEDIA: dict[str, tuple[Json | None, Json | None]] = {
    "E2B": (SMALL_VISION, AUDIO),
    "31B": (LARGE_VISION, None),
    "12B": (UNIFIED_VISION, UNIFIED_AUDIO),
}
# Parameters in millions, without and with the projection to the text decoder.
VISION_MILLIONS = {"E2B": (167, 169), "31B": (570, 576), "12B": (35, 50)}
AUDIO_MILLIONS = {"E2B": (305, 307), "12B": (0, 2.46)}

# Fields that no computation needs, or whose other values are refused.
OPTIONAL = {
    "attention_chunk_size",
    "attention_context_right",
    "attention_invalid_logits_value",
    "default_output_length",
    "global_head_dim",
    "hidden_act",
    "model_type",
}
# Fields without which a shape or a computation would be a guess. The published config of 31B leaves out four fields.
REQUIRED = [
    *(("31B", f"vision_config.{name}") for name in LARGE_VISION.keys() - OPTIONAL),
    *(("12B", f"vision_config.{name}") for name in ("mm_embed_dim", "mm_posemb_size", "patch_size")),
    ("12B", "vision_config.pooling_kernel_size"),
    *(("12B", f"{name}.rms_norm_eps") for name in ("vision_config", "audio_config")),
    *(("E2B", f"audio_config.{name}") for name in AUDIO.keys() - OPTIONAL),
    ("12B", "audio_config.audio_embed_dim"),
    *(("E2B", name) for name in IDS.keys() - {"video_token_id", "eoa_token_index"}),
]
WRONG: list[tuple[str, str, Any]] = [
    ("E2B", "vision_config", []),
    ("E2B", "vision_config.model_type", "gemma4_unified_vision"),
    ("12B", "vision_config.model_type", "gemma4_vision"),
    ("E2B", "vision_config.hidden_size", 0),
    ("E2B", "vision_config.hidden_size", None),
    ("E2B", "vision_config.head_dim", 66),
    ("E2B", "vision_config.num_attention_heads", 13),
    ("E2B", "vision_config.pooling_kernel_size", "three"),
    ("E2B", "vision_config.position_embedding_size", None),
    ("E2B", "vision_config.standardize", 1),
    ("E2B", "vision_config.hidden_activation", "silu"),
    ("E2B", "vision_config.attention_bias", True),
    ("E2B", "vision_config.rope_parameters", 100),
    ("E2B", "vision_config.rope_parameters.rope_type", "yarn"),
    ("E2B", "vision_config.rope_parameters.rope_theta", -1),
    ("12B", "vision_config.output_proj_dims", 640),
    ("12B", "vision_config.model_patch_size", 16),
    ("12B", "audio_config.audio_samples_per_token", 320),
    ("E2B", "audio_config.hidden_act", "gelu"),
    ("E2B", "audio_config.hidden_size", 1020),
    ("E2B", "audio_config.attention_context_left", 1),
    ("E2B", "audio_config.attention_context_right", 2),
    ("E2B", "audio_config.attention_chunk_size", 24),
    ("E2B", "audio_config.subsampling_conv_channels", 128),
    ("E2B", "audio_config.subsampling_conv_channels", [128]),
    ("E2B", "audio_config.subsampling_conv_channels", [64, 32]),
    ("E2B", "audio_config.subsampling_conv_channels", [128, True]),
    ("E2B", "image_token_id", 262144),
    ("E2B", "boa_token_id", "<boa>"),
]


def published(name: str) -> Json:
    config: Json = json.loads((PUBLISHED / name / "config.json").read_text())
    vision_config, audio_config = MEDIA[name]
    return config | IDS | copy.deepcopy({"vision_config": vision_config, "audio_config": audio_config})


def media_config(folder: Path, config: Json) -> MediaConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_media_config(read_target_config(folder))


def place(config: Json, field: str) -> tuple[Json, str]:
    """Return the object that holds a field written with dots, and the field's own name."""
    *parents, name = field.split(".")
    for parent in parents:
        config = config[parent]
    return config, name


def test_published_configs(tmp_path: Path) -> None:
    config = media_config(tmp_path, published("E2B"))
    assert config.hidden_size == 1536
    assert config.vision == VisionConfig(768, 3072, 16, 12, 12, 64, 16, 3, 10240, 1e-6, 100.0, False, True)
    assert config.audio == AudioConfig(1024, 12, 8, (128, 32), 5, 12, 50.0, 0.5, 1e10, 1536, 1e-6, True)
    assert config.ids == MediaIds(258880, 255999, 258882, 258884, 258881, 256000, 258883)
    config = media_config(tmp_path, published("31B"))
    assert config.vision == VisionConfig(1152, 4304, 27, 16, 16, 72, 16, 3, 10240, 1e-6, 100.0, True, False)
    assert config.audio is None
    assert config.ids == MediaIds(image=258880, image_start=255999, image_end=258882, video=258884)
    config = media_config(tmp_path, published("12B"))
    assert config.vision == UnifiedVisionConfig(3840, 1120, 48, 1e-6)
    assert config.audio == UnifiedAudioConfig(640, 1e-6)


@pytest.mark.parametrize("is_null", [True, False])
def test_no_media(is_null: bool, tmp_path: Path) -> None:
    """A text-only config needs no ids."""
    config = {name: value for name, value in published("E2B").items() if name not in IDS}
    for name in ("vision_config", "audio_config"):
        config[name] = None
        if not is_null:
            del config[name]
    assert media_config(tmp_path, config) == MediaConfig(1536, False, None, None, MediaIds())


@pytest.mark.parametrize("name", MEDIA)
def test_resaved_config(name: str, tmp_path: Path) -> None:
    """transformers writes other fields when it saves a model again."""
    expected = media_config(tmp_path, published(name))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved: Json = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert media_config(tmp_path, saved | {"eos_token_id": 1}) == expected


def test_ids_in_other_spellings(tmp_path: Path) -> None:
    config = published("E2B")
    del config["eoa_token_index"], config["video_token_id"]
    ids = media_config(tmp_path, config | {"eoa_token_id": 258883}).ids
    assert (ids.audio_end, ids.video) == (258883, None)


@pytest.mark.parametrize(("name", "field"), sorted(REQUIRED))
def test_missing_field(name: str, field: str, tmp_path: Path) -> None:
    config = published(name)
    fields, last = place(config, field)
    del fields[last]
    with pytest.raises(ConfigError) as caught:
        media_config(tmp_path, config)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: field {field} is missing"


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_wrong_value(name: str, field: str, value: Any, tmp_path: Path) -> None:
    config = published(name)
    fields, last = place(config, field)
    fields[last] = value
    with pytest.raises(ConfigError) as caught:
        media_config(tmp_path, config)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: field {field} must ")
    assert str(caught.value).endswith(f"found {value!r}")


@pytest.mark.parametrize("name", MEDIA)
def test_parameter_counts(name: str, tmp_path: Path) -> None:
    """The counts are the published sizes. The models are lazy, so no weight is computed."""
    config = media_config(tmp_path, published(name))

    def millions(model: Any, projection: str) -> tuple[float, float]:
        sizes = {key: array.size / 1e6 for key, array in lazy_parameters(model).items()}
        total = sum(sizes.values())
        return total - sizes[f"{projection}.embedding_projection.weight"], total

    assert config.vision is not None
    model = vision_model(config.vision, config.hidden_size)
    assert millions(model, "embed_vision") == pytest.approx(VISION_MILLIONS[name], rel=0.01)
    if config.audio is not None:
        sound = audio_model(config.audio, config.hidden_size)
        assert millions(sound, "embed_audio") == pytest.approx(AUDIO_MILLIONS[name], rel=0.01, abs=0.01)


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_media: TinyMedia, tmp_path: Path) -> Path:
    """Return the folder of an E2B-like target that a test may damage."""
    shutil.copytree(tiny_media("e2b"), tmp_path / "target")
    return tmp_path / "target"


def edit(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> MediaTowers:
    file = folder / "model.safetensors"
    tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(file), tensors)
    return load_media(read_target_config(folder))


def test_parts_are_read_at_their_first_use(folder: Path) -> None:
    towers = edit(folder, lambda tensors: None)
    shutil.move(folder / "model.safetensors", folder / "moved")
    with pytest.raises(WeightsError, match="no model"):
        _ = towers.vision
    shutil.move(folder / "moved", folder / "model.safetensors")
    assert towers.vision is towers.vision
    (folder / "model.safetensors").unlink()
    assert towers.vision is not None
    assert towers.vision(mx.array(random_pixels(48, 96))).shape == (1, 2, 64)


def test_pictures_need_no_tensors_of_sound(folder: Path) -> None:
    def remove(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if "audio" in name]:
            del tensors[name]

    towers = edit(folder, remove)
    assert towers.vision is not None
    with pytest.raises(WeightsError, match="missing in all"):
        _ = towers.audio


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.1.mlp.up_proj.linear.weight",
        "vision_tower.encoder.layers.1.mlp.up_proj.input_min",
        "vision_tower.patch_embedder.position_embedding_table",
        "embed_vision.embedding_projection.weight",
        "audio_tower.layers.2.self_attn.per_dim_scale",
        "audio_tower.subsample_conv_projection.layer1.conv.weight",
        "audio_tower.output_proj.bias",
    ],
)
def test_wrong_tensor(name: str, folder: Path) -> None:
    """A tensor that is missing, is too large, or has another type is an error that names it and the folder."""
    key = f"model.{name}"
    tensors: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    tensor = tensors[key]
    mx.eval(tensor)

    def message(value: mx.array | None) -> str:
        def put(content: dict[str, mx.array]) -> None:
            content.pop(key, None)
            if value is not None:
                content[key] = value

        towers = edit(folder, put)
        with pytest.raises(WeightsError) as caught:
            _ = towers.audio if "audio" in name else towers.vision
        return str(caught.value)

    assert message(None) == f"{folder}: tensor {name} is missing (1 missing in all)"
    larger = mx.zeros([*tensor.shape[:-1], 5], tensor.dtype)
    assert message(larger).startswith(f"{folder}: tensor {key} has shape {list(larger.shape)}, expected ")
    assert f"{folder}: tensor {key} is I32, expected one of F32" in message(mx.zeros(tensor.shape, mx.int32))


def test_unexpected_tensor(folder: Path) -> None:
    towers = edit(folder, lambda tensors: tensors.update({"model.vision_tower.std_bias": mx.zeros(64)}))
    with pytest.raises(WeightsError, match=r"vision_tower.std_bias belongs to no part of the model"):
        _ = towers.vision


def test_unused_bounds(tiny_media: TinyMedia, tmp_path: Path) -> None:
    """Some conversions of 26B have bounds, though its config says that nothing is clipped."""
    shutil.copytree(tiny_media("26b"), tmp_path / "target")
    before = load_media(read_target_config(tmp_path / "target")).vision
    name = "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"
    after = edit(tmp_path / "target", lambda tensors: tensors.update({name: mx.array(0.1)})).vision
    assert before is not None
    assert after is not None
    pixels = mx.array(random_pixels(48, 48))
    assert mx.array_equal(before(pixels), after(pixels))


@pytest.mark.parametrize("variant", ["e2b", "12b"])
def test_tensors_belong_to_one_part(variant: str, tiny_media: TinyMedia) -> None:
    """Each tensor fills a part of the text decoder, of the vision model or of the audio model."""
    target = read_target_config(tiny_media(variant))
    media = read_media_config(target)
    assert media.vision is not None
    assert media.audio is not None
    for key in read_checkpoint(tiny_media(variant)):
        parts = [vision_names(key, media.vision), audio_names(key, media.audio), target_names(key, target)]
        # The layers that share K/V have projections that nothing uses.
        is_unused = "language_model.layers." in key and ("k_" in key or "v_" in key)
        assert sum(map(bool, parts)) == 1 or is_unused, key


def test_all_rows_of_sound_see_rows_before_them(tiny_media: TinyMedia) -> None:
    """Of the tower, only the convolutions look ahead, by three frames at most. A row depends on no later one."""
    towers = load_media(read_target_config(tiny_media("e2b")))
    assert towers.audio is not None
    mel = mx.array(random_mel(200))
    changed = mx.concatenate([mel[:100], mel[100:] + 1])
    before, after = towers.audio(mel), towers.audio(changed)
    same = mx.abs(before - after).max(-1)[0] == 0
    assert mx.all(same[:25])
    assert not mx.any(same[25:])


def test_scores_of_many_patches_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of 3000 patches at 8 heads are 288 MB. In parts of 16 MB, the peak is far below that."""
    monkeypatch.setattr(vision, "SCORE_BYTES", 1 << 24)
    queries, keys, values = (mx.random.normal((1, 8, 3000, 16), key=mx.random.key(i)) for i in range(3))
    mx.eval(queries, keys, values)
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    mx.eval(vision.attend_in_parts(queries, keys, values))
    assert mx.get_peak_memory() - start < 80e6
