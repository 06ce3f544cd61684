"""`python -m mlx_mtp.bench`, run as a user runs it: as a process, on a tiny pair."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import transformers
from support.commands import run

import mlx_mtp
from mlx_mtp.bench import cli as bench
from mlx_mtp.bench import plots
from mlx_mtp.bench.cli import main, pass_bytes
from mlx_mtp.bench.peers import load_peer
from mlx_mtp.bench.prompts import KINDS, QUESTIONS, TOLD_KINDS, prompt, task
from mlx_mtp.bench.told import decode_told
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.decoding.report import Stats

TinyPair = Callable[[str], Path]


def test_a_table_plots_and_a_last_line_of_json(tiny_pair: TinyPair, tmp_path: Path) -> None:
    options = ["--kinds", "code,list", "--contexts", "40", "--temps", "0", "--num-draft-tokens", "2,auto"]
    options += ["-m", "12", "--repeats", "2", "--dtype", "bfloat16", "--plot", str(tmp_path / "plots")]
    result = run("bench.cli", "--model", tiny_pair("e2b") / "target", *options)
    *lines, last = result.stdout.splitlines()
    assert lines[0] == "code, 40 tokens, temperature 0"
    assert any(line.startswith("a pass of 1 to 9 rows costs 1.00 ") for line in lines)
    assert any(line.startswith("auto is at ") for line in lines)
    report = json.loads(last)
    assert [case["kind"] for case in report["cases"]] == ["code", "list"]
    names = {"chip", "memory", "cores", "device", "os", "machine", "python", "mlx-mtp", "mlx", "mlx-lm", "numpy"}
    assert set(report["environment"]) == names
    assert all(report["environment"].values())
    assert report["environment"]["mlx-mtp"] == mlx_mtp.__version__
    assert report["environment"]["memory"] > 2**30
    # Others see the report. So it has names, and no paths.
    assert (report["target"], report["drafter"]) == ("target", "target-assistant")
    assert str(tiny_pair("e2b")) not in last
    assert report["target_quantization"] is None
    assert (report["max_tokens"], report["repeats"]) == (12, 2)
    assert report["dtype"] == "bfloat16"
    # The header of a plot file holds its width and height.
    for name in ("speedup", "acceptance", "cost"):
        header = (tmp_path / "plots" / f"{name}.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", header[16:])) > 300
    assert report["bound_tokens_per_second"] == report["bandwidth"] / report["pass_bytes"]
    for case in report["cases"]:
        plain, two = case["settings"]["0"], case["settings"]["2"]
        assert plain["ratio"] == plain["acceptance_length"] == 1
        assert plain["acceptance_by_position"] == []
        assert two["drafted_per_round"] > 1.5
        assert plain["host_reads_per_round"] == two["host_reads_per_round"] == 1
        assert 0 < case["operations"]["0"] < case["operations"]["2"]
        assert len(two["acceptance_by_position"]) == 2
        low, high = two["range"]
        assert 0 < low <= two["tokens_per_second"] <= high
        assert case["best"] in (0, 2)
        assert case["costs"]["verify"][0] == 1
        assert len(case["costs"]["verify"]) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_the_length_asked_for(tiny_pair: TinyPair, kind: str) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    tokens = prompt(model, kind, 300, 20)
    assert len(tokens) == pytest.approx(300, abs=3 if kind == "chat" else 0)
    assert tokens == prompt(model, kind, 300, 20)
    if kind == "copy":
        assert tokens[200:] == tokens[:100]
    if kind == "chat":
        assert model.tokenizer.decode(tokens).endswith("<|turn>model\n")


def test_told_answers_change_the_text_or_cite_it() -> None:
    source = (
        'def first(value):\n    """Return it."""\n    return value\n\n\ndef second(value):\n    return first(value)\n'
    )
    renamed = QUESTIONS["edit"](source)
    assert renamed.answer == source.replace("value", "new_value")
    rewritten = QUESTIONS["rewrite"](source).answer
    assert [line for line in rewritten.splitlines() if line not in source.splitlines()] == [
        '    logger.debug("first")',
        '    logger.debug("second")',
    ]
    applied = source
    for block in QUESTIONS["blocks"](source).answer.split("<<<<<<< SEARCH\n")[1:]:
        search, replace = block.split(">>>>>>> REPLACE\n")[0].split("=======\n")
        assert search in applied
        applied = applied.replace(search, replace)
    assert applied == rewritten
    sentences = ["It lives in a place of the memory.", "Names refer to objects.", "The end of this text is near."]
    cited = QUESTIONS["cite"](" ".join(sentences)).answer
    assert [sentence in cited for sentence in sentences] == [True, False, True]


def test_copies_and_told_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is told the changes of a file, and copies write several times as many tokens per round.

    No time is compared, so the run that counts takes the rounds of the warm-up.
    """
    found: dict[tuple[Any, ...], tuple[float, Stats]] = {}

    def once(model: mlx_mtp.Model, prompt: list[int], answer: list[int], options: Any, *more: Any) -> Any:
        key = (options.num_draft_tokens, options.copy_drafts, *answer)
        if key not in found:
            found[key] = decode_told(model, prompt, answer, options, *more)
        return found[key]

    monkeypatch.setattr(bench, "decode_told", once)
    options = ["--kinds", "edit,blocks", "--contexts", "200", "--num-draft-tokens", "auto,no-copies", "-m", "200"]
    assert main([*options, "--repeats", "1", "--temps", "1"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(" of auto without copies; its rounds: " in line for line in lines)
    assert len(found) == 6
    cases = json.loads(last)["cases"]
    assert [(case["kind"], case["temperature"]) for case in cases] == [("edit", 0), ("blocks", 0)]
    for case, least in zip(cases, (5, 3), strict=True):
        auto, without = (case["settings"][name] for name in ("auto", "no-copies"))
        assert auto["acceptance_length"] > least
        assert auto["acceptance_length"] > 1.5 * without["acceptance_length"]
        assert sum(auto["share_of_rounds"].values()) == pytest.approx(1)
        assert auto["share_of_rounds"]["copy"] > 0.3
        assert without["share_of_rounds"]["copy"] == 0
        assert case["settings"]["0"]["share_of_rounds"] == {"plain": 1, "drafter": 0, "copy": 0}


def test_several_texts_together(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kinds", "code", "--contexts", "30", "--temps", "0", "--num-draft-tokens", "2,auto", "-m", "8"]
    options += ["--model", str(tiny_pair("e2b") / "target"), "--repeats", "2", "--concurrency", "2,3"]
    assert main(options) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    (case,) = json.loads(last)["cases"]
    assert list(case["concurrency"]) == ["2", "3"]
    for count, by_length in case["concurrency"].items():
        assert list(by_length) == ["0", "auto"]
        for k, row in by_length.items():
            for way in ("together", "one_after_the_other"):
                low, high = row[way]["range"]
                assert 0 < low <= row[way]["tokens_per_second"] <= high
            assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
            assert any(line.startswith(f"{count} texts, {k} draft tokens: ") for line in lines)


def test_copies_without_a_drafter(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(tiny_pair("12b") / "target"), "--drafter", "none", "--kinds", "rewrite,list"]
    args += ["--contexts", "60", "--temps", "0", "-m", "40", "--repeats", "1", "--json"]
    assert main([*args, "--num-draft-tokens", "auto,no-copies"]) == 0
    for case in json.loads(capsys.readouterr().out)["cases"]:
        assert list(case["settings"]) == ["0", "auto"]


def test_a_told_answer_needs_a_text(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(tiny_pair("12b") / "target"), "--kinds", "blocks", "--contexts", "2"]
    assert main(args) == 1
    assert capsys.readouterr().err == "error: a context of 2 tokens is too short for the kind blocks\n"


@pytest.mark.parametrize("kind", TOLD_KINDS)
def test_told_answers_have_room(tiny_pair: TinyPair, kind: str) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    found = task(model, kind, 1500, 50)
    assert len(found.prompt) > 1500
    assert found.answer is not None
    assert len(found.answer) == 50
    with pytest.raises(mlx_mtp.OptionError, match="the model holds 4096"):
        task(model, kind, 6000, 50)


def test_the_bytes_of_a_pass(tiny_pair: TinyPair) -> None:
    """A pass reads one row of a table, and only the chosen experts."""
    for variant in ("e2b", "26b"):
        model = mlx_mtp.load(tiny_pair(variant) / "target")
        assert 0 < pass_bytes(model) < sum(array.nbytes for array in arrays(model))
    model = mlx_mtp.load(tiny_pair("31b") / "target")
    assert pass_bytes(model) == sum(array.nbytes for array in arrays(model))


def arrays(model: mlx_mtp.Model) -> list[mx.array]:
    return list(lazy_parameters(model.target).values())


def test_plots_show_the_figures() -> None:
    settings = {
        "0": {"ratio": 1.0, "acceptance_by_position": []},
        "2": {"ratio": 1.5, "acceptance_by_position": [0.8, 0.6]},
        "auto": {"ratio": 1.4, "acceptance_by_position": [0.8]},
        "mlx-lm": {"error": "RuntimeError: no such kernel"},
    }
    costs = {"verify": [1.0, 1.5], "draft": 0.25, "overhead": 0.0, "seconds": 0.02}
    case = {"kind": "code", "context": 40, "temperature": 0.0, "settings": settings, "costs": costs}
    report = {"cases": [case], "bound_tokens_per_second": 100.0, "bandwidth": 1e11}

    def lines(figure: Any) -> list[list[float]]:
        return [list(line.get_ydata()) for line in figure.axes[0].get_lines()]

    assert lines(plots.speedup(report)) == [[1.0, 1.5], [1.4, 1.4], [1, 1]]
    assert lines(plots.acceptance(report)) == [[0.8, 0.6]]
    assert lines(plots.cost(report)) == [[20.0, 30.0], [5.0, 5.0], [10.0, 10.0]]


def test_plots_that_cannot_be_drawn_are_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--model", "nowhere", "--plot", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: exists already; choose another --plot\n"
    (tmp_path / "file").write_text("")
    assert main(["--model", "nowhere", "--plot", str(tmp_path / "file" / "plots")]) == 1
    assert capsys.readouterr().err.endswith(f"cannot be written: {tmp_path / 'file'} is not a folder\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--model", "nowhere", "--plot", str(tmp_path / "plots")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --plot needs matplotlib (")


def test_without_a_drafter_plain_decoding_and_copies_are_measured(
    tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", str(tiny_pair("31b") / "target"), "--drafter", "none", "--kinds", "list", "--contexts", "40"]
    assert main([*args, "-m", "4", "--repeats", "1", "--temps", "1", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert list(json.loads(line)["cases"][0]["settings"]) == ["0", "auto"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--contexts", "5000"], "error: a context of 5000 and 128 more tokens: the model holds 4096"),
        (["--repeats", "0"], "error: repeats must be at least 1, found 0"),
        (["-m", "1"], "error: max_tokens must be at least 2, found 1"),
        (
            ["--exact", "--dtype", "float32"],
            "error: --exact is found out in the checkpoint's own type: leave out --dtype",
        ),
        (["--temps", "-1"], "error: temperature must be at least 0, found -1.0"),
    ],
)
def test_bad_options(tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert main(["--model", str(tiny_pair("e2b") / "target"), *args]) == 1
    assert capsys.readouterr().err.splitlines() == [message]


@pytest.mark.parametrize("args", [["--kinds", "poems"], ["--contexts", "many"], ["--num-draft-tokens", "a"]])
def test_lists_that_are_none(args: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(args)


def test_other_runtimes_run_in_turn_or_say_why_not(
    tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # mlx-vlm cannot be imported in this test, even if it is installed.
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    args = ["--model", str(tiny_pair("e2b") / "target"), "--kinds", "code", "--contexts", "40", "--temps", "0,1"]
    args += ["--num-draft-tokens", "2", "-m", "12", "--repeats", "1", "--peers", "mlx-vlm,transformers"]
    assert main(args) == 0
    output = capsys.readouterr()
    assert "mlx-vlm failed to load the pair: ModuleNotFoundError: " in output.err
    report = json.loads(output.out.splitlines()[-1])
    assert list(report["failed_peers"]) == ["mlx-vlm"]
    assert report["environment"]["transformers"] == transformers.__version__
    for case in report["cases"]:
        assert list(case["settings"])[2:] == ["transformers", "transformers assisted 3", "transformers assisted 5"]
        assert all(setting["tokens_per_second"] > 0 for setting in case["settings"].values())
        assert case["best"] in (0, 2)


def test_a_runtime_that_fails_on_the_way_is_reported(
    tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(bench, "load_peer", lambda *_: {"mlx-lm": fails})
    args = ["--model", str(tiny_pair("e2b") / "target"), "--kinds", "code", "--contexts", "40", "--temps", "0"]
    assert main([*args, "--num-draft-tokens", "0", "-m", "12", "--repeats", "1", "--peers", "mlx-lm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  mlx-lm failed: RuntimeError: no such kernel" in lines
    assert json.loads(lines[-1])["cases"][0]["settings"]["mlx-lm"] == {"error": "RuntimeError: no such kernel"}


def test_mlx_lm_decodes_the_demo_pair() -> None:
    settings = load_peer("mlx-lm", mlx_mtp.DEMO_PAIR, None, mx.float32)
    assert settings["mlx-lm"]([2, 50, 51], mlx_mtp.Sampling(), 8) > 0
