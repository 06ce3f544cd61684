"""Gemma 4 with its multi-token-prediction drafter, lossless, on Apple Silicon."""

import logging
from importlib.metadata import version

from .engine import GenerationOptions, GenerationResponse, GenerationResult, Model
from .errors import (
    BusyError,
    CalibrationError,
    ClosedError,
    ConfigError,
    HubError,
    MemoryLimitError,
    MTPError,
    OptionError,
    OutputError,
    PairError,
    PromptCacheError,
    PromptError,
    TokenizerError,
    WeightsError,
)
from .load import DEMO_PAIR, aload, load, plan_memory
from .memory import MemoryPlan
from .sampling import Sampling

__version__ = version("mlx-mtp")

# Silent unless the program sets up logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "DEMO_PAIR",
    "BusyError",
    "CalibrationError",
    "ClosedError",
    "ConfigError",
    "GenerationOptions",
    "GenerationResponse",
    "GenerationResult",
    "HubError",
    "MTPError",
    "MemoryLimitError",
    "MemoryPlan",
    "Model",
    "OptionError",
    "OutputError",
    "PairError",
    "PromptCacheError",
    "PromptError",
    "Sampling",
    "TokenizerError",
    "WeightsError",
    "__version__",
    "aload",
    "load",
    "plan_memory",
]
