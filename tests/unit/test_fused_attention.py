"""The fused attention kernel: it is used where a check shows that it works, and its rows are split as it demands.

A function stands for the kernel of an accelerator, with its limits. The CPU has no such kernel.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import load_drafter, load_target, make_target

from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.decoding import prefill
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4 import fused_attention
from mlx_mtp.gemma4.fused_attention import choose_fused_attention, describe, fused_rows, fuses_all_prefill
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.memory_plan import planner

ATTENTION = mx.fast.scaled_dot_product_attention


class Kernel:
    """A fused kernel that takes at most 32 pairs of a row and a query head. `calls` lists the rows of its calls.

    With `takes_chunks`, it also takes more than 32 rows.
    """

    def __init__(self, spoil: Callable[[mx.array], mx.array] = lambda out: out, *, takes_chunks: bool = False) -> None:
        self.spoil = spoil
        self.takes_chunks = takes_chunks
        self.calls: list[int] = []

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, force_fused: bool = False
    ) -> mx.array:
        if not force_fused:
            return ATTENTION(q, k, v, scale=scale, mask=mask)
        if self.takes_chunks and q.shape[2] > 32:
            self.calls.append(q.shape[2])
            return self.spoil(ATTENTION(q, k, v, scale=scale, mask=mask))
        if q.shape[2] > 8 or q.shape[2] * q.shape[1] // k.shape[1] > 32:
            raise ValueError("no fused kernel for this many rows")
        self.calls.append(q.shape[2])
        rows = [
            ATTENTION(q[:, :, row : row + 1], k, v, scale=scale, mask=mask[row : row + 1]) for row in range(q.shape[2])
        ]
        return self.spoil(mx.concatenate(rows, axis=2))


@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(8, 1, 4), (8, 2, 8), (16, 1, 2), (16, 4, 8), (64, 1, 0)])
def test_the_number_of_rows_of_a_call(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, rows: int) -> None:
    kernel = Kernel()
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    assert fused_rows(heads, kv_heads, 512, mx.bfloat16) == rows
    assert set(kernel.calls) == set(range(1, rows + 1))


def test_there_is_none_on_the_cpu() -> None:
    assert fused_rows(8, 1, 512, mx.float32) == 0


def raise_late(_: mx.array) -> mx.array:
    raise RuntimeError("too many threads for this pipeline")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out * 1.1,
        lambda out: out * mx.nan,
        # The bits of a row depend on the number of rows.
        lambda out: out + 1e-6 * (out.shape[2] > 1),
        raise_late,
    ],
    ids=["wrong values", "not numbers", "other bits", "an error"],
)
def test_a_kernel_that_does_not_work_is_not_used(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[mx.array], mx.array]
) -> None:
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", Kernel(spoil))
    assert fused_rows(8, 1, 512, mx.float32) == 0


@pytest.mark.parametrize("variant", ["e2b", "12b"])
def test_rounds_with_the_kernel_are_the_rounds_without(
    tiny_pair: Any, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Verify passes of nine rows are split. Chunks of the prompt and quantized K/V do not use the kernel."""
    target, _ = load_target(tiny_pair(variant) / "target")
    drafter, _ = load_drafter(tiny_pair(variant) / "target-assistant")
    heads = {layer.self_attn.head_dim for layer in target.layers}
    monkeypatch.setattr(fused_attention, "_LARGE_HEAD", max(heads))
    prompt = [(5 * i + 3) % 500 for i in range(40)]

    def run() -> tuple[list[list[int]], mx.array]:
        stream = Stream(target, drafter, max_draft_tokens=8)
        reports = [stream.prefill(prompt, 64), *(stream.round(k) for k in (0, 8, 3, 8))]
        return [report.tokens for report in reports], stream.state.hidden

    expected, hidden = run()
    assert describe(target) == dict.fromkeys(("sliding_attention", "full_attention"), "as MLX chooses")
    kernel = Kernel()
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    for layers in (target.layers, drafter.model.layers):
        choose_fused_attention(layers, mx.float32)
    rows = max(layer.self_attn.fused_rows for layer in target.layers)
    assert describe(target)["sliding_attention"] == "as MLX chooses"
    assert describe(target)["full_attention"] == f"MLX's fused kernel, {rows} rows a call"
    kernel.calls.clear()
    tokens, found = run()
    assert tokens == expected
    np.testing.assert_allclose(found, hidden, atol=1e-4)
    assert max(kernel.calls) == rows
    assert 9 % rows in kernel.calls


def test_a_kernel_for_prompts_needs_no_small_chunks(tiny_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores in memory make the chunks of a prompt small. If a kernel takes chunks, there are none of full layers."""
    target, _ = load_target(tiny_pair("e2b") / "target")
    config = target.config
    monkeypatch.setattr(fused_attention, "_LARGE_HEAD", max(layer.head_dim for layer in config.layers))
    monkeypatch.setattr(prefill, "SCORE_BYTES", 4 * config.num_attention_heads * (config.sliding_window + 64) * 64)
    prompt = [(5 * i + 3) % 500 for i in range(600)]

    def read(kv: KVQuantization | None = None) -> tuple[list[int], mx.array]:
        ends: list[int] = []
        stream = Stream(target, None, max_draft_tokens=0, kv_quantization=kv)
        stream.prefill(prompt, 64, lambda end, _: ends.append(end))
        return ends, stream.state.hidden

    assert not fuses_all_prefill(config, mx.float32)
    small, expected = read()
    assert max(end - start for start, end in itertools.pairwise(small)) == 32
    kernel = Kernel(takes_chunks=True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    choose_fused_attention(target.layers, mx.float32)
    assert describe(target)["full_attention"].endswith(", also for prompts")
    kernel.calls.clear()
    large, found = read()
    assert large == [*range(64, 600, 64), 600]
    assert 64 in kernel.calls
    assert fuses_all_prefill(config, mx.float32)
    # Attention over quantized K/V has scores in memory.
    quantized, _ = read(KVQuantization(8, 32, 0))
    assert max(end - start for start, end in itertools.pairwise(quantized)) == 32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_memory_plan_knows_the_kernel_for_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has no scores of full-attention layers where the kernel takes the prompt, but chunks of full size."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    make_target(tmp_path, "31b", **sizes)
    config = read_target_config(tmp_path)
    monkeypatch.setattr(fused_attention, "_LARGE_HEAD", max(layer.head_dim for layer in config.text.layers))

    def work(kv: KVQuantization | None = None) -> list[int]:
        plan = planner(config, None, max_block=1, prefill_step=512, kv=kv)
        return [plan(length).work for length in (2000, 4000)]

    small, large = work()
    assert large > 1.5 * small
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", Kernel(takes_chunks=True))
    fused_small, fused_large = work()
    assert fused_small < small
    assert fused_large < 1.2 * fused_small
    # A text with quantized K/V has the scores. It begins without them, here with larger chunks.
    kv = KVQuantization(8, 32, 1000)
    assert work(kv) == [small, large]
    text = config.text
    monkeypatch.setattr(prefill, "SCORE_BYTES", 4 * text.num_attention_heads * (text.sliding_window + 512) * 512)
    assert work(kv) == work()
