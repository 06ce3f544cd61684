"""The measurements of `scripts/measure.py`, run as in the documents, with small settings."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from support.paths import PUBLISHED, ROOT

SCRIPT = ROOT / "scripts" / "measure.py"
MEASUREMENTS = (
    "pair", "rules", "schema", "kv", "context", "formula", "published", "memory", "mapped", "ops", "host", "copies",
    "pause", "lengths", "convert",
)  # fmt: skip


@pytest.fixture(autouse=True)
def known_costs() -> None:
    """Leave the costs of rounds to be measured, unlike in other tests."""


@pytest.fixture
def tiny(tiny_pair: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny pair in the layout of a published pair."""
    shutil.copytree(tiny_pair("e2b") / "target", tmp_path / "tiny")
    shutil.copytree(tiny_pair("e2b") / "target-assistant", tmp_path / "tiny" / "drafter")
    return tmp_path / "tiny"


def measure(*args: str | Path) -> str:
    """Run the script in this process, which saves the start of a process."""
    output = io.StringIO()
    arguments, path = [str(SCRIPT), *map(str, args)], [str(SCRIPT.parent), *sys.path]
    with patch.object(sys, "argv", arguments), patch.object(sys, "path", path), redirect_stdout(output):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ending:
            # --help ends in this way.
            if ending.code:
                raise
        finally:
            # Hypothesis tries constants of all modules of this project. No later test must find those of the script.
            for name in [name for name in sys.modules if name.partition(".")[0] == "measuring"]:
                del sys.modules[name]
    return output.getvalue()


def measure_in_process(*args: str | Path) -> str:
    result = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def cells(output: str, start: str) -> list[str]:
    """Return the words of an output line after its first words, `start`."""
    (line,) = (line for line in output.splitlines() if line.strip().startswith(start))
    return line.strip().removeprefix(start).split()


def test_help_names_all_measurements() -> None:
    output = measure_in_process("--help")
    assert all(re.search(rf"^ +{name} ", output, re.MULTILINE) for name in MEASUREMENTS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_each_measurement_has_a_help(name: str) -> None:
    output = measure(name, "--help")
    assert f"python scripts/measure.py {name}" in output
    assert "options:" in output


def test_copies_gain_on_edits_and_cost_nothing_elsewhere() -> None:
    output = measure("copies", "--files", "4", "-m", "200", "--draws", "2")
    tables = output.split("\n\n")[1:]
    assert len(tables) == 5
    for table in tables:
        rows = {row[0]: [float(cell) for cell in row[1:]] for row in map(str.split, table.splitlines()[2:8])}
        assert list(rows) == ["edit", "rewrite", "blocks", "cite", "code", "prose"]
        # The fourth margin is the one in use.
        assert all(rows[kind][4] > 1.05 * rows[kind][0] for kind in ("edit", "rewrite", "cite"))
        assert all(rows[kind][4] > 0.97 * rows[kind][0] for kind in ("code", "prose"))
    assert "in use: a margin of 1.4, and 1.7 after a loss" in output


def test_auto_is_near_the_best_fixed_length(tmp_path: Path) -> None:
    report = {
        "cases": [{"costs": {"verify": [1, 1.2, 1.3, 1.5, 1.6, 1.8, 2.0, 2.2, 2.4], "draft": 0.1, "overhead": 0}}]
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    output = measure(
        "lengths", "--kinds", "code", "--contexts", "40", "-m", "30", "--reports", tmp_path / "report.json"
    )
    _, plain, *fixed, auto, share, _ = (float(cell) for cell in cells(output, "code   40"))
    assert plain == 1
    assert max(fixed) > 1.3
    assert share == pytest.approx(auto / max(1, *fixed[:4]), rel=0.02)


def test_a_round_launches_fewer_kernels_than_a_pass_of_mlx_lm() -> None:
    """The sizes are the real sizes. docs/performance.md has the counts of the other models."""
    output = measure("ops", *(PUBLISHED / name for name in ("E2B", "12B", "31B")), "--details")
    most = {"E2B": (730, 500, 50), "12B": (830, 600, 50), "31B": (1034, 740, 50)}
    for name, (most_compiled, most_plain, most_draft) in most.items():
        _, compiled, plain, _, _, draft_step, reference = map(int, cells(output, name))
        assert compiled <= most_compiled < reference
        assert plain <= most_plain
        assert draft_step <= most_draft
    details = output.split("plain round, compiled:")[1]
    assert re.search(rf" {35 * 6 + 2} QuantizedMatmul\n", details)


def test_each_more_text_in_a_pass_adds_few_kernels() -> None:
    """These are its own attentions, K/V writes and token. docs/batching.md has the counts of all models."""
    output = measure("ops", PUBLISHED / "E2B", "--texts", "1,2,8")
    for way, most in (("eager", 1338), ("compiled", 730), ("kernels", 500)):
        one, two, eight = map(int, cells(output, f"E2B   {way}"))
        assert one <= most
        assert eight - two == 6 * 121
        assert two - one <= 2 * 121


def test_the_pause_of_running_texts_is_a_chunk_and_a_round(tiny: Path) -> None:
    output = measure("pause", "--model", tiny, "--tokens", "300", "--running", "2", "--step-sizes", "64", "32")
    for size in ("64", "32"):
        chunk, longest_round, both, pause, share = map(float, cells(output, f"{size}   "))
        assert max(chunk, longest_round) <= pause <= both + 0.002
        assert share > 0


def test_an_artificial_drafter_is_accepted_as_told(tiny: Path) -> None:
    """The script itself checks that the text is plain decoding's text."""
    options = ("--quick", "--repeats", "1", "--chances", "0.5", "1", "--num-draft-tokens", "2", "-m", "90")
    output = measure("formula", "--model", tiny, *options)
    lengths = {chance: float(cells(output, f"{chance}  2")[0]) for chance in ("0.5", "1.0")}
    assert lengths["0.5"] == pytest.approx(1.75, abs=0.2)
    assert lengths["1.0"] > 2.9


def test_how_well_the_demo_pair_drafts() -> None:
    """The files are not in its training data, and k = 3. docs/demo-pair.md has the figures."""
    output = measure("pair", "--prompts", "2", "--max-tokens", "60", "--repeats", "0", "--text-tokens", "300")
    library, packages = output.split("other packages:")
    for part in (library, packages):
        greedy = cells(part, "greedy:")
        sampled = cells(part, "temperature 1, top-k 64, top-p 0.95:")
        assert float(greedy[0]) > 2.6
        assert float(sampled[0]) > 2.0
        assert int(sampled[sampled.index("of") - 1].rstrip("%")) < 20
        # The first 300 tokens of a file are harder than the 512 of the figures in the docs.
        assert min(map(float, cells(part, "agreement by step, on the files' own text:"))) > 0.5


SMALL = ("--prompts", "2", "--prompt-tokens", "100", "--max-tokens", "12")


def test_acceptance_rules() -> None:
    output = measure("rules", *SMALL, "--seeds", "1")
    for rule in ("block verification", "token by token", "sample and compare"):
        assert 0 <= float(cells(output, rule)[0]) <= 3
    assert "on the same" in output


def test_quantized_kv() -> None:
    output = measure("kv", *SMALL)
    full, everything = (int(cells(output, "none")[i]) for i in (6, 7))
    assert int(cells(output, "8")[6]) < full < everything
    assert output.splitlines()[2].endswith("2 of 2, 100%")


def test_a_json_schema() -> None:
    output = measure("schema", *SMALL, "--seeds", "1")
    assert 1 <= float(cells(output, "schema")[0]) <= 4
    assert 1 <= float(cells(output, "no schema")[0]) <= 4


def test_contexts() -> None:
    output = measure("context", "--contexts", "64", "128", "-m", "6")
    assert [line.split()[1] for line in output.splitlines()[2:]] == ["64", "128"]


def test_the_host(tiny: Path) -> None:
    output = measure("host", tiny, "--repeats", "1", "--one-kernel-each")
    assert [line.split()[0] for line in output.splitlines()][:4] == ["mlx-mtp"] * 3 + ["mlx-lm"]


@pytest.mark.parametrize("bits", ["4", "16"])
def test_the_size_of_a_model(tiny: Path, bits: str) -> None:
    options = (
        "--bits",
        bits,
        "--dtype",
        "float32",
        "--quick",
        "--chances",
        "1",
        "--max-tokens",
        "12",
        "--repeats",
        "1",
        "--mlx-lm",
        "--rounds-ahead",
        "on",
        "off",
    )
    # It sets the seed of MLX.
    output = measure_in_process("published", tiny, *options)
    assert len(cells(output, "v(1) to v(9), ms:")) == 9
    # The last columns are the tokens per round, the host reads and the share of rounds ahead.
    for ahead in ("on", "off"):
        plain, three = (cells(output, f"on{ahead:>6}   1.00    {k}") for k in (0, 3))
        assert (float(plain[-3]), float(three[-3])) == (1, 3.67)
        assert (float(plain[-1]) > 0.5) == (ahead == "on")
    report = json.loads(output.splitlines()[-1])
    assert [len(found["tokens_per_second"]) for found in report["speeds"]] == [1] * 14
    assert {found["ahead"] for found in report["speeds"]} == {"on", "off"}
    assert report["kernels"]["on"]["in_use"] == "none"
    assert len(report["kernels"]["on"]["seconds"]["waiting"]["verify"]) == 9
    (speed,) = report["mlx_lm"]
    assert f"mlx-lm: {speed:.1f} tokens/s" in output


def test_planned_memory() -> None:
    """README has these figures. The weights of E2B at 4 bit are 4.63 billion values of 4.5 bits, and the drafter."""
    output = measure("memory", PUBLISHED / "E2B", PUBLISHED / "26B")
    weights, peak, mapped, kv = map(float, cells(output, "E2B"))
    assert weights == pytest.approx(4.63 * 4.5 / 8 + 2 * 0.0777, abs=0.02)
    assert weights < peak < weights + 0.5
    assert peak - mapped == pytest.approx(2.349 * 4.5 / 8 - 0.064, abs=0.02)
    assert kv == 6.1
    assert cells(output, "26B")[2] == "-"


def test_mapped_embeddings(tiny: Path) -> None:
    output = measure("mapped", tiny, "--dtype", "float32", "--rounds", "1", "--turns", "1")
    assert float(cells(output, "rows read")[0]) == 0 < float(cells(output, "rows read")[1])


def test_conversion(tiny: Path) -> None:
    output = measure("convert", tiny, "--gigabytes", "0.001")
    assert [line.split()[0] for line in output.splitlines()] == ["checkpoint", "mlx-mtp:", "mlx-lm:"]
