"""Plots of a `bench` report as PNG files. They need matplotlib: `pip install 'mlx-mtp[plot]'`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.checkpoints.output_files import existing_parent, new_folder, remove_abandoned
from mlx_mtp.errors import OptionError, OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plots(folder: Path) -> None:
    """Check that plots can be written to a new folder.

    Raises OptionError if matplotlib is not installed, OutputError if the folder exists or cannot be made.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(f"--plot needs matplotlib ({error}): pip install 'mlx-mtp[plot]'") from None
    remove_abandoned(folder)
    if folder.exists():
        raise OutputError(f"{folder}: exists already; choose another --plot")
    if not existing_parent(folder).is_dir():
        raise OutputError(f"{folder}: cannot be written: {existing_parent(folder)} is not a folder")


def write_plots(report: dict[str, Any], folder: Path) -> None:
    """Write `speedup.png`, `acceptance.png` and `cost.png` to a folder that appears only when it is complete.

    Without a drafter there is only `speedup.png`. Raises OutputError if writing fails.
    """
    figures = {"speedup": speedup(report)}
    if any("costs" in case for case in report["cases"]):
        figures |= {"acceptance": acceptance(report), "cost": cost(report)}
    with new_folder(folder) as new:
        for name, figure in figures.items():
            figure.savefig(new / f"{name}.png", dpi=120)


def speedup(report: dict[str, Any]) -> "Figure":
    """Plot the speed ratio to plain decoding by number of draft tokens.

    There is one line per case. A dotted line shows the ratio of `auto`.
    """
    figure, axes = _axes("draft tokens per round", "tokens/s over plain decoding")
    for index, case in enumerate(report["cases"]):
        fixed = {int(k): row["ratio"] for k, row in case["settings"].items() if k.isdigit()}
        color = f"C{index % 10}"
        axes.plot(list(fixed), list(fixed.values()), "o-", color=color, label=_name(case))
        if "auto" in case["settings"]:
            axes.axhline(case["settings"]["auto"]["ratio"], color=color, linestyle=":", linewidth=1)
    axes.axhline(1, color="black", linewidth=0.5)
    _legend(figure, axes)
    return figure


def acceptance(report: dict[str, Any]) -> "Figure":
    """Plot the share of accepted draft tokens by position, for the longest fixed draft length of each case."""
    figure, axes = _axes("draft position", "share accepted of those that got there")
    for case in report["cases"]:
        longest = max((k for k in case["settings"] if k.isdigit()), key=int)
        shares = case["settings"][longest]["acceptance_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, "o-", label=_name(case))
    axes.set_ylim(0, 1)
    _legend(figure, axes)
    return figure


def cost(report: dict[str, Any]) -> "Figure":
    """Plot the milliseconds of a pass by number of rows.

    A line shows the time to read the weights once at the memory bandwidth. A dotted line shows a draft step.
    """
    figure, axes = _axes("rows of a pass", "milliseconds")
    seen = set()
    for case in report["cases"]:
        if case["temperature"] not in seen:
            seen.add(case["temperature"])
            unit = 1e3 * case["costs"]["seconds"]
            verify = [unit * share for share in case["costs"]["verify"]]
            (line,) = axes.plot(range(1, len(verify) + 1), verify, "o-", label=f"temperature {case['temperature']:g}")
            draft = unit * case["costs"]["draft"]
            axes.axhline(draft, color=line.get_color(), linestyle=":", label=f"draft step, {draft:.2f} ms")
    bound = 1e3 / report["bound_tokens_per_second"]
    axes.axhline(bound, color="black", label=f"weights at {report['bandwidth'] / 1e9:.0f} GB/s")
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _name(case: dict[str, Any]) -> str:
    return f"{case['kind']}, {case['context']} tokens, T = {case['temperature']:g}"


def _axes(x: str, y: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _legend(figure: "Figure", axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
