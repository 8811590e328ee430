"""JSON messages over a private socket, one a line.

A worker's stdout and stderr are not part of the protocol: a plugin may print whatever it likes.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from attnbench.harness.run.waiting import LOOK_EVERY_S

Message = dict[str, Any]


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """One end of a socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises ChannelClosed when nobody is there to read."""
        try:
            self._socket.settimeout(None)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message; TimeoutError after ``timeout_s``, ChannelClosed at the end.

        With a limit a Ctrl-C is heard as in ``waiting``; without one, as in an idle worker, nothing wakes the process.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
            try:
                self._socket.settimeout(left and min(left, LOOK_EVERY_S))
                chunk = self._socket.recv(1 << 16)
            except TimeoutError:
                if left and left > LOOK_EVERY_S:
                    continue  # by way of the interpreter, which looks for a Ctrl-C
                raise
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not chunk:
                raise ChannelClosed("end of stream")
            self._buffer += chunk
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        message: Message = json.loads(line)
        return message

    def close(self) -> None:
        self._socket.close()
