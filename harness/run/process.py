"""The parent's side of a worker process: start it, ask it, give up on it, and say what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnbench.harness import registry
from attnbench.harness.run.channel import Channel, ChannelClosed, Message
from attnbench.harness.run.evidence import evidence
from attnbench.harness.run.record import Status

REFEREE = "referee"
GRACE_S = 2.0
# OpenMP threads that wait by spinning take the cores from the worker whose turn it is: on two cores the smoke suite
# took twice the CPU time (73 and 108 s against 38 and 36, interleaved). What the user has set holds.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


class WorkerLost(Exception):
    """The worker is gone: status is TIMEOUT or CRASHED; reason is one line, evidence the end of its stderr."""

    def __init__(self, status: Status, reason: str, evidence: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.evidence = status, reason, evidence


class Worker:
    """One worker process; role is an implementation's name or REFEREE.

    serves: ``module:class`` of what answers its requests, made with (role, device); empty for a run's own.
    ``ask`` sends, ``answer`` waits; between the two, other workers may be asked.
    """

    def __init__(
        self, role: str, device: str, logs: Path, path: Sequence[str] | None = None, serves: str = ""
    ) -> None:
        """path: its site folders, instead of those that the environment gives the role. WorkerLost if it cannot be."""
        self.role = role
        self.device = device
        self.busy_since: float | None = None
        self._leaving = False
        self._log = logs / f"{role}-{device.replace(':', '')}-{time.monotonic_ns()}.log"
        parent_end, child_end = socket.socketpair()
        spec = {"role": role, "device": device, "parent": os.getpid(), "serves": serves}
        command = python_module("attnbench.harness.run.worker", json.dumps(spec), str(child_end.fileno()))
        try:
            with child_end, self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[child_end.fileno()],
                    env=(QUIET_THREADS if device == "cpu" else {}) | environment_of(role, path),
                    start_new_session=True,  # its own process group, so that what a plugin starts ends with it
                )
        except OSError as error:  # no process, no memory or no room for its log
            parent_end.close()
            raise WorkerLost(Status.CRASHED, f"its process cannot be started: {error.strerror}", "") from None
        self._channel = Channel(parent_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, operation: str, **arguments: Any) -> None:
        """Sends a request. That nobody is there to read it shows in ``answer``."""
        self.busy_since = time.monotonic()
        with contextlib.suppress(ChannelClosed):
            self._channel.send({"op": operation} | arguments)

    def answer(self, time_limit_s: float) -> Message:
        """The answer to the last ``ask``, waited for until ``time_limit_s`` after it; WorkerLost if there is none."""
        assert self.busy_since is not None, "answer without ask"
        waited = time.monotonic() - self.busy_since
        try:
            reply = self._channel.receive(max(time_limit_s - waited, 0.0))
        except TimeoutError:
            self.kill()
            raise WorkerLost(
                Status.TIMEOUT, f"no answer within {time_limit_s:g} s; its worker was killed", self._tail()
            ) from None
        except ChannelClosed:
            raise self._lost() from None
        self.busy_since = None
        if reply.get("fatal"):
            self.kill()
        return reply

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask_to_leave(self) -> None:
        """If it is idle; ``quit`` then waits for it. Several that are asked before any is waited for leave at once."""
        if self.alive and self.busy_since is None and not self._leaving:
            self._leaving = True
            with contextlib.suppress(ChannelClosed):
                self._channel.send({"op": "quit"})

    def quit(self) -> None:
        """Asks it to leave, and ends it if it does not."""
        self.ask_to_leave()
        if self._leaving:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        self.kill()

    def kill(self) -> None:
        """Ends the worker and everything it started."""
        with contextlib.suppress(ProcessLookupError):  # the whole group may be gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()

    def _lost(self) -> WorkerLost:
        """What became of a worker whose socket closed."""
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return WorkerLost(Status.CRASHED, "closed its side of the protocol socket", self._tail())
        self.kill()
        if code >= 0:
            return WorkerLost(Status.CRASHED, f"its process exited with code {code}", self._tail())
        # Real-time signals have no name.
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        if code == -signal.SIGKILL:
            reason = "its process was killed by SIGKILL, as the kernel does when memory runs out"
            return WorkerLost(Status.CRASHED, reason, self._tail())
        return WorkerLost(Status.CRASHED, f"its process died of {name}", self._tail())

    def _tail(self) -> str:
        return evidence(self._log.read_bytes().decode(errors="replace"))


def python_module(module: str, *arguments: str) -> list[str]:
    """Command line of a module in its own process; -P keeps the current folder from shadowing what is installed."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment_of(role: str, path: Sequence[str] | None = None) -> dict[str, str]:
    """The environment with ``path`` in front, or the role's own site folders (see ``registry.search_path``)."""
    environment = dict(os.environ)
    extra = registry.search_path(role) if path is None else path
    if extra:
        present = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*extra, *([present] if present else [])])
    return environment
