"""A device that computes products with small quantized weights wrong: one error at load names the product."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from support.tiny import load_target

from mlx_mtp import DeviceError
from mlx_mtp.gemma4.device_checks import check_products
from mlx_mtp.gemma4.target import Target

PRODUCT = mx.quantized_matmul


@pytest.fixture
def target(tiny_pair: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Target:
    target, _ = load_target(tiny_pair("e2b") / "target")
    nn.quantize(target, 32, 4, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    return target


def refuse(*_: Any, **__: Any) -> mx.array:
    raise RuntimeError("No implementation for problem shape")


@pytest.mark.parametrize(
    ("product", "problem"),
    [
        (
            lambda x, w, *rest, **how: PRODUCT(x, w, *rest, **how) * (1 + 0.3 * (x.shape[1] == 9)),
            "values differ by 0.3 ",
        ),
        (lambda x, w, *rest, **how: PRODUCT(x, w, *rest, **how) * mx.nan, "values differ by nan"),
        (refuse, "No implementation"),
    ],
    ids=["wrong values of nine rows", "not numbers", "no kernel"],
)
def test_a_wrong_product_is_an_error(
    target: Target, monkeypatch: pytest.MonkeyPatch, product: Callable[..., mx.array], problem: str
) -> None:
    check_products(target, target.dtype)
    monkeypatch.setattr(mx, "quantized_matmul", product)
    pattern = (
        rf"^\S+: this device cannot multiply mlx.core.float32 activations by 4 bit weights \[\d+, \d+\] \({problem}"
    )
    with pytest.raises(DeviceError, match=pattern):
        check_products(target, target.dtype)


def test_the_cpu_needs_no_check(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "quantized_matmul", refuse)
    check_products(target, target.dtype)
