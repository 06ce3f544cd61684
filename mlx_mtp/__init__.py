"""Lossless speculative decoding of Gemma 4 with its multi-token-prediction drafter, on Apple Silicon."""

import sys
from importlib import import_module
from types import ModuleType

# This stands for `typing.TYPE_CHECKING`, because the import of typing takes time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .decoding.prompt_media import PreparedPrompt
    from .decoding.sampling import Sampling
    from .errors import (
        BusyError,
        CalibrationError,
        ClosedError,
        ConfigError,
        DeviceError,
        GroupError,
        HubError,
        MediaError,
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
    from .loading import DEMO_PAIR, aload, load, plan_memory
    from .memory_plan import MemoryPlan
    from .model import Model
    from .options import GenerationOptions
    from .responses import GenerationResponse, GenerationResult

    __version__: str

__all__ = [
    "DEMO_PAIR",
    "BusyError",
    "CalibrationError",
    "ClosedError",
    "ConfigError",
    "DeviceError",
    "GenerationOptions",
    "GenerationResponse",
    "GenerationResult",
    "GroupError",
    "HubError",
    "MTPError",
    "MediaError",
    "MemoryLimitError",
    "MemoryPlan",
    "Model",
    "OptionError",
    "OutputError",
    "PairError",
    "PreparedPrompt",
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
# The modules that hold the public names.
_HOLDERS = (
    "errors",
    "decoding.sampling",
    "decoding.prompt_media",
    "options",
    "responses",
    "memory_plan",
    "model",
    "loading",
)


class _Package(ModuleType):
    """A package that imports the module of a public name when the name is first used.

    Python imports the package before it runs a command. With these late imports, the command starts at once. It can
    handle Ctrl-C before it imports anything that takes time.
    """

    def __getattr__(self, name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("mlx-mtp")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = (vars(import_module(f"{__name__}.{holder}")) for holder in _HOLDERS)
        value = next(module[name] for module in modules if name in module)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
