"""Cost measurement: the time of rounds on this machine.

The costs are measured once for each kind of pair, and kept in the user's cache directory.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.config import DrafterConfig, TargetConfig
from mlx_mtp.gemma4.drafter import Draft, Drafter, GivenDrafter
from mlx_mtp.gemma4.kernels import describe
from mlx_mtp.gemma4.kv_cache import KVQuantization, check_group_size
from mlx_mtp.gemma4.target import Target

from .compiled import CompiledRounds
from .copy_policy import CopyPolicy
from .draft_length import LARGEST_COPY, MAX_DRAFT_TOKENS, CostCurve, Costs, DraftLength, DraftPolicy
from .first_rounds import (
    CAUTIOUS,
    CAUTIOUS_PLAIN,
    MEASURED,
    MEASURED_AHEAD,
    MEASURED_COPIES,
    FirstRounds,
    MeasuringPolicy,
    interpolated,
    measured_costs,
)
from .kept_costs import CostsFile, MeasuringLock, SharedCostsFile, checked, read_or_measure
from .prefill import Progress
from .sampling import Sampling
from .shared_calibration import ROWS, TEXTS, measure_shared
from .shared_lengths import SharedCosts, estimated
from .stream import Stream
from .timing import MeasuringPlan, time_in_turn

logger = logging.getLogger(__name__)

# These draft lengths are measured with a drafter. The other lengths follow from the verify passes alone.
_DRAFTED = (1, MAX_DRAFT_TOKENS)
# The costs are measured and kept for each of these ranges of contexts. A range begins at its number of tokens. Over a
# longer context, attention costs more, and so does the copy of a K/V buffer that a round in flight still reads.
_CONTEXTS = (64, 4096, 16384, 65536)
_PLAN = MeasuringPlan()


def device_identity() -> dict[str, Any]:
    """Return the device and the MLX version, on which the costs depend in addition to the pair."""
    info = mx.device_info()
    return {"device": str(mx.default_device()), "name": info.get("device_name"), "mlx": version("mlx")}


def _draft_of(vocab_size: int, candidates: int | None) -> Callable[[mx.array, int], Draft]:
    """Return a function that gives draft tokens at no cost, so that only the target's part is timed.

    The draft tokens have `candidates` candidates each, or no distribution if it is None. They depend on the last token,
    as real draft tokens do. The rounds are therefore a chain, and no round can begin early.
    """

    def give(token: mx.array, k: int) -> Draft:
        tokens = (token + mx.arange(1, k + 1)) % vocab_size
        if candidates is None:
            return Draft(tokens)
        ids = (tokens.T + mx.arange(candidates)) % vocab_size
        return Draft(tokens, ids, mx.full((k, candidates), -math.log(candidates)))

    return give


class RoundCosts:
    """Costs of rounds of one loaded pair, by sampling options and K/V quantization.

    The costs also depend on the length of the context (see `_CONTEXTS`). They are read or measured when they are first
    requested.
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
        self._costs: dict[str, Costs] = {}
        self._first_rounds: dict[tuple[str, int | None], FirstRounds] = {}
        self._shared: SharedCosts | None = None
        self._has_looked = False

    def policy(
        self,
        k: int | None,
        sampling: Sampling,
        kv: KVQuantization | None = None,
        context: int = 0,
        *,
        copies: bool = False,
    ) -> DraftPolicy:
        """Return the policy that chooses the rounds of a text after `context` tokens.

        The number of draft tokens is `k`. If `k` is None, the policy chooses it, and copies from the text if `copies`
        is set. If the costs are not known, the first rounds of texts measure them. While another text or program
        measures, the policy uses cautious costs.

        Raises OptionError if the groups of the K/V quantization do not fit the heads.
        """
        identity = self.identity(sampling, kv, context)
        key, file = repr(identity), CostsFile(identity)
        costs = self._costs.get(key) or file.read()
        if costs is not None:
            self._costs[key] = costs
        if k is None:
            return choosing_policy(costs, copies=copies) if costs is not None else self._measuring(key, file, copies)
        return self._fixed(k, key, costs)

    def _measuring(self, key: str, file: CostsFile, copies: bool) -> DraftPolicy:
        """Return a policy that measures the costs and keeps them."""
        lengths = MEASURED if self._drafter is not None else (0,)
        rounds = self._first_rounds.setdefault(
            (key, None),
            FirstRounds(lengths, ahead=self._target.mapped is None, copied=self._measured_copies()),
        )
        cautious = CAUTIOUS if self._drafter is not None else CAUTIOUS_PLAIN

        def acquire() -> MeasuringLock | None:
            lock = file.lock()
            if lock is not None and not rounds.has_begun:
                logger.info(
                    "the first rounds measure what rounds cost on this machine; kept in %s", file.path or "no file"
                )
            return lock

        def finish() -> Costs:
            try:
                self._costs[key] = checked(rounds.costs())
            except ValueError as error:
                logger.warning("the measurement of rounds is not used: %s", error)
                # The next text measures again.
                self._first_rounds.pop((key, None), None)
                return cautious
            file.write(self._costs[key])
            return self._costs[key]

        return MeasuringPolicy(choosing_policy(cautious, copies=copies), rounds, acquire, finish)

    def _fixed(self, k: int, key: str, costs: Costs | None) -> DraftPolicy:
        """Return a policy of k draft tokens. It only measures whether its rounds cost less if they run ahead."""
        policy = DraftPolicy(k)
        if self._target.mapped is not None:
            return policy
        if costs is not None and k <= MAX_DRAFT_TOKENS:
            policy.use(costs)
            return policy
        rounds = self._first_rounds.setdefault((key, k), FirstRounds((k,), ahead=True))

        def finish() -> Costs:
            try:
                return rounds.costs()
            except ValueError:
                self._first_rounds.pop((key, k), None)
                return CAUTIOUS

        return MeasuringPolicy(policy, rounds, lambda: MeasuringLock(None), finish)

    def read(
        self,
        sampling: Sampling,
        kv: KVQuantization | None = None,
        context: int = 0,
        *,
        remeasure: bool = False,
        on_progress: Progress | None = None,
    ) -> Costs:
        """Return the costs of rounds after `context` tokens, with those of copied tokens.

        Raises OptionError if the groups of the K/V quantization do not fit the heads. Raises CalibrationError if the
        measured costs cannot be true.
        """
        identity = self.identity(sampling, kv, context)
        key = repr(identity)
        plan = replace(_PLAN, context=_context_of(context))
        if remeasure or key not in self._costs:
            self._costs[key] = read_or_measure(
                CostsFile(identity),
                lambda: measure_rounds(
                    self._target,
                    self._drafter,
                    sampling,
                    on_progress,
                    kv,
                    plan=plan,
                    copied=self._measured_copies(),
                ),
                remeasure=remeasure,
            )
        return self._costs[key]

    def shared(self, costs: Costs) -> SharedCosts:
        """Return the costs of passes that several texts share: those measured, or estimates from the costs of one text.

        The measured costs are those of greedy texts after a short prompt, for all texts.
        """
        if not self._has_looked:
            self._shared, self._has_looked = SharedCostsFile(self._shared_identity()).read(), True
        return self._shared or estimated(costs)

    def read_shared(self, *, remeasure: bool = False, on_progress: Progress | None = None) -> SharedCosts:
        """Return the measured costs of passes that several texts share. They are measured if none are kept.

        Raises CalibrationError if the measured costs cannot be true.
        """
        self._shared = read_or_measure(
            SharedCostsFile(self._shared_identity()),
            lambda: measure_shared(self._target, self._drafter, on_progress),
            remeasure=remeasure,
        )
        # Also if the file could not be written.
        self._has_looked = True
        return self._shared

    def _shared_identity(self) -> dict[str, Any]:
        return self.identity(Sampling(), None, 0) | {"texts": list(TEXTS), "rows": list(ROWS)}

    def _measured_copies(self) -> tuple[int, ...]:
        """Return the numbers of copied tokens to measure."""
        return tuple(k for k in MEASURED_COPIES if k <= self._longest)

    @property
    def _longest(self) -> int:
        """The largest number of draft tokens in a round of automatic draft length."""
        return MAX_DRAFT_TOKENS if self._exact else LARGEST_COPY

    def identity(self, sampling: Sampling, kv: KVQuantization | None, context: int) -> dict[str, Any]:
        """Return everything that decides the cost of a round after `context` tokens.

        For sampling, this is the names of the options in use. For K/V, this is the quantization without its start
        position. In texts that are too short to reach this position, attention costs little in both cases.

        Raises OptionError if the groups of the K/V quantization do not fit the heads.
        """
        if kv is not None:
            check_group_size(self._config.text, kv)
        defaults = asdict(Sampling())
        options = sorted(name for name, value in asdict(sampling).items() if name != "seed" and value != defaults[name])
        head = self._drafter_config
        shapes = [repr((config.text, config.quantization)) for config in (self._config, head) if config is not None]
        if head is not None:
            shapes.append(repr((head.num_centroids, head.centroid_top_k, head.draft_vocab_size)))
        found: dict[str, Any] = {
            "pair": shapes,
            "dtype": str(self._target.dtype),
            "exact": self._exact,
            "longest_draft": self._longest,
            "sampling": options,
            "kv": None if kv is None else [kv.bits, kv.group_size],
            "context": _context_of(context),
        }
        networks = [each for each in (self._target, self._drafter) if each is not None]
        if (kernels := [describe(network) for network in networks]) != ["none"] * len(networks):
            found["kernels"] = kernels
        if self._target.sharing is not None:
            found["machines"] = self._target.sharing
        if self._target.mapped is not None:
            found["per_layer_embeddings"] = "mapped"
        return found | device_identity()


def choosing_policy(costs: Costs, *, copies: bool) -> DraftPolicy:
    """Return the policy that chooses the number of draft tokens by these costs, with copies or without."""
    return CopyPolicy(DraftLength(costs), costs) if copies else DraftLength(costs)


def _context_of(tokens: int) -> int:
    """Return the context that stands for contexts of about this length."""
    return max([_CONTEXTS[0], *(context for context in _CONTEXTS if context <= tokens)])


def measure_rounds(
    target: Target,
    drafter: Drafter | None,
    sampling: Sampling,
    on_progress: Progress | None = None,
    kv_quantization: KVQuantization | None = None,
    *,
    plan: MeasuringPlan = _PLAN,
    copied: tuple[int, ...] = (),
) -> Costs:
    """Return the costs of rounds after `plan.context` tokens, with `copied` tokens as well.

    The lengths of `MEASURED` are measured, and the costs of the others are interpolated. For rounds that wait, these
    are the times of verify passes, and the costs of drafting: the costs of a draft step and of the rest are the
    difference to whole rounds with the drafter. For rounds ahead and copies, whole rounds are timed. Without a drafter,
    only plain rounds and copies are measured. The different rounds take turns. Each pass begins with the result of the
    pass before it.

    Raises ValueError if no clock can have measured the costs.
    """
    draws = not sampling.is_greedy and sampling.acceptance == "block"
    most = 0 if drafter is None else MAX_DRAFT_TOKENS
    candidates = drafter.num_candidates if drafter is not None and draws else None
    given = GivenDrafter(_draft_of(target.config.vocab_size, candidates))
    runs: dict[tuple[str, int], Callable[[], object]] = {}

    def add(name: str, who: Drafter | None, lengths: Iterable[int], run: Callable[[Stream, int, int], None]) -> None:
        stream = Stream(
            target,
            who,
            max_draft_tokens=max((MAX_DRAFT_TOKENS, *copied)),
            sampling=sampling,
            rounds=CompiledRounds(),
            kv_quantization=kv_quantization,
        )
        stream.prefill([7, 5], 2)
        for k in lengths:
            runs[name, k] = partial(run, stream, plan.context, k)

    lengths, lengths_ahead = ([k for k in each if k <= most] for each in (MEASURED, MEASURED_AHEAD))
    add("verify", given, lengths, _round)
    if drafter is not None:
        add("round", drafter, _DRAFTED, _round)
    if target.mapped is None:
        add("ahead", drafter, lengths_ahead, _round_ahead)
    add("copy", drafter, copied, _copy_round)
    seconds = time_in_turn(runs, plan, on_progress)
    waiting = CostCurve(interpolated({k: seconds["verify", k] for k in lengths}), 0.0)
    if drafter is not None:
        few, many = _DRAFTED
        drafting = {k: seconds["round", k] - seconds["verify", k] for k in _DRAFTED}
        draft = max(0.0, (drafting[many] - drafting[few]) / (many - few))
        waiting = waiting._replace(draft=draft, overhead=max(0.0, drafting[few] - few * draft))
    ahead = {} if target.mapped is not None else {k: seconds["ahead", k] for k in lengths_ahead}
    return measured_costs(waiting, ahead, {k: seconds["copy", k] for k in copied})


def _round(stream: Stream, position: int, k: int) -> None:
    """Run a round that begins with the token of the round before it, always at the same position.

    The rows before the position have no effect on the time, so they need not be read.
    """
    stream.cache.set_length(position)
    stream.round(k)


def _copy_round(stream: Stream, position: int, k: int) -> None:
    """Run a round of k copied tokens, as `_round` does."""
    stream.cache.set_length(position)
    stream.round(k, copied=[stream.tokens[-1]] * k)


def _round_ahead(stream: Stream, position: int, k: int) -> None:
    """Dispatch a round ahead of the report of the round before it, and then read this report."""
    if not stream.in_flight:
        stream.cache.set_length(position)
        stream.dispatch(k)
    stream.cache.set_length(position)
    stream.dispatch(k)
    stream.finish()
