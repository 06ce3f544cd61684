"""Costs of rounds in the user's cache directory, so that each kind of pair is measured once on a machine."""

import fcntl
import hashlib
import json
import logging
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from mlx_mtp.checkpoints.output_files import replace_text
from mlx_mtp.errors import CalibrationError, ClosedError, OutputError

from .draft_length import MAX_DRAFT_TOKENS, CostCurve, Costs
from .shared_lengths import SharedCosts

logger = logging.getLogger(__name__)

# The number of seconds to wait for another program that measures.
_LONGEST_WAIT = 20.0


def cache_directory() -> Path:
    """Return the folder for measurements: `MLX_MTP_CACHE`, or the user's cache folder on this platform.

    Raises OSError if the user has no home folder.
    """
    if given := os.environ.get("MLX_MTP_CACHE"):
        return Path(given)
    if sys.platform != "darwin" and (caches := os.environ.get("XDG_CACHE_HOME")):
        return Path(caches) / "mlx-mtp"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(f"{error} MLX_MTP_CACHE can name a folder for it") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlx-mtp"


_Kept = TypeVar("_Kept", Costs, SharedCosts)


class _File(ABC, Generic[_Kept]):
    """The file that keeps the costs of an identity, in `folder` or the user's cache directory.

    The identity is everything that decides the cost of a round. Without a home folder, there is no file: a warning is
    logged, and nothing is kept.
    """

    def __init__(self, identity: dict[str, Any], folder: Path | None = None) -> None:
        text = json.dumps(identity, sort_keys=True)
        self._identity = json.loads(text)
        self.path: Path | None = None
        try:
            folder = folder or cache_directory()
            self.path = folder / f"rounds-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        except OSError as error:
            logger.warning("the measurement of rounds is not kept: %s", error)

    @abstractmethod
    def parse(self, seconds: Any) -> _Kept:
        """Return the costs from their values of JSON. Raises ValueError if they cannot be true."""

    def read(self) -> _Kept | None:
        """Return the costs in the file, or None if there is none. Log a warning if the file cannot be used."""
        if self.path is None:
            return None
        try:
            content = json.loads(self.path.read_text())
            if content["identity"] != self._identity:
                raise ValueError("of another pair, device or version")
            return self.parse(content["seconds"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            logger.warning("%s: not a usable measurement of rounds, measured again: %s", self.path, error)
            return None

    def write(self, costs: _Kept) -> None:
        """Keep the costs. Log a warning if the folder cannot be written."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"identity": self._identity, "seconds": costs.as_json()}
            replace_text(self.path, json.dumps(content, indent=2))
        except (OSError, OutputError) as error:
            logger.warning("%s: the measurement of rounds is not kept: %s", self.path, error)

    def lock(self, seconds: float = 0.0) -> "MeasuringLock | None":
        """Return the lock for measurements, or None if another program holds it for `seconds` seconds.

        Two measurements at once would disturb each other, so there is one lock for the folder.
        """
        folder = None if self.path is None else self.path.parent
        until = time.monotonic() + seconds
        while True:
            try:
                return MeasuringLock(folder)
            except BlockingIOError:
                if time.monotonic() > until:
                    return None
                time.sleep(0.05)


class CostsFile(_File[Costs]):
    """The file of the costs of one text's rounds."""

    def parse(self, seconds: Any) -> Costs:
        """Return the costs from their values of JSON. Raises ValueError if they cannot be true."""
        ahead = None if seconds["ahead"] is None else CostCurve(**seconds["ahead"])
        return checked(Costs(CostCurve(**seconds["waiting"]), ahead, tuple(seconds.get("copied", ()))))


class SharedCostsFile(_File[SharedCosts]):
    """The file of the costs of passes that several texts share."""

    def parse(self, seconds: Any) -> SharedCosts:
        """Return the costs from their values of JSON. Raises ValueError if they cannot be true."""
        costs = SharedCosts(**seconds | {"rows": tuple(seconds["rows"])})
        if not isinstance(costs.ahead, bool):
            raise ValueError(f"ahead must be true or false, found {costs.ahead!r}")
        _check(costs.rows, [costs.draft, costs.overhead, costs.text])
        return costs


class MeasuringLock:
    """The lock of the programs that measure, held until `release`. It is a lock of their folder.

    Raises BlockingIOError if another program holds the lock. If there can be no such lock, this one locks nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder: int | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            # The folder cannot be made, or its file system has no locks.
            self.release()

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None


def read_or_measure(file: _File[_Kept], measure: Callable[[], _Kept], *, remeasure: bool = False) -> _Kept:
    """Return the costs that the file keeps, or measure them.

    The costs are measured if none are kept, or if `remeasure` is set. A file that cannot be read, or that has another
    identity, is replaced by a new measurement. If the folder cannot be written, the costs are still measured, and a
    warning is logged. If another program measures for a long time, the costs are measured beside it, and are not kept.

    Raises CalibrationError if the measured costs cannot be true.
    """
    if not remeasure and (kept := file.read()) is not None:
        return kept
    lock = file.lock()
    try:
        if lock is None:
            lock = file.lock(_LONGEST_WAIT)
            # The program that held the lock may have measured the same rounds.
            if not remeasure and (kept := file.read()) is not None:
                return kept
        logger.info("measuring what rounds cost on this machine, once; kept in %s", file.path or "no file")
        costs = file.parse(measure().as_json())
        if lock is not None:
            file.write(costs)
        return costs
    except ClosedError:
        raise
    except ValueError as error:
        raise CalibrationError(
            f"{error}: rounds cannot be timed here; say how many draft tokens a round has with num_draft_tokens"
        ) from None
    finally:
        if lock is not None:
            lock.release()


def checked(costs: Costs) -> Costs:
    """Return the costs if they are plausible.

    Raises ValueError if no clock can have measured the costs.
    """
    curves = [costs.waiting] if costs.ahead is None else [costs.waiting, costs.ahead]
    for curve in curves:
        # Without a drafter, there is only the cost of a plain pass.
        if len(curve.verify) not in (1, MAX_DRAFT_TOKENS + 1):
            raise ValueError(f"expected {MAX_DRAFT_TOKENS + 1} costs of passes, of a draft step and of the rest")
    if costs.copied:
        curves.append(CostCurve(list(costs.copied), 0.0))
    for curve in curves:
        _check(curve.verify, [curve.draft, curve.overhead])
    return costs


def _check(passes: Iterable[float], others: list[float]) -> None:
    """Check the costs of passes, which must be positive, and others, which may be 0."""
    passes = list(passes)
    numbers = [*passes, *others]
    plausible = all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)
    if not passes or not plausible or min(passes) <= 0:
        raise ValueError(f"the costs of rounds must be positive numbers, found {numbers}")
