"""The documents: links lead to files and headings, the page of options is up to date, README stays short."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
OPTIONS = ROOT / "docs" / "options.md"
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:mlx-mtp[ -]|python -m mlx_mtp\.)([\w-]+)([^`]*)")
# The names of modules and scripts that differ from the name of the command.
NAMES = {"server": "serve", "cache_prompt": "cache-prompt"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    yield from (link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 9000


def test_every_page_can_be_reached_from_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if link[0] != "#"]
    assert set((ROOT / "docs").glob("*.md")) <= reached


def test_the_page_of_options_is_that_of_the_parsers(tmp_path: Path) -> None:
    script, written = ROOT / "scripts" / "write_options.py", tmp_path / "options.md"
    subprocess.run([sys.executable, script, written], check=True)
    text = written.read_text(encoding="utf-8")
    assert text == OPTIONS.read_text(encoding="utf-8"), "run python scripts/write_options.py"
    assert max(map(len, text.splitlines())) <= 130


def documented_options() -> dict[str, set[str]]:
    """Return the options of each command on the page of options."""
    own, shared = OPTIONS.read_text(encoding="utf-8").split("## Options of several commands")
    found = {
        name: set(re.findall(r"`(-[\w-]+)", text))
        for name, text in re.findall(r"^## mlx-mtp (\S+)\n(.*?)(?=^## |\Z)", own, re.MULTILINE | re.DOTALL)
    }
    for commands, text in re.findall(r"^Commands: (.*?)\n(.*?)(?=^### |\Z)", shared, re.MULTILINE | re.DOTALL):
        for name in re.findall(r"`(\S+)`", commands):
            found[name] |= set(re.findall(r"`(-[\w-]+)", text))
    return found


def test_every_command_has_its_options() -> None:
    options = documented_options()
    assert options["generate"] >= {"--model", "-p", "--json-schema", "--temp", "--thinking-budget", "--kv-bits"}
    assert options["serve"] >= {"--port", "--api-key", "--seed"}
    assert options["convert"] >= {"--hf-path", "-q", "--draft-vocab"}
    assert set(options) == {"generate", "chat", "serve", "convert", "bench", "train", "probe", "cache-prompt"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documents_have_known_options(page: Path) -> None:
    options = documented_options()
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        for part in re.split(r"&&|;", line):
            match = COMMAND.search(part)
            name = match and NAMES.get(match[1], match[1])
            if match and name in options:
                given = set(re.findall(r"(?<!\S)(--?[a-z][\w-]*)", match[2]))
                assert given <= options[name] | {"--help"}, part
