"""The ranks of a group for tests: in threads of this process, or as processes on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import Quantization, TargetConfig
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.gemma4.target import Target
from mlx_mtp.group.shared_target import PipelineTarget, SharedTarget
from mlx_mtp.group.split import Part, Split

from .commands import Finished
from .paths import ROOT

T = TypeVar("T")


class Alone:
    """Collectives that leave each part as it is, to look at the parts."""

    backend = "none"

    def all_sum(self, x: mx.array) -> mx.array:
        return x

    def all_gather(self, x: mx.array) -> mx.array:
        return x


class ThreadRanks:
    """Collectives of ranks that are threads of this process."""

    backend = "threads"

    def __init__(self, size: int) -> None:
        self._size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: dict[int, mx.array] = {}
        self._rank = threading.local()
        self.counts = [0] * size

    def run(self, work: Callable[[int], T]) -> list[T]:
        """Run a function with each rank at the same time."""

        def run(rank: int) -> T:
            self._rank.number = rank
            try:
                return work(rank)
            finally:
                mx.clear_streams()

        with ThreadPoolExecutor(self._size) as pool:
            return list(pool.map(run, range(self._size)))

    def all_sum(self, x: mx.array) -> mx.array:
        total, *others = self._exchange(x)
        for other in others:
            total = total + other
        return total

    def all_gather(self, x: mx.array) -> mx.array:
        return mx.concatenate(self._exchange(x), axis=0)

    def _exchange(self, x: mx.array) -> list[mx.array]:
        rank: int = self._rank.number
        self.counts[rank] += 1
        # Another thread cannot evaluate it.
        mx.eval(x)
        self._given[rank] = x
        self._barrier.wait()
        found = [self._given[each] for each in range(self._size)]
        self._barrier.wait()
        return found


def shared_target(
    whole: Target, config: TargetConfig, split: Split, rank: int, ranks: Alone | ThreadRanks
) -> SharedTarget:
    """Return a rank's part of a target in memory, which has the quantization of the config."""
    part = Part(config, split, rank)
    kind = PipelineTarget if split.kind == "pipeline" else SharedTarget
    shared = kind(config.text, part, ranks)
    quantize(shared, config.quantization)
    parameters = lazy_parameters(whole).items()
    weights = [(name, part.of(name, array)) for name, array in parameters if part.holds(name)]
    shared.load_weights(weights, strict=False)
    shared.take_part()
    mx.eval(shared.parameters())
    return shared


def quantize(target: Target, quantization: Quantization | None) -> None:
    """Quantize all projections and tables of a target."""
    if quantization is not None:
        group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
        nn.quantize(target, group_size, bits, mode=mode, class_predicate=lambda _, leaf: hasattr(leaf, "to_quantized"))


@dataclass
class Ranks:
    """Processes of a group. None of them outlives a `with` statement."""

    processes: list[subprocess.Popen[str]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait(self, seconds: float = 120) -> list[Finished]:
        """Wait for the end of all ranks, and return their output. None of them may outlive the time."""
        with self:
            return [self._end(process, seconds) for process in self.processes]

    def stop(self, rank: int) -> None:
        """Let a rank hang."""
        self.processes[rank].send_signal(signal.SIGSTOP)

    @staticmethod
    def _end(process: subprocess.Popen[str], seconds: float) -> Finished:
        stdout, stderr = process.communicate(timeout=seconds)
        return Finished(process.returncode, stdout, stderr)


def start_ranks(
    folder: Path, commands: Sequence[Sequence[object]], environments: Sequence[dict[str, str]] | None = None
) -> Ranks:
    """Start one process per command, as the ranks of a group on loopback. `folder` gets the host file."""
    free = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in free]
    for each in free:
        each.close()
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    processes = []
    for rank, command in enumerate(commands):
        given = {} if environments is None else environments[rank]
        env = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(file), "HF_HUB_OFFLINE": "1", **given}
        arguments = [sys.executable, *map(str, command)]
        processes.append(
            subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=env, cwd=ROOT,
            )
        )  # fmt: skip
    return Ranks(processes)
