"""The errors this package raises: each message names the file or field, what was expected and what was found."""

import logging

# Silent unless the program sets up logging. Here, because every module that logs imports this one, and the package
# itself imports nothing that takes time.
logging.getLogger(__package__).addHandler(logging.NullHandler())


class MTPError(ValueError):
    """Base of every error a caller or a command line is expected to see."""


class ConfigError(MTPError):
    """A config.json is absent, unreadable, incomplete or of an unsupported model."""


class WeightsError(MTPError):
    """A checkpoint's tensors are absent, truncated, misshapen or unexpected."""


class PairError(MTPError):
    """A drafter does not belong to the target."""


class TokenizerError(MTPError):
    """A tokenizer is absent or unreadable."""


class HubError(MTPError):
    """A model is neither a local folder nor reachable on the Hugging Face hub.

    `is_absent` says that the hub has no such repository, or none that this token may see, or, offline, that the cache
    has none; it is false where the hub fails or refuses one that is there.
    """

    def __init__(self, message: str, *, is_absent: bool = False) -> None:
        super().__init__(message)
        self.is_absent = is_absent


class PromptError(MTPError):
    """A prompt is empty, cannot be rendered, or does not fit the context."""


class ContextLengthError(PromptError):
    """A prompt does not fit the context."""


class MemoryLimitError(MTPError):
    """A model, with the K/V of its context, needs more memory than it may take."""


class PromptCacheError(MTPError):
    """A file of a prompt's K/V is damaged, of another model, or of another version."""


class OutputError(MTPError):
    """An output folder exists, cannot be written, or does not fit the disk."""


class OptionError(MTPError):
    """An option's value is not one this version can honour."""


class DraftError(MTPError):
    """A drafter does not draft as a round asks it to."""


class CalibrationError(MTPError):
    """What rounds cost on this machine could not be measured."""


class DataError(MTPError):
    """A file of training data is absent, unreadable or holds nothing to train on."""


class TrainingError(MTPError):
    """Training cannot go on; its last good state is kept."""


class BusyError(MTPError):
    """More generations are asked for at once than may wait."""


class ClosedError(MTPError):
    """A model is asked for something after it was closed."""


class ServerError(MTPError):
    """The server cannot be started."""
