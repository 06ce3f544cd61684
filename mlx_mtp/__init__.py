"""Gemma 4 with its multi-token-prediction drafter, lossless, on Apple Silicon."""

from importlib.metadata import version

from .engine import GenerationOptions, GenerationResponse, GenerationResult, Model
from .errors import (
    CalibrationError,
    ConfigError,
    HubError,
    MTPError,
    OptionError,
    OutputError,
    PairError,
    PromptError,
    TokenizerError,
    WeightsError,
)
from .load import DEMO_PAIR, load
from .sampling import Sampling

__version__ = version("mlx-mtp")

__all__ = [
    "DEMO_PAIR",
    "CalibrationError",
    "ConfigError",
    "GenerationOptions",
    "GenerationResponse",
    "GenerationResult",
    "HubError",
    "MTPError",
    "Model",
    "OptionError",
    "OutputError",
    "PairError",
    "PromptError",
    "Sampling",
    "TokenizerError",
    "WeightsError",
    "__version__",
    "load",
]
