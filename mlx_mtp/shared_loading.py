"""Load a target on the ranks of a group: each rank loads its part."""

import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from mlx_mtp.checkpoints.config import TargetConfig, read_target_config
from mlx_mtp.checkpoints.hub import resolve_folder
from mlx_mtp.checkpoints.layouts import resolve_head
from mlx_mtp.checkpoints.tensors import read_checkpoint
from mlx_mtp.group.follower import follow
from mlx_mtp.group.leader import Leader
from mlx_mtp.group.membership import Group, join
from mlx_mtp.group.shared_target import PipelineTarget, SharedTarget
from mlx_mtp.group.split import Part, Split

from .bandwidth import memory_bandwidth
from .errors import GroupError, MTPError, OptionError
from .launched import SplitKind
from .memory_plan import MemoryPlan, SharedPlan, check_memory, planner, read_per_pass
from .networks import load_shared_target, prepare_target
from .options import GenerationOptions

# Makes the plan of a part.
PlanOf = Callable[[Part], MemoryPlan]

# The number of bytes of each tensor that must be the same on all ranks. Tensors of another checkpoint differ at once.
_COMPARED = 64
# The numbers of collectives whose time is measured, and of those before them that do not count.
_WARM_UP, _MEASURED = 10, 100


@dataclass
class Sharing:
    """The leader's view of how the ranks of a group share a target."""

    group: Group
    split: Split
    _has_taken: bool = False

    def part(
        self, config: TargetConfig, *, exact: bool = False, per_layer_embeddings: str = "resident", rank: int = 0
    ) -> Part:
        """Return the part of a rank.

        Raises OptionError if the target cannot be split, or if an option cannot be used by a group.
        """
        if exact:
            raise OptionError("exact is set, but several machines share the model: their sums are rounded differently")
        if per_layer_embeddings == "mapped":
            raise OptionError(
                "per_layer_embeddings is 'mapped', but several machines share the model: expected resident"
            )
        return Part(config, self.split, rank)

    def _latency(self, width: int) -> float:
        """Measure the seconds of a collective of `width` values."""
        self.group.tell({"kind": "measure", "width": width, "times": _WARM_UP + _MEASURED})
        times = []
        try:
            for _ in range(_WARM_UP + _MEASURED):
                began = time.perf_counter()
                with self.group.waiting():
                    mx.eval(self.group.all_sum(mx.zeros(width)))
                times.append(time.perf_counter() - began)
        except BaseException:
            self.group.lose("rank 0 has interrupted a measurement in which all ranks take part")
            raise
        return median(times[_WARM_UP:])

    def plan(self, config: TargetConfig, own: MemoryPlan, plan_of: PlanOf) -> SharedPlan:
        """Return the plan of all ranks, with a measured latency. `own` is the plan of rank 0.

        `plan_of` returns the plan of a part, without a drafter.
        """
        parts = [self.part(config, rank=rank) for rank in range(self.split.size)]
        return SharedPlan(
            split=self.split.kind,
            peaks=(own.peak, *(plan_of(part).peak for part in parts[1:])),
            read=max(read_per_pass(config, part) for part in parts),
            whole=read_per_pass(config),
            collectives=parts[0].collectives,
            latency=self._latency(config.text.hidden_size),
            bandwidth=memory_bandwidth()[0],
        )

    def load(
        self,
        config: TargetConfig,
        part: Part,
        path: str,
        revision: str | None,
        max_context: int | None,
        memory_limit: int | None,
        on_read: Callable[[int], None] | None,
    ) -> SharedTarget:
        """Load the part of each rank, and return that of rank 0. `path` must name the same checkpoint on all machines.

        Raises GroupError if a rank cannot load its part, or if it has another checkpoint.
        """
        number = self.group.take()
        self._has_taken = True
        self.group.tell(
            {
                "kind": "load",
                "number": number,
                "path": path,
                "revision": revision,
                "split": [self.split.kind, self.split.size, self.split.bandwidths],
                "checkpoint": _identity(config),
                "max_context": max_context,
                "memory_limit": memory_limit,
            }
        )

        def report(size: int) -> None:
            # A follower may have failed in the meantime.
            self.group.check()
            if on_read is not None:
                on_read(size)

        target = _make(config, part, self.group)
        load_shared_target(target, config, report)
        self.group.hear(number)
        target.lead(Leader(self.group, target))
        return target

    def give_up(self, error: BaseException) -> None:
        """Let the followers free their parts after a load that failed. Another model may be loaded after this.

        If none is loaded, they end with the error.
        """
        if self._has_taken:
            self.group.give_back()
            # Without followers, there is nothing to free.
            with suppress(GroupError):
                self.group.tell({"kind": "close"})
        if not self.group.is_taken:
            self.group.failure = f"rank 0: {error}" if isinstance(error, MTPError) else f"rank 0 has ended: {error!r}"


@contextmanager
def join_sharing(split: SplitKind | None, bandwidths: Sequence[float]) -> Generator[Sharing | None]:
    """Join the group of this process. If the `with` statement fails, the followers free their parts.

    It never returns on a follower, which does what the leader announces until its end.

    Raises GroupError if the group cannot be joined, and OptionError if the split does not fit it.
    """
    group = join()
    if group is None:
        if split is not None or bandwidths:
            raise OptionError("a split is given, but the launcher has started one process: expected several")
        yield None
        return
    if group.rank:
        follow(group, _load_part)
    sharing = Sharing(group, Split("tensor", group.size))
    try:
        sharing.split = Split(split or "tensor", group.size, tuple(bandwidths))
        yield sharing
    except BaseException as error:
        sharing.give_up(error)
        raise
    group.failure = None


def _load_part(
    group: Group,
    path: str,
    revision: str | None,
    split: tuple[SplitKind, int, Sequence[float]],
    checkpoint: str,
    max_context: int | None,
    memory_limit: int | None,
) -> SharedTarget:
    """Load the part of a follower, as the leader asks for it.

    Raises GroupError if this rank has another checkpoint.
    """
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    config = resolve_head(read_target_config(resolve_folder(path, revision)))
    if _identity(config) != checkpoint:
        raise GroupError(f"{config.path.parent} holds another checkpoint than on rank 0: copy the folder of rank 0")
    kind, size, bandwidths = split
    part = Part(config, Split(kind, size, tuple(bandwidths)), group.rank)
    if memory_limit is not None:
        # As on the leader, MLX releases its cache of freed buffers near this limit.
        mx.set_memory_limit(memory_limit)
        options = GenerationOptions()
        plan = planner(
            config, None, max_block=options.longest_draft + 1, prefill_step=options.prefill_step_size, part=part
        )
        check_memory(plan, max_context or config.text.max_position_embeddings, memory_limit, path)
    target = _make(config, part, group)
    # The leader may have failed in the meantime.
    load_shared_target(target, config, lambda _: group.check())
    prepare_target(target, exact=False)
    return target


def _make(config: TargetConfig, part: Part, group: Group) -> SharedTarget:
    kind = PipelineTarget if part.split.kind == "pipeline" else SharedTarget
    return kind(config.text, part, group)


def _identity(config: TargetConfig) -> str:
    """Return a digest of a checkpoint: its config, and the header and the first bytes of each tensor."""
    digest = hashlib.sha256(repr((config.text, config.quantization, config.eos_token_ids)).encode())
    for name, tensor in sorted(read_checkpoint(config.path.parent).items()):
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + stream.read(min(_COMPARED, tensor.nbytes)))
    return digest.hexdigest()
