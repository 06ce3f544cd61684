"""Measurements in a process of their own, whose memory nothing else uses."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")


def in_new_process(measure: Callable[..., Result], *arguments: object) -> Result:
    """Call a function of a module with these arguments in a new process, and return its result."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure, *arguments).result()
