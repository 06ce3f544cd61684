"""Exact verify passes, and the probe that compares passes over several rows with single passes.

The current device possibly rounds alike for any number of rows. Replaced operations imitate devices that do not.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from support.commands import run
from support.tiny import VARIANTS, load_target, random_tokens

import mlx_mtp
from mlx_mtp import generate, probe
from mlx_mtp.decoding.exact import ExactRows, ExactTable, check_exact, make_exact
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.target import Target

TinyPair = Callable[[str], Path]
# The prompt ends just before the number of visible K/V rows changes.
PROMPT = random_tokens(245, seed=3)


def rounds_otherwise(call: Callable[..., Any], axis: int = 1) -> Callable[..., Any]:
    """Return `call` with other last bits in its result if there is more than one row."""

    def calling(*args: Any, **kwargs: Any) -> Any:
        x = next(arg for arg in args if isinstance(arg, mx.array))
        result = call(*args, **kwargs)
        change = 1e-2 if result.dtype == mx.bfloat16 else 2e-6
        return result * (1 + change) if x.shape[axis] > 1 else result

    return calling


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose products and attention round differently for several rows."""
    for kind in (nn.Linear, nn.QuantizedLinear):
        monkeypatch.setattr(kind, "__call__", rounds_otherwise(kind.__call__))
    for table in (nn.Embedding, nn.QuantizedEmbedding):
        monkeypatch.setattr(table, "as_linear", rounds_otherwise(table.as_linear))
    attention = rounds_otherwise(mx.fast.scaled_dot_product_attention, axis=2)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)


def fused_target(folder: Path, bits: int | None) -> Target:
    target = load_target(folder)[0]
    if bits:
        nn.quantize(target, 64, bits)
    return target


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("device")
def test_a_device_that_rounds_otherwise_is_made_exact(tiny_pair: TinyPair, variant: str, bits: int | None) -> None:
    target = fused_target(tiny_pair(variant) / "target", bits)
    with pytest.raises(mlx_mtp.OptionError, match="a pass over 2 rows has other bits than single passes"):
        check_exact(target)
    make_exact(target)
    check_exact(target)
    ways = {module.way for module in target.modules() if isinstance(module, ExactRows)}
    # A batch of single rows uses another kernel with the bits of single rows here. Experts have their own products.
    assert ways - {"apart"} == ({"batched"} if bits else set())
    assert isinstance(target.embed_tokens, ExactTable)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_text_is_that_of_plain_decoding(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    # The function of the same name hides the module.
    module = sys.modules["mlx_mtp.loading"]
    monkeypatch.setattr(module, "load_target", lambda config, **_: cast(load_target(config.path.parent)[0], dtype))
    model = mlx_mtp.load(tiny_pair("e2b") / "target", exact=True)
    plain = model.generate(PROMPT, max_tokens=30, num_draft_tokens=0, ignore_eos=True, logprobs=1)
    for k in (1, 3, 8):
        drafted = model.generate(PROMPT, max_tokens=30, num_draft_tokens=k, ignore_eos=True, logprobs=1)
        assert drafted.tokens == plain.tokens
        assert drafted.last.stats.drafted > 0
    with pytest.raises(mlx_mtp.OptionError, match="num_draft_tokens is 9: exact passes verify at most 8"):
        model.generate(PROMPT, num_draft_tokens=9)


def cast(target: Target, dtype: str) -> Target:
    target.set_dtype(getattr(mx, dtype))
    return target


def test_the_comparison_with_quantized_rows_leaves_the_drafter_in_use() -> None:
    """The comparison drafts known tokens. The rounds of a text must not draft these tokens."""
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR, exact=True)
    stats = model.generate(
        "def read_config(path):\n    ", max_tokens=30, num_draft_tokens=3, kv_bits=8, quantized_kv_start=0
    ).last.stats
    assert stats.acceptance_length is not None
    assert stats.acceptance_length > 1.5


def test_where_nothing_helps_it_is_an_error(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mx.fast, "rms_norm", rounds_otherwise(mx.fast.rms_norm))
    args = ["--model", str(tiny_pair("e2b") / "target"), "--prompt", "hello", "--exact"]
    assert generate.main(args) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: exact: on this device a pass over 2 rows has other bits than single passes")


def test_the_commands(tiny_pair: TinyPair) -> None:
    model = ["--model", tiny_pair("e2b") / "target", "--exact"]
    texts = [
        run("generate", *model, "--prompt", "hello", "--temp", "0", "-m", "20", "--num-draft-tokens", k).stdout
        for k in ("0", "3")
    ]
    assert texts[0] == texts[1]
    result = run("probe", *model, "-m", "40", "--kinds", "code")
    *lines, last = result.stdout.splitlines()
    assert lines[0] == "passes over several rows against passes over one, 40 tokens of real text"
    assert lines[-1].startswith("tokens per round with 3 draft tokens: ")
    report = json.loads(last)
    assert report["exact"]
    assert report["attention"] == dict.fromkeys(("sliding_attention", "full_attention"), "as MLX chooses")
    assert "full_attention: as MLX chooses" in lines
    assert report["kernels"] == {"target": "none", "drafter": "none"}
    assert "kernels of the target: none" in lines
    assert list(report["rows"]) == [str(rows) for rows in range(2, 10)]
    assert all(row["compared"] > 30 and not row["other_bits"] for row in report["rows"].values())
    assert {row["first_difference"] for row in report["rows"].values()} == {None}


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (lambda target: target.layers[1].mlp.down_proj, "layers.1.mlp.down_proj"),
        (lambda target: target.layers[2].post_attention_layernorm, "layers.2.post_attention_layernorm"),
        (None, "before layers.0.self_attn.o_proj"),
    ],
    ids=["projection", "norm", "attention"],
)
def test_the_probe_names_the_first_difference(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, part: Callable[[Target], nn.Module] | None, place: str
) -> None:
    target = load_target(tiny_pair("e2b") / "target")[0]
    text = random_tokens(64 + 36, seed=4)
    assert set(probe.first_differences(target, text).values()) == {None}
    if part is None:
        attention = rounds_otherwise(mx.fast.scaled_dot_product_attention, axis=2)
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    else:
        module = part(target)
        call = type(module).__call__
        otherwise = rounds_otherwise(call)
        monkeypatch.setattr(type(module), "__call__", lambda m, x: (otherwise if m is module else call)(m, x))
    assert probe.first_differences(target, text) == dict.fromkeys(range(2, 10), place)
    for found in probe.compare_rows(target, [text], lambda _: None).values():
        assert found["other_bits"] == found["compared"] > 20


def test_the_probe_counts_what_is_lost(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replaced head finds other tokens for several rows."""
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    text = model.encode("def read(path):\n    with open(path) as file:\n        return json.load(file)\n\n\n" * 4)
    fair = probe.acceptance(model, [text], 40, lambda _: None)
    assert fair["by_verify_pass"] == fair["by_single_passes"] > 1.5
    assert fair["rounds"] == 10
    call: Callable[..., mx.array] = nn.Embedding.as_linear

    def other_tokens(table: nn.Embedding, x: mx.array) -> mx.array:
        logits = call(table, x)
        return mx.roll(logits, 1, -1) if x.shape[1] > 1 else logits

    monkeypatch.setattr(nn.Embedding, "as_linear", other_tokens)
    lost = probe.acceptance(model, [text], 40, lambda _: None)
    assert lost["by_single_passes"] == fair["by_single_passes"]
    assert lost["by_verify_pass"] < 1.3
    for found in probe.compare_rows(model.target, [text[:110]], lambda _: None).values():
        assert found["other_token"] == found["compared"] > 0


def test_bad_options_of_the_probe(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["--model", str(tiny_pair("e2b") / "target"), "-m", "17"]) == 1
    assert capsys.readouterr().err == "error: max_tokens must be at least 18, found 17\n"
    assert probe.main(["--model", str(tiny_pair("e2b") / "target"), "-m", "5000"]) == 1
    assert "the model holds 4096" in capsys.readouterr().err


def test_an_exact_round_looks_at_no_more_rows_than_a_plain_one(tiny_pair: TinyPair) -> None:
    """Sums over K/V rows round by the number of rows. A draft ends where this number would grow."""
    target = load_target(tiny_pair("e2b") / "target")[0]
    for exact, expected in ((True, [8, 8, 2, 1, 0, 8]), (False, [8] * 6)):
        stream = Stream(target, None, max_draft_tokens=8, exact=exact)
        found = []
        for length in (10, 247, 253, 254, 255, 256):
            stream.cache.set_length(length)
            found.append(stream.longest_draft())
        assert found == expected
