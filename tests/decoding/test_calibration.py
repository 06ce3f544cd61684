"""The costs of rounds: measure them, keep them, and choose the number of draft tokens by them."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.curves import COSTS, CURVE, PLAIN

import mlx_mtp
from mlx_mtp import chat, generate
from mlx_mtp.decoding import calibration, kept_costs, text_loop
from mlx_mtp.decoding.calibration import RoundCosts, measure_rounds
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, Costs
from mlx_mtp.decoding.kept_costs import CostsFile, cache_directory, read_or_measure
from mlx_mtp.decoding.timing import MeasuringPlan

TinyPair = Callable[[str], Path]
# A fixture replaces this function, so that tests use known costs.
POLICY = RoundCosts.policy
IDENTITY = {"pair": "a", "mlx": "1.2.3"}
SAMPLED = mlx_mtp.Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=3)


def kept_file(folder: Path) -> Path:
    (file,) = folder.glob("rounds-*.json")
    return file


def refuse(*_: object, **__: object) -> Costs:
    raise AssertionError("measured, though it is known")


def test_measured_once_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    assert read_or_measure(CostsFile(IDENTITY, folder), lambda: COSTS) == COSTS
    assert read_or_measure(CostsFile(IDENTITY, folder), refuse) == COSTS
    with pytest.raises(AssertionError):
        read_or_measure(CostsFile(IDENTITY | {"mlx": "1.2.4"}, folder), refuse)
    assert [file.name for file in folder.iterdir()] == [kept_file(folder).name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("1.2.3", "1.2.2"),
        lambda text: text.replace("1.75,", "NaN,"),
        lambda text: text.replace("1.75,", "-1.75,"),
        lambda text: text.replace("1.75,", '"1.75",'),
        lambda text: text.replace("1.75,", ""),
        lambda text: text.replace('"draft"', '"drafts"'),
    ],
)
def test_a_damaged_file_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[str], str]
) -> None:
    read_or_measure(CostsFile(IDENTITY, tmp_path), lambda: COSTS)
    file = kept_file(tmp_path)
    good = file.read_text()
    file.write_text(damage(good))
    assert file.read_text() != good
    assert read_or_measure(CostsFile(IDENTITY, tmp_path), lambda: COSTS) == COSTS
    assert f"{file}: not a usable measurement of rounds, measured again: " in caplog.text
    assert file.read_text() == good


def test_where_nothing_can_be_written_it_is_measured_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert read_or_measure(CostsFile(IDENTITY, tmp_path / "file"), lambda: COSTS) == COSTS
    assert "the measurement of rounds is not kept: " in caplog.text


def test_one_program_measures_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second program waits, and then uses the measurement of the first program."""
    first, second = CostsFile(IDENTITY, tmp_path), CostsFile(IDENTITY | {"pair": "b"}, tmp_path)
    lock = first.lock()
    assert lock is not None
    assert second.lock() is None
    code = (
        "import sys; from mlx_mtp.decoding.kept_costs import *; "
        "file = CostsFile({'pair': 'a', 'mlx': '1.2.3'}, Path(sys.argv[1])); "
        "print(read_or_measure(file, lambda: 1 / 0))"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        time.sleep(1)
        first.write(COSTS)
        lock.release()
        lock.release()
        assert process.communicate()[0].strip() == str(COSTS)
    again = second.lock()
    assert again is not None
    # If the other program does not end, the costs are measured but not kept.
    monkeypatch.setattr(kept_costs, "_LONGEST_WAIT", 0.1)
    assert read_or_measure(CostsFile(IDENTITY | {"pair": "c"}, tmp_path), lambda: COSTS) == COSTS
    assert len(list(tmp_path.iterdir())) == 1
    again.release()
    assert CostsFile(IDENTITY, tmp_path / "file" / "absent").lock() is not None


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", "/somewhere")
    assert cache_directory() == Path("/somewhere")
    monkeypatch.delenv("MLX_MTP_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_directory() == Path("/caches/mlx-mtp")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("HOME", "/Users/me")
    assert cache_directory() == Path("/Users/me/Library/Caches/mlx-mtp")


@pytest.mark.parametrize("sampling", [mlx_mtp.Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_rounds_are_measured(tiny_pair: TinyPair, variant: str, sampling: mlx_mtp.Sampling) -> None:
    model = mlx_mtp.load(tiny_pair(variant) / "target")
    assert model.drafter is not None
    progress: list[tuple[int, int]] = []
    plan = MeasuringPlan(seconds=0.0, longest=0.0)
    costs = measure_rounds(model.target, model.drafter, sampling, lambda *at: progress.append(at), plan=plan)
    assert costs.ahead is not None
    for curve in (costs.waiting, costs.ahead):
        assert len(curve.verify) == MAX_DRAFT_TOKENS + 1
        assert min(curve.verify) > 0
        assert curve.draft >= 0
        assert curve.overhead >= 0
    assert progress[-1][0] == progress[-1][1]
    assert progress == sorted(progress)


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_jumps_once_does_no_harm(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    assert model.drafter is not None
    ticks = itertools.count()
    # The jump is within the measurement of one draft length.
    monkeypatch.setattr(time, "perf_counter", lambda: (n := next(ticks)) * 0.01 + jump * (n > 100))
    costs = measure_rounds(model.target, model.drafter, mlx_mtp.Sampling(), plan=MeasuringPlan(repetitions=(2, 2)))
    assert costs.ahead is not None
    for curve in (costs.waiting, costs.ahead):
        assert curve.verify == pytest.approx([0.01] * 9)
        assert curve.draft == pytest.approx(0)


@pytest.mark.parametrize("more", [0.01, -0.005])
def test_it_goes_on_until_the_speed_is_steady(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, more: float
) -> None:
    """Rounds take twice or half as long at first. This ends in the middle of the second turns."""
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: (n := next(ticks)) * 0.01 + min(n, 85) * more)
    plan = MeasuringPlan(seconds=0.0, longest=100.0)
    costs = measure_rounds(model.target, model.drafter, mlx_mtp.Sampling(), plan=plan)
    assert costs.waiting.verify == pytest.approx([0.01] * 9)


def test_a_clock_that_stands_still_is_an_error_not_a_curve(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong measurement is not kept."""
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))

    def measure(*arguments: Any, plan: MeasuringPlan, **options: Any) -> Costs:
        return measure_rounds(*arguments, plan=replace(plan, turn_rounds=(2, 2), repetitions=(1, 1)), **options)

    monkeypatch.setattr(calibration, "measure_rounds", measure)
    with monkeypatch.context() as stopped:
        stopped.setattr(time, "perf_counter", lambda: 5.0)
        with pytest.raises(mlx_mtp.MTPError, match="costs of rounds must be positive"):
            model.calibrate()
    assert not list(tmp_path.iterdir())
    assert model.generate("hello", max_tokens=4, num_draft_tokens=2).tokens


def test_a_model_measures_once_per_kind_of_sampling(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    measured: list[mlx_mtp.Sampling] = []

    def measure(_target: Any, drafter: Any, sampling: mlx_mtp.Sampling, *_: Any, **__: Any) -> Costs:
        measured.append(sampling)
        return COSTS if drafter is not None else PLAIN

    monkeypatch.setattr(calibration, "measure_rounds", measure)
    for _ in range(2):
        model = mlx_mtp.load(tiny_pair("e2b") / "target")
        for sampling in (mlx_mtp.Sampling(), SAMPLED, mlx_mtp.Sampling(seed=4)):
            model.generate("hello", max_tokens=4, sampling=sampling)
    assert measured == [mlx_mtp.Sampling(), SAMPLED]
    assert len(list(tmp_path.iterdir())) == 2
    alone = mlx_mtp.load(tiny_pair("e2b") / "target", "none")
    assert alone.generate("hello", max_tokens=4).last.stats.drafted == 0
    assert alone.calibrate() == PLAIN


def test_contexts_of_other_lengths_have_costs_of_their_own(tiny_pair: TinyPair) -> None:
    costs = mlx_mtp.load(tiny_pair("e2b") / "target").parts.costs
    lengths = [0, 4095, 4096, 16383, 16384, 65535, 65536, 100_000]
    ranges = [repr(costs.identity(mlx_mtp.Sampling(), None, length)) for length in lengths]
    assert [ranges.index(each) for each in ranges] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_the_first_rounds_of_texts_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is that of plain decoding. The second model uses the measurement of the first."""
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(RoundCosts, "policy", POLICY)
    monkeypatch.setattr(calibration, "measure_rounds", refuse)
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    plain = model.generate("def read_config(path):\n", max_tokens=320, ignore_eos=True, num_draft_tokens=0)
    responses = model.stream_generate("def read_config(path):\n", max_tokens=320, ignore_eos=True)
    first = next(responses)
    # Another text does not disturb the measurement, and is not measured.
    beside = model.generate("def read_config(path):\n", max_tokens=60, ignore_eos=True)
    assert beside.tokens == plain.tokens[:60]
    assert beside.last.stats.drafted > 0
    assert not list(tmp_path.iterdir())
    assert [first.token, *(response.token for response in responses)] == plain.tokens
    file = kept_file(tmp_path)
    kept = json.loads(file.read_text())["seconds"]
    for way in ("waiting", "ahead"):
        assert len(kept[way]["verify"]) == MAX_DRAFT_TOKENS + 1
        assert min(kept[way]["verify"]) > 0
    second = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    assert second.generate("def read_config(path):\n", max_tokens=60, ignore_eos=True).tokens == plain.tokens[:60]
    assert json.loads(file.read_text())["seconds"] == kept


def test_a_text_that_is_not_read_or_closed_early_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(RoundCosts, "policy", POLICY)
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    unread = model.stream_generate("x = ", max_tokens=320, ignore_eos=True)
    closed = model.stream_generate("x = ", max_tokens=320, ignore_eos=True)
    for _ in range(5):
        next(closed)
    assert CostsFile(IDENTITY, tmp_path).lock() is None
    closed.close()
    model.generate("x = ", max_tokens=320, ignore_eos=True)
    assert kept_file(tmp_path)
    unread.close()


def test_no_text_waits_for_the_measurement(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(RoundCosts, "policy", POLICY)
    monkeypatch.setattr(calibration, "measure_rounds", refuse)
    model = str(tiny_pair("e2b") / "target")
    assert generate.main(["--model", model, "--prompt", "hello", "-m", "5"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/exit\n"))
    assert chat.main(["--model", model, "-m", "5"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_text_with_a_part_of_the_host_is_measured_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(RoundCosts, "policy", POLICY)
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    next(model.stream_generate("x = ", regex="[0-9]{3}"))
    assert json.loads(kept_file(tmp_path).read_text())["seconds"]["waiting"] == CURVE._asdict()


def test_first_rounds_that_no_clock_can_have_measured_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(RoundCosts, "policy", POLICY)
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    monkeypatch.setattr(text_loop, "time", SimpleNamespace(perf_counter=lambda: 5.0))
    result = model.generate("def read_config(path):\n", max_tokens=320, ignore_eos=True)
    assert len(result.tokens) == 320
    assert "the measurement of rounds is not used: the costs of rounds must be positive" in caplog.text
    assert not list(tmp_path.iterdir())


def test_auto_drafts_what_pays_and_the_text_is_the_same() -> None:
    """A good drafter drafts more than a damaged one. Greedy and coupled text does not depend on the draft length."""
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    coupled = mlx_mtp.Sampling(temperature=0.5, acceptance="coupled", seed=2)
    per_round = []
    for sampling in (mlx_mtp.Sampling(), coupled):
        plain = model.generate(
            "def read_config(path):\n", max_tokens=80, ignore_eos=True, num_draft_tokens=0, sampling=sampling
        )
        auto = model.generate("def read_config(path):\n", max_tokens=80, ignore_eos=True, sampling=sampling)
        assert auto.tokens == plain.tokens
        per_round.append(auto.last.stats.drafted / auto.last.stats.rounds)
    assert max(per_round) > 2
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    assert model.drafter is not None
    model.drafter.model.norm.weight = -model.drafter.model.norm.weight
    options: dict[str, Any] = {"max_tokens": 150, "ignore_eos": True, "copy_drafts": "off"}
    useless = model.generate("def read_config(path):\n", **options).last.stats
    assert 0 < useless.drafted < 0.2 * useless.rounds


def test_the_command_measures_once_and_says_what_it_drafted(tiny_pair: TinyPair, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mlx_mtp.generate",
        "--temp",
        "0",
        "-p",
        "hello",
        "-m",
        "150",
        "--ignore-eos",
        "--json",
    ]
    command += ["--model", str(tiny_pair("e2b") / "target"), "--ignore-eos"]
    env = os.environ | {"MLX_MTP_CACHE": str(tmp_path)}
    reports, times = [], []
    for options in ([], [], ["--num-draft-tokens", "0"]):
        result = subprocess.run([*command, *options], capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(result.stdout.splitlines()[-1]))
        times.append(kept_file(tmp_path).stat().st_mtime_ns)
    assert len(set(times)) == 1
    assert reports[0]["tokens"] == reports[1]["tokens"] == reports[2]["tokens"]
    kept_file(tmp_path).write_text("{")
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0
    assert re.search(r"rounds-\w+\.json: not a usable measurement of rounds, measured again", result.stderr)
    assert "Traceback" not in result.stderr
    refused = subprocess.run([*command, "--num-draft-tokens", "many"], capture_output=True, text=True, env=env)
    assert refused.returncode == 2
    assert "--num-draft-tokens: expected a number of draft tokens or auto, found 'many'" in refused.stderr
