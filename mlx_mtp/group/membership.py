"""The group of processes that a launcher has started, and the connections between its ranks."""

import atexit
import contextlib
import faulthandler
import gc
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from mlx_mtp.errors import GroupError

from .peer import Message, Peer

_BACKENDS = ("ring", "jaccl", "mpi", "nccl")
# The followers must connect to the leader within this time, in seconds.
_CONNECT = 30.0
# The ranks must join the group within this time, in seconds.
JOIN_LIMIT = 60
# A pass must end within this time, in seconds.
PASS_LIMIT = 300.0
# A leader that waits for a pass when a rank is lost has as many seconds to raise the error. Then it ends.
_GRACE = 3.0
_ADDRESS_BYTES = 512

_joined: "Group | None" = None
_joining = threading.Lock()


class Group:
    """The ranks that share a target. Rank 0 is the leader: it has a connection to each of the others.

    Raises GroupError if the ranks cannot find each other.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._group = _init(backend)
        self.rank, self.size = self._group.rank(), self._group.size()
        self._on_lost: Callable[[str], None] | None = None
        self._reason: str | None = None
        self._is_lost = threading.Event()
        self._waiting_since: float | None = None
        # Whether a model uses the group.
        self.is_taken = False
        self._loads = 0
        # The followers end with this error, if no model was loaded after it.
        self.failure: str | None = None
        self.peers = _connect(self)
        for peer in self.peers:
            peer.start()
        if not self.rank:
            atexit.register(self.end)
            threading.Thread(target=self._watch, name="mlx-mtp passes", daemon=True).start()

    def all_sum(self, x: mx.array) -> mx.array:
        """Return the sum of the arrays of all ranks."""
        return mx.distributed.all_sum(x, group=self._group)

    def all_gather(self, x: mx.array) -> mx.array:
        """Return the arrays of all ranks, one after the other along the first axis."""
        return mx.distributed.all_gather(x, group=self._group)

    def take(self) -> int:
        """Take the group for a model, and return the number of this load.

        Raises GroupError if another model uses the group.
        """
        if self.is_taken:
            # A model that nobody holds gives the group back when it is collected.
            gc.collect()
        if self.is_taken:
            raise GroupError("the machines already share a model: close it before another one is loaded")
        self.is_taken = True
        self._loads += 1
        return self._loads

    def give_back(self) -> None:
        """Let the group be free for another model."""
        self.is_taken = False

    def check(self) -> None:
        """Raise GroupError if a rank was lost."""
        if self._reason is not None:
            raise GroupError(self._reason)

    def tell(self, message: Message) -> None:
        """Send a message to all followers. Raises GroupError if a rank was lost."""
        self.check()
        for peer in self.peers:
            peer.send(message)
        self.check()

    def hear(self, load: int) -> None:
        """Wait until each follower has loaded its part.

        `load` is the number of the load, because loads before it may have failed on rank 0.

        Raises GroupError if a rank is lost.
        """
        for peer in self.peers:
            while peer.receive().get("loaded") != load:
                self.check()
        self.check()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for passes in this statement. Raises GroupError if one fails, which ends the group."""
        self._waiting_since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            # The connection of a lost rank may tell more than the error of a collective.
            if not self._is_lost.wait(_GRACE):
                self.lose(f"rank {self.rank}: a pass failed: {error}")
            raise GroupError(str(self._reason)) from None
        finally:
            self._waiting_since = None

    def when_lost(self, call: Callable[[str], None]) -> None:
        """Call a function with the reason when a rank is lost, on a thread of its connection, or now if one was."""
        self._on_lost = call
        if self._reason is not None:
            call(self._reason)

    def lose(self, reason: str) -> None:
        """End the group. A follower prints the reason and ends the process; the leader tells the other ranks."""
        if self._reason is not None:
            return
        self._reason = reason
        if self.rank:
            fail(reason)
        for peer in self.peers:
            peer.send({"end": reason})
            peer.wake()
        self._is_lost.set()
        if self._on_lost is not None:
            self._on_lost(reason)

    def end(self) -> None:
        """Let the followers end, with an error if no model could be loaded."""
        if self._reason is None:
            self._reason = "the group has ended"
            for peer in self.peers:
                peer.send({"end": self.failure})
                peer.close()

    def _watch(self) -> None:
        """End the process if it waits for a pass that cannot end, because MLX's collectives wait for ever."""
        while True:
            time.sleep(0.5)
            since = self._waiting_since
            if since is None:
                continue
            if time.monotonic() - since > PASS_LIMIT:
                self.lose(f"a pass has not ended after {PASS_LIMIT:g} s")
            if self._is_lost.is_set():
                time.sleep(_GRACE)
                if self._waiting_since == since:
                    fail(str(self._reason))


def fail(reason: str) -> NoReturn:
    """Print an error in one line, and end the process at once with status 1."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    leave(1)


def leave(status: int) -> NoReturn:
    """End the process at once, on any thread."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def join() -> Group | None:
    """Return the group that this process belongs to, or None if it is alone. The first call joins the group.

    Raises GroupError if the launcher's settings are incomplete, if MLX lacks the backend, or if the ranks cannot find
    each other.
    """
    global _joined
    with _joining:
        if _joined is None and (backend := _backend()) is not None:
            _joined = Group(backend)
        return _joined


def _backend() -> str | None:
    """Return the backend for which a launcher has started this process, or None if it is alone."""
    given = os.environ
    if "MLX_RANK" not in given:
        return "mpi" if int(given.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 else None
    if not given["MLX_RANK"].isdecimal():
        raise GroupError(f"MLX_RANK is {given['MLX_RANK']!r}: expected a number, start with mlx.launch")
    if "MLX_JACCL_COORDINATOR" in given:
        return "jaccl"
    if "NCCL_HOST_IP" in given:
        return "nccl" if int(given.get("MLX_WORLD_SIZE", "1")) > 1 else None
    if "MLX_HOSTFILE" in given:
        return "ring" if len(_ring_hosts()) > 1 else None
    raise GroupError(
        "MLX_RANK is set, but none of MLX_HOSTFILE, MLX_JACCL_COORDINATOR and NCCL_HOST_IP: start with mlx.launch"
    )


def _ring_hosts() -> list[list[str]]:
    """Return the addresses of each rank."""
    path = Path(os.environ["MLX_HOSTFILE"])
    try:
        hosts: list[list[str]] = json.loads(path.read_text())
        if not all(isinstance(address, str) for host in hosts for address in host):
            raise TypeError("expected a list of addresses for each rank")
        return hosts
    except (OSError, ValueError, TypeError) as error:
        raise GroupError(f"{path}: the host file (MLX_HOSTFILE) cannot be read: {error}") from None


def _init(backend: str) -> mx.distributed.Group:
    there = [name for name in _BACKENDS if mx.distributed.is_available(name)]
    if backend not in there:
        raise GroupError(
            f"the launcher chose the backend {backend}, but MLX has only {', '.join(there) or 'none'} here"
        )
    try:
        with _bounded(JOIN_LIMIT, f"the other ranks did not join within {JOIN_LIMIT} s: do they run?"):
            group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise GroupError(f"the ranks cannot find each other with the backend {backend}: {error}") from None
    if group.size() == 1:
        raise GroupError(f"the backend {backend} has made a group of one rank: start with mlx.launch")
    return group


@contextlib.contextmanager
def _bounded(seconds: int, reason: str) -> Iterator[None]:
    """End the process with status 1 and a reason if the statement takes longer, although it holds Python's lock.

    MLX waits for the other ranks for ever, and no other thread of Python runs meanwhile.
    """
    # The shell ends with this process.
    wait = "n=$1; while [ $n -gt 0 ] && kill -0 $3 2> /dev/null; do sleep 1; n=$((n - 1)); done"
    speak = [
        "sh",
        "-c",
        f'{wait}; kill -0 $3 2> /dev/null && echo "error: $2" >&2',
        "sh",
        str(seconds),
        reason,
        str(os.getpid()),
    ]
    with Path(os.devnull).open("w") as nothing, subprocess.Popen(speak, start_new_session=True) as speaker:
        # This is a thread that needs no lock.
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nothing)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.killpg(speaker.pid, signal.SIGKILL)


def _connect(group: Group) -> list[Peer]:
    """Connect the followers to the leader, whose address travels over MLX's own connections."""
    if group.rank:
        address = json.loads(_sent_by_leader(group, b""))
        return [_connect_to_leader(group, address)]
    with socket.create_server((_leader_host(group.backend), 0), backlog=group.size) as server:
        port = server.getsockname()[1]
        hosts = [_leader_host(group.backend) or socket.gethostname()]
        token = secrets.token_hex(16)
        _sent_by_leader(group, json.dumps({"hosts": hosts, "port": port, "token": token}).encode())
        return _accept(group, server, token)


def _sent_by_leader(group: Group, data: bytes) -> bytes:
    sent = mx.array(list(data.ljust(_ADDRESS_BYTES)), mx.int32) if data else mx.zeros(_ADDRESS_BYTES, mx.int32)
    received: list[int] = group.all_sum(sent).tolist()  # type: ignore[assignment]
    return bytes(received)


def _leader_host(backend: str) -> str:
    """Return the host at which the leader waits for followers. The empty text stands for all addresses."""
    if backend == "ring":
        return _ring_hosts()[0][0].rpartition(":")[0]
    if backend == "jaccl":
        return os.environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
    return ""


def _accept(group: Group, server: socket.socket, token: str) -> list[Peer]:
    """Accept a connection of each follower, and check that all ranks have the same versions."""
    found: dict[int, Peer] = {}
    deadline = time.monotonic() + _CONNECT
    while len(found) < group.size - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
            connection.settimeout(_CONNECT)
            hello = json.loads(connection.makefile("rb").readline())
        except TimeoutError:
            missing = sorted(set(range(1, group.size)) - found.keys())
            raise GroupError(f"rank {missing[0]} did not connect to rank 0 within {_CONNECT:g} s") from None
        except (OSError, ValueError):
            continue
        # Other programs that connect know nothing of the token.
        if isinstance(hello, dict) and hello.get("token") == token:
            found[hello["rank"]] = Peer(connection, f"rank {hello['rank']}", group.lose)
            _check_versions(group, found, hello)
    return [found[rank] for rank in sorted(found)]


def _check_versions(group: Group, found: dict[int, Peer], hello: Message) -> None:
    for name, expected in _versions().items():
        if hello["versions"].get(name) != expected:
            reason = f"rank {hello['rank']} has {name} {hello['versions'].get(name)}, but rank 0 has {expected}"
            for peer in found.values():
                peer.send({"end": reason})
            raise GroupError(reason)


def _versions() -> dict[str, str]:
    return {"mlx-mtp": version("mlx-mtp"), "mlx": version("mlx")}


def _connect_to_leader(group: Group, address: dict[str, Any]) -> Peer:
    reasons = []
    for host in address["hosts"]:
        try:
            connection = socket.create_connection((host, address["port"]), timeout=_CONNECT)
        except OSError as error:
            reasons.append(f"{host}:{address['port']}: {error}")
            continue
        peer = Peer(connection, "rank 0", group.lose)
        peer.send({"token": address["token"], "rank": group.rank, "versions": _versions()})
        return peer
    raise GroupError(f"rank {group.rank} cannot connect to rank 0: {'; '.join(reasons)}")
