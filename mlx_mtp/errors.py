"""The errors of this package. Each message names the file or field, the expected value and the found value."""

import logging

# The package logs nothing unless the program sets up logging. The handler is added here because every module that logs
# imports this module, and `mlx_mtp/__init__.py` imports nothing that takes time.
logging.getLogger(__package__).addHandler(logging.NullHandler())


class MTPError(ValueError):
    """Base class of every error that a caller or a command line can expect."""


class ConfigError(MTPError):
    """A config.json is missing, unreadable or incomplete, or describes an unsupported model."""


class WeightsError(MTPError):
    """A checkpoint's tensors are missing, truncated or unexpected, or have the wrong shape."""


class PairError(MTPError):
    """A drafter does not belong to the target."""


class TokenizerError(MTPError):
    """A tokenizer is missing or unreadable."""


class HubError(MTPError):
    """A model is neither a local folder nor available on the Hugging Face hub.

    `is_absent` is true if the hub has no such repository, or none that this token may see. Offline, it is true if the
    cache has none. It is false if the hub fails, or if it refuses a repository that exists.
    """

    def __init__(self, message: str, *, is_absent: bool = False) -> None:
        super().__init__(message)
        self.is_absent = is_absent


class PromptError(MTPError):
    """A prompt is empty, cannot be rendered, or does not fit the context."""


class ContextLengthError(PromptError):
    """A prompt does not fit the context."""


class MediaError(PromptError):
    """A picture, sound or video of a prompt is unreadable or unsupported, or a package that decodes it is missing."""


class MemoryLimitError(MTPError):
    """A model with the K/V of its context needs more memory than the limit."""


class PromptCacheError(MTPError):
    """A file with a prompt's K/V is damaged, or belongs to another model, version or K/V quantization."""


class OutputError(MTPError):
    """An output exists already, cannot be written, or does not fit on the disk."""


class OptionError(MTPError):
    """An option has a value that this version cannot use."""


class DeviceError(OptionError):
    """The device has no kernel for a computation, or computes it wrong."""


class DraftError(MTPError):
    """A drafter does not draft in the way that the round needs."""


class CalibrationError(MTPError):
    """The cost of rounds on this machine could not be measured."""


class DataError(MTPError):
    """A file of training data is missing or unreadable, or has nothing to train on."""


class TrainingError(MTPError):
    """Training cannot continue. Its last good state is kept."""


class GroupError(MTPError):
    """The machines that share a model cannot work together, or one of them was lost."""


class BusyError(MTPError):
    """The number of requested generations is larger than the number that may wait."""


class ClosedError(MTPError):
    """A model is used after it was closed."""


class ServerError(MTPError):
    """The server cannot be started."""
