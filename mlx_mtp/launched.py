"""Whether a launcher has started this process as one of several, and the names of splits.

This is all that a process alone needs to know of the package `group`.
"""

import os
from typing import Literal, get_args

from .errors import OptionError

# The ways to split a target over several machines.
SplitKind = Literal["tensor", "feed-forward", "pipeline"]
SPLITS: tuple[SplitKind, ...] = get_args(SplitKind)


def is_launched() -> bool:
    """Return whether the environment has the settings of a launcher such as `mlx.launch`."""
    return "MLX_RANK" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ


def check_alone(work: str) -> None:
    """Raise OptionError if a launcher has started this process. `work` is what one machine must do, as a noun."""
    if is_launched():
        raise OptionError(f"{work} needs one machine: start it without mlx.launch")
