"""The check of a release's tag. `.ci/run` runs the other checks of `scripts/check_wheel.py`, which take minutes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the script and the two files that have a version."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "check_wheel.py", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mlx-mtp"\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.3]\n\n## [1.2.2] - 2026-01-02\n")
    return tmp_path


def refused(checkout: Path, tag: str) -> str:
    """Run the script, which must fail. Return its error."""
    command = [sys.executable, str(checkout / "scripts" / "check_wheel.py"), "--tag", tag]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    return result.stderr


def test_a_tag_of_another_version_is_refused(checkout: Path) -> None:
    expected = "error: pyproject.toml: expected the version of the tag v1.2.2, found 1.2.3\n"
    assert refused(checkout, "v1.2.2") == expected


def test_a_version_without_a_date_in_the_changelog_is_refused(checkout: Path) -> None:
    expected = "error: CHANGELOG.md: expected a heading '## [1.2.3] - YEAR-MONTH-DAY'\n"
    assert refused(checkout, "v1.2.3") == expected


def test_a_tag_that_agrees_leads_to_the_build(checkout: Path) -> None:
    """The folder is no repository, so the next step fails."""
    changelog = checkout / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("## [1.2.3]", "## [1.2.3] - 2026-02-03"))
    assert "'git', 'clone'" in refused(checkout, "v1.2.3")
