"""The kernels for Metal and CUDA: their results are those of MLX's operations, and only right kernels are used.

Their source runs on the CPU, compiled as C++ (see support/simulated_kernels.py). The compiler of the ziglang package
checks the address spaces of the Metal source.
"""

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.paths import PUBLISHED, ROOT
from support.simulated_kernels import Simulated
from support.streams import SHORT
from support.tiny import VARIANTS, load_drafter, load_target

from mlx_mtp import OptionError
from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.decoding.exact import ExactTable
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kernel_sources import ADD_NORM, FUNCTIONS, METAL, METAL_PLACE, SOURCES, Source
from mlx_mtp.gemma4.kernels import (
    Kernels,
    attach,
    describe,
    device_kernels,
    in_use,
    make_kernels,
    remove_kernels,
    use_kernels,
)
from mlx_mtp.gemma4.layers import add_norm, fuse_projections, norm_and_rotate, spread_layer_scalars
from mlx_mtp.gemma4.target import Target

TinyPair = Callable[[str], Path]
LANGUAGES = ("metal", "cuda")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def simulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Kernels]:
    for language in LANGUAGES:
        monkeypatch.setattr(mx.fast, f"{language}_kernel", partial(Simulated, folder, language))
    return make_kernels


def prepare(network: Target | Drafter, kernels: Kernels | None = None) -> None:
    """Arrange the weights of a network as `load` does, and use the kernels without a check."""
    layers = network.layers if isinstance(network, Target) else network.model.layers
    fuse_projections(layers)
    spread_layer_scalars(layers)
    if kernels is not None:
        attach(network, kernels, lambda *_: True)


def networks(folder: Path, *, bits: int | None = None) -> tuple[Target, Drafter]:
    """Load a tiny pair as `load` does, except for the kernels."""
    target, _ = load_target(folder / "target")
    drafter, _ = load_drafter(folder / "target-assistant")
    for network in (target, drafter):
        if bits is not None:
            nn.quantize(network, 32, bits, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
        prepare(network)
    return target, drafter


def rounds(target: Target, drafter: Drafter) -> tuple[list[list[int]], mx.array]:
    stream = Stream(target, drafter, max_draft_tokens=3)
    reports = [stream.prefill(SHORT, 64), *(stream.round(k) for k in (0, 3, 1, 3))]
    return [report.tokens for report in reports], stream.state.hidden


@pytest.mark.parametrize(("variant", "language"), [*((variant, "metal") for variant in VARIANTS), ("e2b", "cuda")])
def test_rounds_with_kernels_are_the_rounds_without(
    tiny_pair: TinyPair, simulated: Callable[[str], Kernels], variant: str, language: str
) -> None:
    target, drafter = networks(tiny_pair(variant))
    expected, hidden = rounds(target, drafter)
    assert describe(target) == "none"
    for network in (target, drafter):
        attach(network, simulated(language))
        n = in_use(network).layers
        assert describe(network) == f"add_norm in {n} of {n} layers, norm_rotate in {n} of {n} layers"
    tokens, found = rounds(target, drafter)
    assert tokens == expected
    np.testing.assert_allclose(found, hidden, atol=1e-4)
    remove_kernels(target)
    assert in_use(target) == (len(target.layers), 0, 0, False)


# Every pair of a type, a number of bits and a language. The number of bits is no part of a compiled kernel's text.
@pytest.mark.parametrize(
    ("dtype", "bits", "language"),
    [
        (mx.float32, 2, "metal"),
        (mx.float32, 4, "cuda"),
        (mx.float32, 8, "metal"),
        (mx.float16, 2, "cuda"),
        (mx.float16, 4, "metal"),
        (mx.float16, 8, "cuda"),
        (mx.bfloat16, 2, "metal"),
        (mx.bfloat16, 4, "cuda"),
        (mx.bfloat16, 8, "metal"),
    ],
)
def test_each_type_and_quantized_tables(
    tiny_pair: TinyPair, simulated: Callable[[str], Kernels], dtype: mx.Dtype, bits: int, language: str
) -> None:
    for network in networks(tiny_pair("e2b"), bits=bits):
        network.set_dtype(dtype)
        attach(network, simulated(language))
        used = in_use(network)
        assert used == (used.layers, used.layers, used.layers, True)
        assert describe(network).endswith(", table_rows")


@pytest.mark.parametrize("bits", [3, 6])
def test_tables_whose_values_cross_words_keep_their_operations(
    tiny_pair: TinyPair, simulated: Callable[[str], Kernels], bits: int
) -> None:
    target, _ = networks(tiny_pair("e2b"), bits=bits)
    attach(target, simulated("metal"))
    assert not in_use(target).table_rows


@pytest.mark.parametrize("name", ["E2B", "12B", "31B"])
def test_the_published_sizes(simulated: Callable[[str], Kernels], name: str) -> None:
    """A row of 31B is longer than the number of values that a group of threads reads at once."""
    config = read_target_config(PUBLISHED / name).text
    layers = tuple({(layer.layer_type, layer.has_kv): layer for layer in config.layers}.values())
    narrow = tuple(replace(layer, intermediate_size=8, kv_layer=i) for i, layer in enumerate(layers))
    config = replace(config, vocab_size=8, per_layer_vocab_size=8, layers=narrow)
    few_heads = replace(config, num_attention_heads=max(layer.num_kv_heads for layer in layers))
    size, offset = config.hidden_size, mx.array(5000, mx.int32)

    wide = Target(few_heads)
    prepare(wide, simulated("metal"))
    x, h = 10 * mx.random.normal((2, 1, 2, size), key=mx.random.key(1))
    for layer in wide.layers:
        layer.post_attention_layernorm.weight = mx.random.normal((size,), key=mx.random.key(2))
        arguments = x, layer.post_attention_layernorm, h, layer.layer_scalar * 0.7, wide.norm
        for found, expected in zip(layer.add_norm(*arguments), add_norm(*arguments), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-4)

    many_heads = Target(replace(config, hidden_size=64))
    prepare(many_heads, simulated("metal"))
    for attention in (layer.self_attn for layer in many_heads.layers):
        projected = attention.project(x[..., :64], offset)
        attention.norm_and_rotate = norm_and_rotate
        for one, other in zip(projected, attention.project(x[..., :64], offset), strict=True):
            if one is not None and other is not None:
                np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-4)


class Spoiled(Simulated):
    """A kernel whose results go through `spoil`."""

    spoil: Callable[[list[mx.array]], list[mx.array]]

    def __call__(self, **arguments: Any) -> list[mx.array]:
        return type(self).spoil(super().__call__(**arguments))


def refuse(_: list[mx.array]) -> list[mx.array]:
    raise RuntimeError("the compiler of this device says no")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda outs: [out * 1.01 for out in outs], "it gives other values than MLX's operations"),
        (lambda outs: [out * mx.nan for out in outs], "it gives other values than MLX's operations"),
        # The bits of a row depend on the number of rows.
        (lambda outs: [out + 1e-6 * (out.size > 600) for out in outs], "it gives other values than MLX's operations"),
        (refuse, "the compiler of this device says no"),
    ],
    ids=["wrong values", "not numbers", "other bits", "an error"],
)
def test_a_kernel_that_does_not_work_is_not_used(
    tiny_pair: TinyPair,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[list[mx.array]], list[mx.array]],
    says: str,
) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", partial(Spoiled, folder, "metal"))
    monkeypatch.setattr(Spoiled, "spoil", staticmethod(spoil), raising=False)
    target, drafter = networks(tiny_pair("12b"), bits=4)
    expected, _ = rounds(target, drafter)
    with caplog.at_level(logging.WARNING):
        attach(target, make_kernels("metal"))
    # Sliding and full layers have projections of two shapes.
    names = ["add_norm", "norm_rotate", "norm_rotate", "table_rows"]
    assert [record.getMessage() for record in caplog.records] == [f"the kernel {n} is not used: {says}" for n in names]
    assert in_use(target) == (len(target.layers), 0, 0, False)
    assert rounds(target, drafter)[0] == expected


def test_there_are_none_on_the_cpu(tiny_pair: TinyPair) -> None:
    target, _ = networks(tiny_pair("e2b"))
    assert device_kernels() is None
    use_kernels(target)
    assert in_use(target) == (len(target.layers), 0, 0, False)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_device_decides_the_language(
    simulated: Callable[[str], Kernels], monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for other in LANGUAGES:
        monkeypatch.setattr(getattr(mx, other), "is_available", lambda other=other: other == language)
    found = device_kernels()
    assert found is not None
    assert {kernel.language for kernel in found} == {language}  # type: ignore[attr-defined]
    monkeypatch.setenv("MLX_MTP_KERNELS", "off")
    assert device_kernels() is None
    monkeypatch.setenv("MLX_MTP_KERNELS", "no")
    with pytest.raises(OptionError, match="MLX_MTP_KERNELS must be 'on' or 'off', found 'no'"):
        device_kernels()


def metal_errors(body: str, inputs: tuple[str, ...], outputs: tuple[str, ...], folder: Path) -> str:
    """Return the errors of a compiler that checks the address spaces of a Metal kernel."""
    text = [(ROOT / "tests" / "support" / "metal_words.h").read_text(), METAL.replace("#include <metal_stdlib>", "")]
    numbers = "WIDTH", "DIM", "THREADS", "HEADS", "KV_HEADS", "WEIGHT_STEP", "BITS", "GROUP_SIZE"
    flags = "HAS_SCALE", "HAS_FOLLOWING", "KEYS_ARE_VALUES"
    text += [FUNCTIONS, "typedef float T;", *(f"constexpr __constant int {name} = 4;" for name in numbers)]
    text += [f"constexpr __constant bool {name} = true;" for name in flags]
    arguments = [f"const device {'unsigned int' if n in ('table', 'tokens') else 'T'}* {n}" for n in inputs]
    arguments += [f"device T* {name}" for name in outputs]
    text.append(f"__kernel void compute({', '.join(arguments)}, const device int* x_shape,")
    text.append("  uint3 threadgroup_position_in_grid, uint3 thread_position_in_threadgroup) {")
    text.append(f"{METAL_PLACE} {body} }}")
    file = folder / "kernel.clcpp"
    file.write_text("\n".join(text))
    command = [sys.executable, "-m", "ziglang", "clang", "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc"]
    command += ["--target=spir64-unknown-unknown", "-fsyntax-only", str(file)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_metal_source_has_right_address_spaces(source: Source, tmp_path: Path) -> None:
    assert metal_errors(source.body, source.inputs, source.outputs, tmp_path) == ""


def test_a_wrong_address_space_is_an_error(tmp_path: Path) -> None:
    wrong = ADD_NORM.replace("sum_of_group(squares, sums,", "sum_of_group(squares, x,")
    errors = metal_errors(wrong, ("x", "h", "weight", "scale", "following", "eps"), ("new_h", "normed"), tmp_path)
    assert "address space" in errors or "no matching function" in errors


def test_a_network_with_kernels_is_freed_at_once(tiny_pair: TinyPair, simulated: Callable[[str], Kernels]) -> None:
    """No kernel holds a part of the network, so closing a model frees its weights without a garbage collection."""
    target, _ = networks(tiny_pair("e2b"))
    attach(target, simulated("metal"))
    parts = [weakref.ref(layer.self_attn) for layer in target.layers]
    gc.disable()
    try:
        del target
        assert not any(part() for part in parts)
    finally:
        gc.enable()


def test_every_table_is_checked(tiny_pair: TinyPair, simulated: Callable[[str], Kernels]) -> None:
    target, _ = networks(tiny_pair("e2b"), bits=4)
    names: list[str] = []

    def accept(name: str, *_: Any) -> bool:
        names.append(name)
        return True

    attach(target, simulated("metal"), accept)
    assert names.count("table_rows") == 2
    target.update_modules({"embed_tokens": ExactTable(target.embed_tokens, "apart")})
    assert not in_use(target).table_rows
