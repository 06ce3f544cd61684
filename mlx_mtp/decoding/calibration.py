"""What rounds cost on this machine: measured once for a kind of pair, and kept in the user's cache directory."""

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.config import DrafterConfig, TargetConfig
from mlx_mtp.checkpoints.output_files import replace_text
from mlx_mtp.errors import CalibrationError, ClosedError, OptionError, OutputError
from mlx_mtp.gemma4.drafter import Draft, Drafter, GivenDrafter
from mlx_mtp.gemma4.kv_cache import KVQuantization, check_group_size
from mlx_mtp.gemma4.target import Target

from .compiled import CompiledRounds
from .draft_length import MAX_DRAFT_TOKENS, CostCurve
from .sampling import Sampling
from .stream import Progress, Stream

logger = logging.getLogger(__name__)

# Tokens before the rounds that are measured. What longer contexts add, they add to all rounds alike.
_CONTEXT = 64
# A round is run once as it is, once to be compiled, and once more, before it is timed.
_WARM_UP = 3
# Draft lengths that are measured with a drafter: the rest follows from the passes alone.
_MEASURED = (1, MAX_DRAFT_TOKENS)
# Seconds for which rounds of one length follow each other, and how many there are. The second half of them counts: the
# first ones suffer from the caches that another length left.
_TURN = 0.08
_ROUNDS = (2, 100)
# How often each has its turn: until so many seconds are over, but between these.
_SECONDS = 3.0
_REPETITIONS = (2, 10)


def cache_directory() -> Path:
    """Where measurements are kept: `MLX_MTP_CACHE`, else the platform's cache folder of the user.

    Raises OSError for a user without a home folder.
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


def read_or_measure(
    identity: dict[str, Any], measure: Callable[[], CostCurve], folder: Path | None = None, *, remeasure: bool = False
) -> CostCurve:
    """The cost curve kept for an identity, which is everything that decides what a round costs. It is measured if none
    is kept, or if `remeasure` is set.

    A file that cannot be read, or that is of something else, is measured again and replaced. Where the folder cannot be
    written the curve is measured all the same, with a warning.

    Raises CalibrationError if what was measured cannot be true.
    """
    text = json.dumps(identity, sort_keys=True)
    name = f"rounds-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    file: Path | None = None
    try:
        file = (folder or cache_directory()) / name
    except OSError as error:
        logger.warning("the measurement of rounds is not kept: %s", error)
    if file is not None and not remeasure and (kept := _kept(file, json.loads(text))) is not None:
        return kept
    logger.info("measuring what rounds cost on this machine, once; kept in %s", file or "no file")
    try:
        curve = _checked(measure())
    except ClosedError:
        raise
    except ValueError as error:
        raise CalibrationError(
            f"{error}: rounds cannot be timed here; say how many draft tokens a round has with num_draft_tokens"
        ) from None
    if file is not None:
        _keep(file, {"identity": identity, "seconds": curve._asdict()})
    return curve


def _kept(file: Path, identity: dict[str, Any]) -> CostCurve | None:
    """The curve in a file; None if there is none, with a warning if the file cannot be used."""
    try:
        content = json.loads(file.read_text())
        if content["identity"] != identity:
            raise ValueError("of another pair, device or version")
        return _checked(CostCurve(**content["seconds"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s: not a usable measurement of rounds, measured again: %s", file, error)
        return None


def _keep(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(content, indent=2))
    except (OSError, OutputError) as error:
        logger.warning("%s: the measurement of rounds is not kept: %s", file, error)


def _checked(curve: CostCurve) -> CostCurve:
    """Raises ValueError for costs that no clock can have measured."""
    numbers = [*curve.verify, curve.draft, curve.overhead]
    if len(curve.verify) != MAX_DRAFT_TOKENS + 1 or not all(isinstance(n, int | float) for n in numbers):
        raise ValueError(f"expected {MAX_DRAFT_TOKENS + 1} costs of passes, of a draft step and of the rest")
    if not all(math.isfinite(n) and n >= 0 for n in numbers) or min(curve.verify) <= 0:
        raise ValueError(f"the costs of rounds must be positive numbers, found {numbers}")
    return curve


def device_identity() -> dict[str, Any]:
    """What the costs depend on beside the pair."""
    info = mx.device_info()
    return {"device": str(mx.default_device()), "name": info.get("device_name"), "mlx": version("mlx")}


def _draft_of(vocab_size: int, candidates: int | None) -> Callable[[mx.array, int], Draft]:
    """Draft tokens for nothing, chosen among so many candidates or none: what is left is the target's part.

    They depend on the last token, as real drafts do: a chain of rounds, none of which can begin early.
    """

    def give(token: mx.array, k: int) -> Draft:
        tokens = (token + mx.arange(1, k + 1)) % vocab_size
        if candidates is None:
            return Draft(tokens)
        ids = (tokens.T + mx.arange(candidates)) % vocab_size
        return Draft(tokens, ids, mx.full((k, candidates), -math.log(candidates)))

    return give


class RoundCosts:
    """The costs of rounds of one loaded pair, by sampling options and K/V quantization.

    Each curve is read or measured when it is first asked for.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        config: TargetConfig,
        drafter_config: DrafterConfig | None,
        *,
        exact: bool,
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._config = config
        self._drafter_config = drafter_config
        self._exact = exact
        self._curves: dict[str, CostCurve] = {}

    def curve(
        self,
        sampling: Sampling,
        kv: KVQuantization | None = None,
        *,
        remeasure: bool = False,
        on_progress: Progress | None = None,
    ) -> CostCurve:
        """The cost curve, in seconds.

        Raises OptionError without a drafter or for groups of K/V that do not fit the heads, CalibrationError if the
        clock gives nonsense.
        """
        drafter = self._drafter
        if drafter is None:
            raise OptionError("the cost of rounds is asked for, but no drafter is loaded")
        if kv is not None:
            check_group_size(self._config.text, kv)
        identity = self.identity(sampling, kv)
        key = repr(identity)
        if remeasure or key not in self._curves:
            self._curves[key] = read_or_measure(
                identity, lambda: measure_rounds(self._target, drafter, sampling, on_progress, kv), remeasure=remeasure
            )
        return self._curves[key]

    def identity(self, sampling: Sampling, kv: KVQuantization | None) -> dict[str, Any]:
        """Everything that decides what a round costs.

        Of sampling, it says which options are in use. Of K/V, it says how they are quantized, but not from where on: in
        texts so short that they never are, attention costs little either way.
        """
        defaults = asdict(Sampling())
        options = sorted(name for name, value in asdict(sampling).items() if name != "seed" and value != defaults[name])
        head = self._drafter_config
        assert head is not None
        shapes = [repr((config.text, config.quantization)) for config in (self._config, head)]
        shapes.append(repr((head.num_centroids, head.centroid_top_k, head.draft_vocab_size)))
        found: dict[str, Any] = {
            "pair": shapes,
            "dtype": str(self._target.dtype),
            "exact": self._exact,
            "sampling": options,
            "kv": None if kv is None else [kv.bits, kv.group_size],
        }
        if self._target.mapped is not None:
            found["per_layer_embeddings"] = "mapped"
        return found | device_identity()


def measure_rounds(
    target: Target,
    drafter: Drafter,
    sampling: Sampling,
    on_progress: Progress | None = None,
    kv_quantization: KVQuantization | None = None,
) -> CostCurve:
    """Time verify passes of 1 to 9 rows, draft steps, and whole rounds, in turn: medians, in seconds.

    Each pass begins with what the one before it gave.
    """
    draws = not sampling.is_greedy and sampling.acceptance == "block"
    given = GivenDrafter(_draft_of(target.config.vocab_size, drafter.num_candidates if draws else None))
    runs: dict[tuple[str, int], Callable[[], object]] = {}
    for name, who, lengths in (("verify", given, range(MAX_DRAFT_TOKENS + 1)), ("round", drafter, _MEASURED)):
        stream = Stream(
            target,
            who,
            max_draft_tokens=MAX_DRAFT_TOKENS,
            sampling=sampling,
            rounds=CompiledRounds(),
            kv_quantization=kv_quantization,
        )
        stream.prefill([(7 * i + 5) % target.config.vocab_size for i in range(_CONTEXT)], _CONTEXT)
        for k in lengths:
            runs[name, k] = partial(_round, stream, k)
    seconds = _time_in_turn(runs, on_progress)
    few, many = _MEASURED
    drafting = {k: seconds["round", k] - seconds["verify", k] for k in _MEASURED}
    draft = max(0.0, (drafting[many] - drafting[few]) / (many - few))
    verify = [seconds["verify", k] for k in range(MAX_DRAFT_TOKENS + 1)]
    return CostCurve(verify, draft, max(0.0, drafting[few] - few * draft))


def _round(stream: Stream, k: int) -> None:
    """A round that begins with the token of the one before it, always at the same position."""
    stream.cache.set_length(_CONTEXT)
    stream.round(k)


def _time_in_turn(
    runs: dict[tuple[str, int], Callable[[], object]], on_progress: Progress | None
) -> dict[tuple[str, int], float]:
    """Median seconds of each, by key."""
    least, most = _REPETITIONS
    total = len(runs) * (_WARM_UP + least)
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(min(done, total), total)

    for run in runs.values():
        for _ in range(_WARM_UP):
            run()
        report(_WARM_UP)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    began = time.perf_counter()
    for repetition in range(most):
        if repetition >= least and time.perf_counter() - began > _SECONDS:
            break
        for key, run in runs.items():
            seconds: list[float] = []
            while len(seconds) < _ROUNDS[0] or (sum(seconds) < _TURN and len(seconds) < _ROUNDS[1]):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            taken[key] += seconds[len(seconds) // 2 :]
            report(int(repetition < least))
    return {key: median(values) for key, values in taken.items()}
