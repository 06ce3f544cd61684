"""A connection to another rank of a group: messages, and the signs of life that tell whether the rank still works."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# Each rank sends a sign of life as often, in seconds.
_BEAT = 1.0
# A rank without a sign of life for as many seconds is lost.
SILENCE = 30.0

Message = dict[str, Any]


class Peer:
    """A connection to another rank. Messages are lines of JSON, and an empty line is a sign of life.

    `on_lost` is called once, on a thread of the connection, with the reason why the rank can take no further part. A
    message with the field `end` is the last one of a rank: its value is the reason, or None after regular work.
    """

    def __init__(self, connection: socket.socket, name: str, on_lost: Callable[[str], None]) -> None:
        self.name = name
        connection.settimeout(SILENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._on_lost = on_lost
        self._sending = threading.Lock()
        self._has_ended = threading.Event()
        self._inbox: SimpleQueue[Message] = SimpleQueue()

    def start(self) -> None:
        """Begin to read messages and to send signs of life."""
        for work in (self._read, self._beat):
            threading.Thread(target=work, name=f"mlx-mtp {self.name}", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message. If it cannot be sent, the rank is lost."""
        self._send(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message:
        """Wait for the next message."""
        return self._inbox.get()

    def wake(self) -> None:
        """Let a call of `receive` return, after a rank was lost."""
        self._inbox.put({})

    def close(self) -> None:
        """Close the connection. The rank is not called lost after this."""
        self._has_ended.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, data: bytes) -> None:
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError as error:
            self._lose(f"{self.name} cannot be reached: {error}")

    def _beat(self) -> None:
        while not self._has_ended.wait(_BEAT):
            self._send(b"\n")

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    if line != b"\n" and not self._take(json.loads(line)):
                        return
            self._lose(f"{self.name} has ended without notice")
        except TimeoutError:
            self._lose(f"{self.name} has given no sign of life for {SILENCE:g} s")
        except (OSError, ValueError) as error:
            self._lose(f"{self.name} was lost: {error}")

    def _take(self, message: Message) -> bool:
        """Take a message. Return False after the last one."""
        if message.get("end") is not None:
            self._lose(message["end"])
            return False
        if "end" in message:
            self._has_ended.set()
        self._inbox.put(message)
        return "end" not in message

    def _lose(self, reason: str) -> None:
        if not self._has_ended.is_set():
            self._has_ended.set()
            self._on_lost(reason)
