"""The costs of passes that several texts share: measure them, keep them, and choose draft lengths by them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.curves import COSTS

import mlx_mtp
from mlx_mtp.decoding import calibration, shared_calibration
from mlx_mtp.decoding.calibration import RoundCosts
from mlx_mtp.decoding.shared_calibration import fitted, measure_shared
from mlx_mtp.decoding.shared_lengths import SharedCosts, estimated
from mlx_mtp.decoding.timing import MeasuringPlan
from mlx_mtp.gemma4.target import Target
from mlx_mtp.memory_plan import TextMemory
from mlx_mtp.server import cli as server
from mlx_mtp.server import http_server

TinyPair = Callable[[str], Path]
# A fixture replaces this function, so that tests use known costs.
SHARED = RoundCosts.shared
QUICK = MeasuringPlan(seconds=0.0, longest=0.0, warm_up=1, turn_rounds=(1, 1), repetitions=(1, 1))
# Rows cost nothing, or nearly all.
CHEAP = SharedCosts(tuple(1 + 0.001 * n for n in range(32)), 0.001, 0.0, 0.01)
DEAR = SharedCosts(tuple(1.0 + n for n in range(32)), 1.0, 0.0, 0.01)


def test_the_price_of_a_text_is_found_apart_from_that_of_its_rows() -> None:
    prices = {2: 10.0, 4: 11.0, 8: 14.0, 16: 22.0, 32: 23.0}
    passes = {(count, rows): prices[count * rows] + 0.5 * count for count in (2, 4, 8) for rows in (1, 2, 4)}
    costs = fitted(passes, {1: 1.3, 3: 2.3})
    assert [costs.rows[rows - 1] for rows in prices] == pytest.approx(list(prices.values()))
    assert len(costs.rows) == 32
    assert costs.rows[5] == pytest.approx(12.5)
    assert (costs.text, costs.draft, costs.overhead) == pytest.approx((0.5, 0.5, 0.8))
    assert costs.round(8, 0, 4) == pytest.approx(passes[4, 2])


def test_noise_gives_no_price_below_zero_and_no_row_that_saves() -> None:
    passes = {(count, rows): 10.0 - count + (5 if rows == 1 else 0) for count in (2, 4, 8) for rows in (1, 2, 4)}
    costs = fitted(passes, {1: 2.0, 3: 1.0})
    assert list(costs.rows) == sorted(costs.rows)
    assert min(costs.rows) > 0
    assert min(costs.text, costs.draft, costs.overhead) == 0
    dear_texts = fitted({(count, rows): 0.1 + 1.0 * count for count in (2, 4, 8) for rows in (1, 2, 4)}, {})
    assert min(dear_texts.rows) > 0


@pytest.mark.parametrize(("variant", "placement"), [("e2b", "resident"), ("e2b", "mapped"), ("26b", "resident")])
def test_passes_are_measured_with_other_tokens_in_each_row(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, variant: str, placement: Any
) -> None:
    model = mlx_mtp.load(tiny_pair(variant) / "target", per_layer_embeddings=placement)
    packed, tokens = Target.packed, list[list[int]]()

    def note(self: Target, rows: mx.array, *options: Any) -> Any:
        tokens.append(np.array(rows)[0].tolist())
        return packed(self, rows, *options)

    monkeypatch.setattr(Target, "packed", note)
    progress: list[tuple[int, int]] = []
    costs = measure_shared(model.target, model.drafter, lambda *at: progress.append(at), plan=QUICK)
    assert len(costs.rows) == 32
    assert min(costs.rows) > 0
    assert progress[-1][0] == progress[-1][1]
    assert {len(rows) for rows in tokens} == {2, 4, 8, 16, 32}
    # Only drafted tokens may be equal.
    assert all(len(set(rows)) == len(rows) for rows in tokens if len(rows) in (2, 32))
    alone = measure_shared(model.target, None, plan=QUICK)
    assert (alone.draft, alone.overhead) == (0, 0)


@pytest.mark.parametrize(
    ("placement", "seconds", "expected"),
    [
        ("resident", 0.9, True),
        ("resident", 1.1, False),
        ("mapped", 0.9, False),
    ],
)
def test_passes_go_ahead_if_this_takes_less_time(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, placement: Any, seconds: float, expected: bool
) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target", per_layer_embeddings=placement)

    def timed(runs: dict[tuple[str, int, int], Any], *_: Any) -> dict[tuple[str, int, int], float]:
        return {key: seconds if key[0] == "ahead" else 1.0 for key in runs}

    monkeypatch.setattr(shared_calibration, "time_in_turn", timed)
    assert measure_shared(model.target, model.drafter).ahead == expected


def test_they_are_measured_once_and_then_decide(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RoundCosts, "shared", SHARED)
    prompts, drafted = ["hello", "other"], []
    for name, costs in (("cheap", CHEAP), ("dear", DEAR)):
        monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / name))
        measured: list[SharedCosts] = []
        monkeypatch.setattr(calibration, "measure_shared", lambda *_, c=costs, m=measured: m.append(c) or c)
        for _ in range(2):
            model = mlx_mtp.load(tiny_pair("e2b") / "target")
            assert model.calibrate_together() == costs
        assert measured == [costs]
        # Another program has measured them.
        again = mlx_mtp.load(tiny_pair("e2b") / "target")
        results = again.generate_batch(prompts, max_tokens=30, ignore_eos=True, copy_drafts="off")
        drafted.append(sum(each.last.stats.drafted for each in results))
        assert [each.tokens for each in results] == [
            model.generate(prompt, max_tokens=30, ignore_eos=True).tokens for prompt in prompts
        ]
        model.calibrate_together(remeasure=True)
        assert len(measured) == 2
    assert drafted[0] > drafted[1]


def test_a_damaged_file_is_not_used(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "measure_shared", lambda *_: CHEAP)
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    model.calibrate_together()
    (file,) = tmp_path.glob("rounds-*.json")
    kept = json.loads(file.read_text())
    changes: list[dict[str, Any]] = [
        {"rows": []},
        {"rows": [0.0]},
        {"text": -1},
        {"draft": "much"},
        {"draft": 10**400},
        {"ahead": "no"},
    ]
    for change in changes:
        file.write_text(json.dumps(kept | {"seconds": kept["seconds"] | change}))
        assert model.calibrate_together() == CHEAP
        assert f"{file}: not a usable measurement of rounds" in caplog.text
        assert json.loads(file.read_text()) == kept
        caplog.clear()


def test_costs_that_cannot_be_kept_are_used(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RoundCosts, "shared", SHARED)
    monkeypatch.setattr(calibration, "measure_shared", lambda *_: CHEAP)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "file"))
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    model.calibrate_together()
    assert model.parts.costs.shared(COSTS) == CHEAP


def test_a_file_that_is_nested_too_deep_is_not_used(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(RoundCosts, "shared", SHARED)
    monkeypatch.setattr(calibration, "measure_shared", lambda *_: CHEAP)
    mlx_mtp.load(tiny_pair("e2b") / "target").calibrate_together()
    (file,) = tmp_path.glob("rounds-*.json")
    file.write_text("[" * 100_000)
    assert mlx_mtp.load(tiny_pair("e2b") / "target").parts.costs.shared(COSTS) == estimated(COSTS)


def test_nothing_is_measured_where_it_cannot_be(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> SharedCosts:
        raise AssertionError("measured")

    monkeypatch.setattr(calibration, "measure_shared", refuse)
    exact = mlx_mtp.load(tiny_pair("e2b") / "target", exact=True)
    assert exact.calibrate_together() is None
    small = mlx_mtp.load(tiny_pair("e2b") / "target")
    text = TextMemory(small.config.text, small.target.dtype.size, 64, 9)
    small.memory_limit = mx.get_active_memory() + 12 * text.kept + 7 * text.more_work
    with caplog.at_level("INFO", logger="mlx_mtp"):
        assert small.calibrate_together() is None
    assert "the costs of passes of several texts are estimated: to measure them takes " in caplog.text


def test_a_server_of_several_texts_measures_them_before_it_serves(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    async def serve(*_: object) -> None:
        events.append("serves")

    monkeypatch.setattr(http_server, "serve_until_stopped", serve)
    monkeypatch.setattr(mlx_mtp.Model, "calibrate_together", lambda *_, **__: events.append("measures"))
    command = ["--port", "0", "--model", str(tiny_pair("e2b") / "target")]
    assert server.main(command) == 0
    assert events == ["measures", "serves"]
    events.clear()
    assert server.main([*command, "--decode-concurrency", "1"]) == 0
    assert server.main([*command, "--num-draft-tokens", "2"]) == 0
    assert events == ["serves"] * 2
