"""The child's end of a process that runs user code.

User code has the main thread (signals work there), its own standard output, and nothing of the protocol: that goes over the inherited
socket. In: frames of 8 bytes of length (big endian) and a pickle. Out: lines of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from verst.errors import VerstError
from verst.extend import origin

HEADER = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1


class Channel:
    """To the parent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._replies: IO[bytes] = connection.makefile("wb")

    @classmethod
    def open(cls) -> Channel:
        """That of this process, from its command line (`SOCKET_FD PARENT_PID`). From here on it ends with its parent."""
        connection = socket.socket(fileno=int(sys.argv[1]))
        _die_with_parent(int(sys.argv[2]), connection)
        return cls(connection)

    def receive(self) -> Any:
        """The next frame; None when the parent has closed the socket."""
        header = self._read(HEADER.size)
        payload = None if header is None else self._read(*HEADER.unpack(header))
        return None if payload is None else pickle.loads(payload)

    def send(self, **reply: Any) -> None:
        self._replies.write(json.dumps(reply).encode() + b"\n")
        self._replies.flush()

    def send_unloaded(self, error: Exception) -> None:
        """That what was to be loaded could not be; `IsolatedProcess.load` raises it."""
        self.send(error=str(error) if isinstance(error, VerstError) else origin(error), kind=type(error).__name__)

    def _read(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            part = self._connection.recv(min(size - len(data), 2**20))
            if not part:
                return None
            data += part
        return bytes(data)


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The one place where user code is called: whatever it raises is a fact about that code, reported with what it was called for.

    `SystemExit` and the like are let through: the process ends, and the parent reports that.
    """
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - see above
        return None, error


def _die_with_parent(parent: int, connection: socket.socket) -> None:
    """Ends this process when its parent does, even by SIGKILL and even while user code never returns.

    The kernel's signal covers code stuck outside the interpreter, on Linux; the watcher covers other systems and an orderly close.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(connection, 0)  # hang-up is always reported, and data never wakes it
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
