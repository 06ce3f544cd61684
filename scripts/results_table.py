"""Make the table of docs/results/README.md from the reports of `mlx-mtp bench --json` in that folder.

A row has a report's figures at one prompt length and one temperature. Without files, all reports of the folder are
read. `--write` puts the table into the README. Without it, the table is printed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
README = RESULTS / "README.md"
# The table of the README is between these lines.
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
KINDS = ("code", "prose", "chat", "copy", "list")
HEADER = ("chip", "memory", "system", "target", "weights", "T", "prompt", "plain tokens/s", *KINDS, "mlx-mtp", "MLX")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="reports (default: docs/results/*.json)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/results/README.md")
    args = parser.parse_args()
    text = table(args.files or sorted(RESULTS.glob("*.json")))
    if args.write:
        write(text)
    else:
        print(text)


def table(files: list[Path]) -> str:
    """Return the table of reports as Markdown. Exit with a message if a file is no report."""
    found = [row for file in files for row in rows(file)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADER, ("---",) * len(HEADER), *found))


def rows(file: Path) -> list[tuple[str, ...]]:
    """Return the rows of a report. Exit with a message if the file is no report or lacks a field."""
    try:
        return list(_rows(json.loads(file.read_text(encoding="utf-8"))))
    except OSError as error:
        sys.exit(f"error: {file}: {error.strerror}")
    except ValueError as error:
        sys.exit(f"error: {file}: expected the output of mlx-mtp bench --json: {error}")
    except KeyError as error:
        sys.exit(f"error: {file}: expected a report of mlx-mtp bench --json with the field {error}")
    except (AttributeError, TypeError):
        sys.exit(f"error: {file}: expected a report of mlx-mtp bench --json, found other JSON")


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    machine = report["environment"]
    memory = f"{machine['memory'] / 2**30:.0f} GiB"
    start = (machine["chip"], memory, machine["os"], report["target"], weights(report))
    by_settings: dict[tuple[float, int], dict[str, Any]] = {}
    for case in report["cases"]:
        by_settings.setdefault((case["temperature"], case["context"]), {})[case["kind"]] = case["settings"]
    for (temperature, context), kinds in by_settings.items():
        plain = [settings["0"]["tokens_per_second"] for settings in kinds.values()]
        speed = f"{min(plain):.1f} to {max(plain):.1f}" if len(plain) > 1 else f"{plain[0]:.1f}"
        ratios = [ratio(kinds[kind]) if kind in kinds else "" for kind in KINDS]
        versions = (machine["mlx-mtp"], machine["mlx"])
        yield (*start, f"{temperature:g}", str(context), speed, *ratios, *versions)


def weights(report: dict[str, Any]) -> str:
    """Return the type of the target's weights: bits and mode of the quantization, or the type of computation."""
    quantization = report["target_quantization"]
    return f"{quantization['bits']} bit {quantization['mode']}" if quantization else report["dtype"]


def ratio(settings: dict[str, Any]) -> str:
    """Return the speed of `auto` over plain decoding, or of the best number of draft tokens, which follows then."""
    if "auto" in settings:
        return f"{settings['auto']['ratio']:.2f}"
    best = max((k for k in settings if k.isdigit()), key=lambda k: settings[k]["ratio"])
    return f"{settings[best]['ratio']:.2f} ({best})"


def write(text: str) -> None:
    """Replace the table of the README."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
