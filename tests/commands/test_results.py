"""The table of docs/results, made as its README says: with `mlx-mtp bench --json` and `scripts/results_table.py`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import run
from support.curves import use_known_costs
from support.paths import ROOT

SCRIPT = ROOT / "scripts" / "results_table.py"
RESULTS = ROOT / "docs" / "results"


def make_table(*args: str | Path, script: Path = SCRIPT, code: int = 0) -> str:
    """Run the script. Return its output, or its error if `code` is not 0."""
    result = subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def report(tiny_pair: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["--kinds", "code,list", "--contexts", "40", "--temps", "0,1", "--num-draft-tokens", "1,2", "-m", "4"]
    with pytest.MonkeyPatch.context() as patch:
        # The fixture of all tests is not yet in use when this one is made.
        use_known_costs(patch)
        result = run("bench.cli", "--model", tiny_pair("e2b") / "target", *options, "--repeats", "1", "--json")
    file = tmp_path_factory.mktemp("report") / "tiny.json"
    file.write_text(result.stdout)
    return file


def test_the_table_in_the_readme_has_all_reports() -> None:
    assert f"<!-- results -->\n{make_table()}<!-- end of results -->" in (RESULTS / "README.md").read_text("utf-8")


def test_a_row_has_the_figures_of_a_report(report: Path) -> None:
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in make_table(report).splitlines()]
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    found = json.loads(report.read_text())
    machine, settings = found["environment"], [case["settings"] for case in found["cases"]]
    assert (first["chip"], first["system"], first["MLX"]) == (machine["chip"], machine["os"], machine["mlx"])
    assert first["memory"] == f"{machine['memory'] / 2**30:.0f} GiB"
    assert (first["target"], first["weights"], first["prompt"]) == ("target", "float32", "40")
    assert (first["T"], second["T"]) == ("0", "1")
    plain = sorted(settings[case]["0"]["tokens_per_second"] for case in (0, 2))
    assert first["plain tokens/s"] == f"{plain[0]:.1f} to {plain[1]:.1f}"
    best = max("012", key=lambda k: settings[0][k]["ratio"])
    assert first["code"] == f"{settings[0][best]['ratio']:.2f} ({best})"
    assert (first["prose"], first["chat"], first["copy"]) == ("", "", "")
    assert first["list"]


def test_a_report_is_added_to_the_readme(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "results"
    shutil.copytree(RESULTS, folder)
    shutil.copy(report, folder)
    script = tmp_path / "scripts" / SCRIPT.name
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    before = (folder / "README.md").read_text("utf-8")
    make_table("--write", script=script)
    after = (folder / "README.md").read_text("utf-8")
    added = set(after.splitlines()) - set(before.splitlines())
    assert added == set(make_table(report).splitlines()[2:])
    assert set(before.splitlines()) <= set(after.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "expected the output of mlx-mtp bench --json: "),
        ("{}", "expected a report of mlx-mtp bench --json with the field 'environment'"),
        ("[]", "expected a report of mlx-mtp bench --json, found other JSON"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    assert make_table(file, code=1).startswith(f"error: {file}: {message}")


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert make_table(tmp_path / "none.json", code=1).startswith(f"error: {tmp_path / 'none.json'}: No such file")
