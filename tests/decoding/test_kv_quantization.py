"""Quantized K/V: attention equals plain numpy, drafting is lossless, buffers are small and updated in place."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.caches import two_layers, unquantized
from support.commands import run as run_command
from support.streams import Models, Scripted
from support.tiny import load_target, make_target, random_tokens

import mlx_mtp
from mlx_mtp import generate
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.exact import check_exact, make_exact
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import CAPACITY_STEP, Cache, KVQuantization, KVRows, Quantized, View
from mlx_mtp.gemma4.layers import Attention, attend
from mlx_mtp.gemma4.target import Target

TinyPair = Callable[[str], Path]

PROMPT = random_tokens(53, seed=2)
VARIANTS = ("e2b", "12b", "31b")
EIGHT, FOUR = KVQuantization(8, 32, 0), KVQuantization(4, 32, 0)


def run(
    target: Target,
    drafter: Drafter | None,
    k: int,
    kv: KVQuantization | None,
    *,
    prompt: list[int] = PROMPT,
    max_tokens: int = 100,
    step: int = 64,
    rounds: CompiledRounds | None = None,
) -> list[int]:
    stream = Stream(target, drafter, max_draft_tokens=8, rounds=rounds, kv_quantization=kv)
    results = decode(
        stream, prompt, max_tokens=max_tokens, num_draft_tokens=k, stop_ids=frozenset(), prefill_step_size=step
    )
    return [token for result in results for token in result.tokens]


@pytest.mark.parametrize(
    ("variant", "bits", "start"),
    [("e2b", 8, 0), ("e2b", 4, 70), ("12b", 8, 30), ("12b", 4, 0), ("31b", 8, 70), ("31b", 4, 30)],
)
def test_speculative_greedy_is_plain_greedy(tiny_models: Models, variant: str, bits: int, start: int) -> None:
    """Draft lengths are short and long. Quantization starts at the first row, in the prompt, or later in the text.

    One drafter is right except for the last token of a block. Another drafter is random.
    """
    target, drafter = tiny_models(variant)
    kv = KVQuantization(bits, 32, start)
    plain = run(target, None, 0, kv, max_tokens=40)
    assert len(set(plain)) > 10
    for k in (1, 3, 8):
        scripted = Scripted(drafter, PROMPT, plain, (k - 1,))
        # Other ends of prefill chunks and compiled rounds change nothing.
        step = 7 if k % 2 else 64
        assert run(target, scripted, k, kv, rounds=CompiledRounds(), step=step, max_tokens=40) == plain
        if k in (3, 8):
            rounds = CompiledRounds() if k == 3 else None
            assert run(target, drafter, k, kv, rounds=rounds, max_tokens=40) == plain


def test_compiled_rounds_before_and_after_the_start_are_not_mixed_up(tmp_path: Path) -> None:
    """Several kinds of streams share the rounds. A full-attention layer comes before another layer that owns K/V."""
    make_target(tmp_path / "target", "12b", layer_types=["sliding_attention", "full_attention"] * 3)
    target = load_target(tmp_path / "target")[0]
    prompt, rounds = random_tokens(245, seed=5), CompiledRounds()
    for kv in (None, EIGHT, FOUR, KVQuantization(4, 32, 265), None):
        eager = run(target, None, 0, kv, prompt=prompt, max_tokens=40)
        assert run(target, None, 0, kv, prompt=prompt, max_tokens=40, rounds=rounds) == eager
    kinds = {(shape.visible, shape.quantized_as) for shape in rounds.traces}
    assert {kind for rows, kind in kinds if rows == 2 * CAPACITY_STEP} == {None, EIGHT, FOUR}


def test_rows_are_quantized_once_the_start_is_reached(tiny_models: Models) -> None:
    """Quantization begins exactly at the start, and only for full attention."""
    target, _ = tiny_models("12b")
    stream = Stream(target, None, max_draft_tokens=4, kv_quantization=KVQuantization(8, 32, 60))
    stream.prefill(PROMPT, 64)
    assert stream.longest_draft() == 4
    longest = []
    for _ in range(7):
        stream.round(0)
        assert not stream.cache.is_quantized
        assert not any(isinstance(rows, Quantized) for rows in stream.cache.keys.values())
        longest.append(stream.longest_draft())
    assert longest == [4, 4, 3, 2, 1, 0, 4]
    stream.round(0)
    assert stream.cache.is_quantized
    for buffers in (stream.cache.keys, stream.cache.values):
        for index, rows in buffers.items():
            is_full = target.config.layers[index].layer_type == "full_attention"
            assert isinstance(rows, Quantized) == is_full
    # After a rollback the rows stay quantized.
    stream.cache.set_length(20)
    stream.round(0)
    assert stream.cache.is_quantized


def dequantized(rows: KVRows) -> np.ndarray:
    """Dequantize rows in plain numpy, [1, kv_heads, rows, head_dim]."""
    assert isinstance(rows, Quantized)
    packed = np.array(rows.packed)
    shifts = np.arange(0, 32, rows.bits, dtype=np.uint32)
    levels = (packed[..., None] >> shifts) & np.uint32(2**rows.bits - 1)
    grouped = levels.reshape(*packed.shape[:-1], -1, rows.group_size).astype(np.float64)
    values: np.ndarray = grouped * np.array(rows.scales)[..., None] + np.array(rows.biases)[..., None]
    return values.reshape(*packed.shape[:-1], -1)


def reference(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    group = queries.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = np.where(mask, queries.astype(np.float64) @ keys.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: np.ndarray = (weights / weights.sum(axis=-1, keepdims=True)) @ values
    return result


# Each group size divides the head.
SHAPES = [
    (*shape, group_size)
    for shape in ((4, 1, 32), (4, 2, 64), (2, 2, 128))
    for group_size in (32, 64, 128)
    if group_size <= shape[-1]
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_attention_is_that_over_dequantized_rows(
    bits: int, group_size: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Cases: one row, a verify pass and a chunk, rows beyond the mask, and buffers with more rows than are read."""
    rng = np.random.default_rng(0)
    total, seen = 48, 40
    keys, values = (
        Quantized(*mx.quantize(mx.array(rng.normal(size=(1, kv_heads, total, head_dim)), mx.float32), group_size, bits),
                  bits, group_size)
        for _ in range(2)
    )  # fmt: skip
    keys, values = (rows.each(lambda part: part[:, :, :seen]) for rows in (keys, values))
    for length in (1, 4, 30):
        queries = mx.array(rng.normal(size=(1, heads, length, head_dim)) * head_dim**-0.5, mx.float32)
        mask = mx.arange(seen)[None] <= (mx.arange(length)[:, None] + 9)
        found = attend(queries, keys, values, mask)
        expected = reference(np.array(queries), dequantized(keys), dequantized(values), np.array(mask))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        rows = [attend(queries[:, :, i : i + 1], keys, values, mask[i : i + 1]) for i in range(length)]
        assert mx.allclose(mx.concatenate(rows, axis=2), found, atol=1e-5).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_is_one_over_dequantized_rows(tiny_models: Models, variant: str) -> None:
    """A draft step over quantized K/V equals one over a float32 cache with the dequantized rows.

    Logits with 8 bits are within 0.05 of the logits without quantization. Their standard deviation is 0.9 or more.
    """
    target, drafter = tiny_models(variant)
    tokens = random_tokens(60, seed=7)
    logits: dict[KVQuantization | None, mx.array] = {}
    for kv in (None, EIGHT, FOUR):
        cache = Cache(target.config, target.dtype, max_block=60, quantization=kv)
        logits[kv] = target(mx.array([tokens], mx.int32), cache, logit_rows=60).logits[0]
        if kv is None:
            continue
        cache.set_length(len(tokens))
        drafted = _drafted(target, drafter, cache)
        for buffers in (cache.keys, cache.values):
            for index, rows in buffers.items():
                buffers[index] = mx.array(dequantized(rows), mx.float32) if isinstance(rows, Quantized) else rows
        cache.is_quantized, cache.quantization = False, None
        np.testing.assert_allclose(_drafted(target, drafter, cache), drafted, atol=1e-4)
    assert float(mx.std(logits[None])) > 0.9
    np.testing.assert_allclose(logits[EIGHT], logits[None], atol=0.05)
    errors = {kv: float(mx.abs(logits[kv] - logits[None]).mean()) for kv in (EIGHT, FOUR)}
    assert 0 < 4 * errors[EIGHT] < errors[FOUR]


def _drafted(target: Target, drafter: Drafter, cache: Cache) -> mx.array:
    """Return the hidden state that a draft step's head reads."""
    hidden = mx.ones((1, 1, target.config.hidden_size))
    return drafter(target.embed(mx.array([[20]])), hidden, drafter.draft_context(cache)).state


def test_a_pass_over_quantized_rows_against_numpy(tiny_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention over quantized K/V equals numpy's attention over the dequantized rows."""
    target, _ = tiny_models("e2b")
    compared: list[int] = []
    attend = Attention.attend

    def compare(attention: Attention, queries: mx.array, view: View) -> mx.array:
        found = attend(attention, queries, view)
        if isinstance(view.keys, Quantized):
            rows = dequantized(view.keys), dequantized(view.values)
            expected = mx.array(reference(np.array(queries), *rows, np.array(view.mask)), mx.float32)
            expected = expected.transpose(0, 2, 1, 3).flatten(-2)
            np.testing.assert_allclose(found, expected, atol=1e-4)
            compared.append(queries.shape[2])
        return found

    monkeypatch.setattr(Attention, "attend", compare)
    run(target, None, 0, FOUR, max_tokens=3, step=40)
    # Two layers own their K/V, and another layer shares it. There are two chunks of prefill and two rounds. The first
    # chunk ends at the last layer that owns K/V. The second chunk continues from there with its last row only.
    assert sorted(compared) == [*[1] * (1 + 1 + 2 * 3), 13, 40]


@pytest.mark.parametrize("capacity", [8 * 1024, 16 * 1024])
def test_quantized_buffers_are_small(capacity: int) -> None:
    make = partial(Cache, two_layers(window=32, head_dim=256, kv_heads=4), mx.float16, max_block=4, capacity=capacity)
    kinds = (None, KVQuantization(8, 64, 0), KVQuantization(4, 64, 0))
    plain, eight, four = (sum(array.nbytes for array in make(quantization=kv).arrays()) for kv in kinds)
    assert eight < 0.6 * plain
    assert four < 0.35 * plain


def _peak_of_rounds(capacity: int) -> tuple[int, int]:
    """Return the peak of some rounds above the active memory, and the size of the buffers, both in bytes."""
    kv = KVQuantization(8, 64, 0)
    cache = Cache(
        two_layers(window=32, head_dim=256, kv_heads=4), mx.float32, max_block=4, capacity=capacity, quantization=kv
    )
    new = mx.ones((1, 4, 4, 256))
    mx.eval(cache.arrays(), new)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(10):
        step = cache.start(4)
        views = [step.write(layer, new, new) for layer in range(2)]
        keys = views[1].keys
        assert isinstance(keys, Quantized)
        seen = [unquantized(views[0].keys).sum(), *(part.sum() for part in keys.parts)]
        cache.offset = cache.offset + 1
        del step, views, keys
        mx.eval(seen, cache.arrays())
        cache.length += 1
    return mx.get_peak_memory() - active, sum(array.nbytes for array in cache.arrays())


@pytest.mark.in_place
def test_buffers_are_updated_in_place() -> None:
    small_peak, _ = _peak_of_rounds(1024)
    large_peak, large_bytes = _peak_of_rounds(64 * 1024)
    assert large_bytes > 130e6
    assert large_peak < small_peak + 1e6


def test_converting_and_growing_take_one_buffer_at_a_time() -> None:
    """For eight layers, the peak above the active memory is far below a second copy of all buffers."""
    one = two_layers(window=32, head_dim=256, kv_heads=1).layers[1]
    text = two_layers(window=32, head_dim=256, kv_heads=1)
    text = replace(text, layers=(text.layers[0], *[one] * 8))
    cache = Cache(text, mx.float16, max_block=4, capacity=16 * 1024, quantization=KVQuantization(8, 64, 100))
    mx.eval(cache.arrays())
    before = sum(array.nbytes for array in cache.arrays())
    for change in (partial(cache.set_length, 100), partial(cache.set_length, 16 * 1024)):
        change()
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        cache.reserve(4)
        assert mx.get_peak_memory() - active < 0.3 * before
        assert cache.is_quantized
    assert cache.capacity > 16 * 1024
    assert sum(array.nbytes for array in cache.arrays()) < 0.7 * before


def test_growing_keeps_quantized_rows() -> None:
    cache = Cache(two_layers(head_dim=32), mx.float32, max_block=4, quantization=EIGHT)
    for start in range(0, 2 * CAPACITY_STEP, 100):
        new = mx.broadcast_to(mx.arange(start, start + 100)[:, None], (1, 1, 100, 32)).astype(mx.float32)
        step = cache.start(100)
        for layer in range(2):
            step.write(layer, new, -new)
        cache.set_length(start + 100)
    view = cache.draft_view("full_attention")
    assert cache.capacity == 3 * CAPACITY_STEP
    mask = np.array(view.mask)[0]
    for rows, sign in ((view.keys, 1), (view.values, -1)):
        found = dequantized(rows)[0, 0][mask]
        np.testing.assert_allclose(found, sign * np.arange(600)[:, None].repeat(32, axis=1), atol=1e-3)


def test_exact_passes_over_quantized_rows(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device rounds products with K/V differently for several rows. If quantization differs too, it is an error."""
    folder = tiny_pair("e2b") / "target"
    multiply, quantize = mx.quantized_matmul, mx.quantize

    def rounds_otherwise(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # The four query heads are rows, too.
        return multiply(x, *args, **kwargs) * (1 + 2e-6 * (x.shape[2] > 4))

    monkeypatch.setattr(mx, "quantized_matmul", rounds_otherwise)
    target = load_target(folder)[0]
    with pytest.raises(mlx_mtp.DeviceError, match="exact: on this device a pass over 2 rows has other bits"):
        check_exact(target, EIGHT)
    make_exact(target)
    for kv in (EIGHT, FOUR):
        check_exact(target, kv)
    model = mlx_mtp.load(folder, exact=True)
    options: dict[str, Any] = {"max_tokens": 40, "kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 70}
    plain = model.generate(PROMPT, num_draft_tokens=0, logprobs=1, **options)
    drafted = model.generate(PROMPT, num_draft_tokens=3, logprobs=1, **options)
    assert drafted.tokens == plain.tokens
    assert drafted.last.stats.drafted > 0

    def by_number_of_rows(rows: mx.array, *args: Any, **kwargs: Any) -> Any:
        return quantize(rows * (1.01 if rows.shape[2] in range(2, 10) else 1.0), *args, **kwargs)

    monkeypatch.setattr(mx, "quantize", by_number_of_rows)
    with pytest.raises(mlx_mtp.DeviceError, match="exact: on this device a pass over 2 rows has other bits"):
        model.generate(PROMPT, **options | {"kv_bits": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 3}, "kv_bits must be 4 or 8, found 3"),
        ({"kv_bits": 8.0}, "kv_bits must be 4 or 8, found 8.0"),
        ({"kv_bits": 8, "kv_group_size": 48}, "kv_group_size must be 32, 64 or 128, found 48"),
        ({"kv_bits": 8, "quantized_kv_start": -1}, "quantized_kv_start must be an integer of at least 0, found -1"),
        ({"kv_bits": 8}, "kv_group_size is 64, which does not divide the 32 values of a full-attention head"),
    ],
)
@pytest.mark.parametrize("drafter", [None, "none"])
def test_bad_options(tiny_pair: TinyPair, drafter: str | None, options: dict[str, Any], message: str) -> None:
    """The error comes before anything is generated or measured."""
    model = mlx_mtp.load(tiny_pair("e2b") / "target", drafter)
    with pytest.raises(mlx_mtp.OptionError) as error:
        model.stream_generate("hello", **options)
    assert str(error.value) == message


def test_costs_are_measured_per_kind_of_kv(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    kinds: list[dict[str, Any]] = [{}, {"kv_bits": 8}, {"kv_bits": 4}, {"kv_bits": 4, "quantized_kv_start": 20}]
    for kv in kinds:
        model.generate("hello", max_tokens=4, kv_group_size=32, **kv)
    assert len(list(tmp_path.iterdir())) == 3
    model.calibrate(kv_bits=4, kv_group_size=32)
    assert len(list(tmp_path.iterdir())) == 3


QUANTIZED = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")


def test_the_command_generate(tiny_pair: TinyPair) -> None:
    common = ("--model", tiny_pair("e2b") / "target", "-p", "the quick", "-m", "40", "--temp", "0", "--json")
    reports = []
    for k in ("0", "3"):
        result = run_command("generate", *common, *QUANTIZED, "--num-draft-tokens", k)
        reports.append(json.loads(result.stdout.splitlines()[-1]))
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[1]["drafted"] > 0
    bad = (["--kv-bits", "5"], ["--kv-bits", "8"], ["--kv-bits", "4", "--kv-group-size", "0"])
    for options in bad:
        result = run_command("generate", *common, *options, code=1)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: kv_")
    run_command("generate", *common, "--kv-bits", "many", code=2)


def test_the_command_chat(tiny_pair: TinyPair) -> None:
    common = ("--model", tiny_pair("e2b") / "target", "-m", "20", "--temp", "0")
    answers = [
        run_command("chat", *common, *QUANTIZED, "--num-draft-tokens", k, stdin="hello\nagain\n") for k in ("0", "3")
    ]
    assert answers[0].stdout == answers[1].stdout != ""
    refused = run_command("chat", *common, "--kv-bits", "8", code=1)
    assert "kv_group_size is 64" in refused.stderr


def test_the_command_bench() -> None:
    options = ["--contexts", "64", "--kinds", "code", "--temps", "0", "--num-draft-tokens", "3", "-m", "12"]
    result = run_command("bench.cli", *options, "--repeats", "1", "--json", *QUANTIZED)
    report = json.loads(result.stdout)
    assert (report["kv_bits"], report["kv_group_size"], report["quantized_kv_start"]) == (8, 32, 0)
    assert report["cases"][0]["settings"]["3"]["acceptance_length"] >= 1
    run_command("bench.cli", *QUANTIZED, "--peers", "mlx-lm", code=1)


def test_a_device_without_the_kernels_is_one_error(
    tiny_pair: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> mx.array:
        raise RuntimeError("No implementation for problem shape 1x40x128x2")

    monkeypatch.setattr(mx, "quantized_matmul", refuse)
    command = ["--model", str(tiny_pair("31b") / "target"), "--prompt", "hello", "-m", "4"]
    assert generate.main([*command, "--kv-bits", "8"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: kv_bits is 8, but this device has no kernel for quantized K/V with mlx.core.float32"
    )
    assert error.endswith("(No implementation for problem shape 1x40x128x2)")
    assert generate.main(command) == 0
