"""Fused projections: the same results, from weights that are in memory only once."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from support.tiny import VARIANTS, WINDOW, load_drafter, load_target, random_tokens

import mlx_mtp
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.layers import fuse_projections, lay_out_weights
from mlx_mtp.gemma4.target import Target

TinyPair = Callable[[str], Path]
ON_CPU = mx.default_device() == mx.Device(mx.cpu)


def logits(target: Target) -> mx.array:
    """Return the logits of a chunk and of a block after it, across the ring's end."""
    cache = Cache(target.config, target.dtype, max_block=5)
    tokens = random_tokens(2 * WINDOW + 5, seed=1)
    first = target(mx.array([tokens[:-5]]), cache, 3).logits
    cache.set_length(len(tokens) - 5)
    return mx.concatenate([first, target(mx.array([tokens[-5:]]), cache, 5).logits], axis=1)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_projections_compute_the_same(tiny_pair: TinyPair, variant: str, bits: int | None) -> None:
    target = load_target(tiny_pair(variant) / "target")[0]
    if bits:
        nn.quantize(target, 64, bits)
    size = sum(value.nbytes for value in lazy_parameters(target).values())
    expected = logits(target)
    mx.eval(expected)
    before = mx.get_active_memory()
    fuse_projections(target.layers)
    # Fusion adds scales of queries and keys. The allocator can give a little more than asked for. A second copy would
    # be a sixth of the size or more.
    scales = sum(value.nbytes for name, value in lazy_parameters(target).items() if name.endswith("qk_scale"))
    assert mx.get_active_memory() < before + scales + size / 20
    assert mx.abs(logits(target) - expected).max() < 1e-5
    assert not [name for name in lazy_parameters(target) if "gate_proj" in name and "experts" not in name]
    attention = [set(layer.self_attn) for layer in target.layers]
    for layer, parts in zip(target.config.layers, attention, strict=True):
        assert ("qkv_proj" in parts) == layer.has_kv
        assert ("q_proj" in parts) != layer.has_kv


def lies_by_input(projection: nn.Module) -> bool:
    weight: mx.array = projection.weight
    return memoryview(weight).strides == (weight.itemsize, weight.itemsize * weight.shape[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_laid_out_by_input_compute_the_same(tiny_pair: TinyPair, variant: str, tmp_path: Path) -> None:
    target = load_target(tiny_pair(variant) / "target")[0]
    expected = logits(target)
    mx.eval(expected)
    target.save_weights(str(tmp_path / "before.safetensors"))
    before = mx.get_active_memory()
    lay_out_weights(target)
    size = sum(value.nbytes for value in lazy_parameters(target).values())
    assert mx.get_active_memory() < before + size / 20
    assert lies_by_input(target.layers[0].mlp.down_proj) == ON_CPU
    assert mx.abs(logits(target) - expected).max() < 1e-5
    target.save_weights(str(tmp_path / "after.safetensors"))
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()


def test_only_float32_weights_on_the_cpu_are_laid_out(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlx_mtp.load(tiny_pair("31b") / "target")
    assert model.drafter is not None
    assert lies_by_input(model.target.layers[0].mlp.gate_up_proj) == ON_CPU
    assert lies_by_input(model.drafter.pre_projection) == ON_CPU
    target = load_target(tiny_pair("31b") / "target")[0]
    projection = target.layers[0].mlp.down_proj
    kept = projection.weight
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        lay_out_weights(target)
    assert projection.weight is kept
    target.set_dtype(mx.bfloat16)
    kept = projection.weight
    lay_out_weights(target)
    assert projection.weight is kept


def test_loaded_pairs_are_fused(tiny_pair: TinyPair) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    assert model.drafter is not None
    assert all("gate_up_proj" in layer.mlp for layer in [*model.target.layers, *model.drafter.model.layers])
    plain = load_drafter(tiny_pair("e2b") / "target-assistant")[0]
    assert not any("gate_up_proj" in layer.mlp for layer in plain.model.layers)


def test_projections_of_different_precision_stay_apart(tiny_pair: TinyPair) -> None:
    """mlx-lm's mixed recipes give some values a higher precision."""
    target = load_target(tiny_pair("31b") / "target")[0]

    def precision(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 64, "bits": 6 if "v_proj" in path or "up_proj" in path else 4}

    nn.quantize(target, class_predicate=precision)
    expected = logits(target)
    fuse_projections(target.layers)
    sliding = [layer for layer in target.layers if layer.self_attn.get("v_proj") is not None]
    assert sliding
    assert not any("qkv_proj" in layer.self_attn for layer in sliding)
    assert all("gate_proj" in layer.mlp for layer in target.layers)
    assert mx.array_equal(logits(target), expected)
