"""The speed of several texts that decode together, against one after the other."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, Literal

from mlx_mtp.model import Model
from mlx_mtp.options import GenerationOptions

Length = int | Literal["auto"]
# The names of both ways in the report.
TOGETHER, IN_TURN = "together", "one_after_the_other"


def measure_together(
    model: Model,
    prompt: list[int],
    options: GenerationOptions,
    lengths: list[Length],
    counts: tuple[int, ...],
    repeats: int,
    on_run: Callable[[], object],
) -> dict[str, Any]:
    """Return the tokens per second of some numbers of texts, by their number and by draft length.

    All ways run in turn, `repeats` times, after a turn that does not count. The time includes that of the prompts. The
    texts have the prompt without one more of its first tokens each, so that none is equal to another.
    """
    return {
        str(count): _measure(model, [prompt[index:] for index in range(count)], options, lengths, repeats, on_run)
        for count in counts
    }


def _measure(
    model: Model,
    prompts: list[list[int]],
    options: GenerationOptions,
    lengths: list[Length],
    repeats: int,
    on_run: Callable[[], object],
) -> dict[str, Any]:
    found: dict[Length, dict[str, list[float]]] = {k: {TOGETHER: [], IN_TURN: []} for k in lengths}
    for repeat in range(-1, repeats):
        for k, speeds in found.items():
            chosen = replace(options, num_draft_tokens=k)
            for way, concurrency in ((IN_TURN, 1), (TOGETHER, len(prompts))):
                began = time.perf_counter()
                results = model.generate_batch(prompts, chosen, concurrency=concurrency)
                seconds = time.perf_counter() - began
                on_run()
                if repeat >= 0:
                    speeds[way].append(sum(len(result.tokens) for result in results) / seconds)
    return {str(k): _figures(speeds) for k, speeds in found.items()}


def _figures(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians and ranges. The ratio is the median over pairs of runs in the same turn."""
    ratios = [a / b for a, b in zip(speeds[TOGETHER], speeds[IN_TURN], strict=True)]
    ways = {way: {"tokens_per_second": median(each), "range": [min(each), max(each)]} for way, each in speeds.items()}
    return ways | {"ratio": median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def lines(figures: dict[str, Any]) -> list[str]:
    """Return the lines of the table for the figures of `measure_together`."""
    return [
        f"{count} texts, {k} draft tokens: {row[TOGETHER]['tokens_per_second']:.1f} tokens/s together, "
        f"{row[IN_TURN]['tokens_per_second']:.1f} one after the other, {row['ratio']:.2f} times"
        for count, by_length in figures.items()
        for k, row in by_length.items()
    ]
