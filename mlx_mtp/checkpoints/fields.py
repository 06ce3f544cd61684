"""The fields of a JSON object in a checkpoint's file, with an error for each that is missing or has a wrong value."""

import math
from pathlib import Path
from typing import Any

from mlx_mtp.errors import ConfigError


class Fields:
    """A JSON object. A missing or mistyped field raises an error that names the file and the field."""

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, message: str) -> ConfigError:
        """Return an error that names the file and the field."""
        return ConfigError(f"{self.path}: field {self.prefix}{name} {message}")

    def require(self, name: str) -> Any:
        """Return the value of a field, which may be null."""
        if name not in self.values:
            raise self.error(name, "is missing")
        return self.values[name]

    def integer(self, name: str, minimum: int = 1) -> int:
        """Return an integer, which may be written as a string or as a float."""
        value = self.require(name)
        number = as_number(value)
        if number is None or not number.is_integer() or number < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}, found {value!r}")
        return int(number)

    def number(self, name: str) -> float:
        """Return a positive number, which may be written as a string."""
        value = self.require(name)
        number = as_number(value)
        if number is None or number <= 0:
            raise self.error(name, f"must be a positive number, found {value!r}")
        return number

    def boolean(self, name: str) -> bool:
        """Return a field that is true or false."""
        value = self.require(name)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, found {value!r}")
        return value

    def object(self, name: str) -> "Fields":
        """Return the fields of an object in a field."""
        value = self.require(name)
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, found {value!r}")
        return Fields(value, self.path, f"{self.prefix}{name}.")

    def string(self, name: str) -> str:
        """Return a string."""
        value = self.require(name)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, found {value!r}")
        return value

    def expect(self, name: str, values: tuple[Any, ...]) -> None:
        """Raise ConfigError if a field holds anything but one of the values, or null. It may be missing."""
        if name in self and self.values[name] not in values:
            raise self.error(name, f"must be one of {list(values)}, found {self.values[name]!r}")


def as_number(value: object) -> float | None:
    """Return a finite number, which may be written as a string; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
