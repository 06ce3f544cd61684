"""The kernels of a Mac on other devices: MLX's norm, rotation and attention as one operation each.

On the CPU backend, each of them is many operations. The results of the replacements have no meaning, but their graphs
have the size that they have on a Mac.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kernels import Kernels, attach
from mlx_mtp.gemma4.target import Target

FAST_FUNCTIONS = ("rms_norm", "rope", "scaled_dot_product_attention")


@contextmanager
def countable_kernels() -> Iterator[None]:
    """Replace the kernels, and dequantization, with one operation that depends on all their inputs."""

    def dequantize(w: mx.array, scales: mx.array, *others: Any, group_size: int, bits: int, **_: Any) -> mx.array:
        values = mx.broadcast_to(scales[..., None], (*scales.shape, group_size)).reshape(*scales.shape[:-1], -1)
        return _stand_in(values, [w, *others])

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return _stand_in(x, [weight])

    def rope(x: mx.array, dims: int, *, offset: Any, freqs: Any = None, **_: Any) -> mx.array:
        return _stand_in(x, [offset, freqs])

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any) -> mx.array:
        return _stand_in(q, [k, v, mask])

    with _replaced(rms_norm, rope, attention), patch.object(mx, "dequantize", dequantize):
        yield


def use_countable_kernels(network: Target | Drafter) -> None:
    """Let a network use the kernels of this project, each as one operation."""

    def launch(
        *, inputs: list[mx.array], output_shapes: list[tuple[int, ...]], output_dtypes: list[mx.Dtype], **_: Any
    ) -> list[mx.array]:
        dtype = output_dtypes[0]
        first = next(array for array in inputs if array.dtype == dtype)
        one = _stand_in(first, inputs).reshape(-1)[:1]
        return [mx.broadcast_to(one, shape) for shape in output_shapes]

    attach(network, Kernels(*[launch] * len(Kernels._fields)), lambda *_: True)


def _stand_in(x: mx.array, others: list[Any]) -> mx.array:
    """Return one operation that depends on all inputs."""
    arrays = [other for other in others if isinstance(other, mx.array)]
    return mx.softmax(mx.depends([x], arrays)[0], axis=-1)


@contextmanager
def quick_kernels() -> Iterator[None]:
    """Replace the kernels with one operation whose call takes the host as little time as a call of MLX's function."""
    softmax, depends = mx.softmax, mx.depends

    def of_first(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return softmax(x, -1)

    def attention(q: mx.array, k: Any, v: Any, **_: Any) -> mx.array:
        # The dependency makes MLX write the K/V.
        return softmax(depends(q, [k, v]), -1)

    with _replaced(of_first, of_first, attention):
        yield


@contextmanager
def _replaced(*replacements: Callable[..., mx.array]) -> Iterator[None]:
    with ExitStack() as patches:
        for name, replacement in zip(FAST_FUNCTIONS, replacements, strict=True):
            patches.enter_context(patch.object(mx.fast, name, replacement))
        yield
