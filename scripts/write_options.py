"""Write docs/options.md: the options of every command, from their parsers.

python scripts/write_options.py
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
# The commands in the order of the page, and their modules.
COMMANDS = {
    "generate": "mlx_mtp.generate",
    "chat": "mlx_mtp.chat",
    "serve": "mlx_mtp.server.cli",
    "convert": "mlx_mtp.convert.cli",
    "bench": "mlx_mtp.bench.cli",
    "train": "mlx_mtp.train",
    "probe": "mlx_mtp.probe",
    "cache-prompt": "mlx_mtp.cache_prompt",
}
# Groups of options that are the same in several commands. The page has each of them once.
SHARED = ("sampling", "thinking", "quantized K/V")
WIDTH = 130
INTRODUCTION = """\
`scripts/write_options.py` writes this page from the parsers of the commands. `mlx-mtp COMMAND --help` prints the same
texts. Each command is also a module: `python -m mlx_mtp.generate`, and `python -m mlx_mtp.server` for `serve`.
"""


def main() -> None:
    parsers = {name: import_module(module).parser() for name, module in COMMANDS.items()}
    lines = ["# Options", "", *wrap(INTRODUCTION)]
    for name, parser in parsers.items():
        lines += ["", f"## mlx-mtp {name}", "", *wrap(parser.description or ""), *own_groups(parser)]
    lines += ["", "## Options of several commands"]
    for title in SHARED:
        lines += shared_group(title, parsers)
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def groups(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Return the lines of each group of options that is not empty, by its title."""
    # argparse has no public list of the options.
    found = {group.title or "": list(items(group._group_actions, parser)) for group in parser._action_groups}
    return {title: lines for title, lines in found.items() if lines}


def items(actions: list[argparse.Action], parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in actions:
        if not isinstance(action, argparse._HelpAction):
            names = ", ".join(f"`{name}{value(action)}`" for name in action.option_strings)
            text = (action.help or "") % (vars(action) | {"prog": parser.prog})
            yield from wrap(f"{names}: {text}", "- ")


def value(action: argparse.Action) -> str:
    """Return the placeholder of an option's value, with a blank before it. It is empty for a switch."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return f" {'|'.join(map(str, action.choices))}"
    return f" {action.metavar or action.dest.upper()}"


def own_groups(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines of a command's own options, and links to the options that it shares with other commands."""
    links = []
    for title, lines in groups(parser).items():
        if title in SHARED:
            links.append(f"[{title}](#{anchor(title)})")
        elif title == "options":
            yield from ("", *lines)
        else:
            yield from ("", f"**{title.capitalize()}**", "", *lines)
    if links:
        yield from ("", f"The options of {', '.join(links)} also apply.")


def shared_group(title: str, parsers: dict[str, argparse.ArgumentParser]) -> list[str]:
    """Return the section of options that several commands share. Exit if the commands differ in them."""
    found = {name: lines for name, parser in parsers.items() if (lines := groups(parser).get(title))}
    first, *others = found.values()
    if any(lines != first for lines in others):
        sys.exit(f"error: the options of {title!r} differ between {', '.join(found)}")
    commands = ", ".join(f"`{name}`" for name in found)
    return ["", f"### {title[0].upper()}{title[1:]}", "", f"Commands: {commands}.", "", *first]


def anchor(title: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    kept = (character for character in title.lower() if character.isalnum() or character in " -")
    return "".join(kept).replace(" ", "-")


def wrap(text: str, lead: str = "") -> list[str]:
    """Return a paragraph in lines, with a lead before its first line."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    main()
