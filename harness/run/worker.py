"""A worker process: serves one implementation, or the referee, over a private socket until told to quit.

Started by ``process.Worker`` as ``python -m attnbench.harness.run.worker SPEC FD``. Every request is answered by one
message: ``{"ok": true, ...}``, or ``{"ok": false, "status", "reason", "evidence", "fatal"}`` when it raised. After a
CUDA error that does not go away the process answers and leaves; the runner starts a fresh one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from attnbench.harness import registry
from attnbench.harness.contract import Device
from attnbench.harness.run.channel import Channel, ChannelClosed, Message
from attnbench.harness.run.evidence import evidence
from attnbench.harness.run.process import REFEREE
from attnbench.harness.run.protect import (
    die_with,
    limit_host_memory,
    trace_fatal_signals,
    volunteer_for_oom_killer,
)
from attnbench.harness.run.record import Status

MOST_REASON = 300


class Refusal(Exception):
    """An answer that is neither right nor an error: a status and its one-line reason."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def serve(channel: Channel, operations: Callable[[str], Callable[..., Message]]) -> None:
    """Answers requests until ``quit`` or until the parent is gone."""
    while True:
        try:
            request = channel.receive()
        except ChannelClosed:
            return
        operation = request.pop("op")
        if operation == "quit":
            return
        try:
            reply = {"ok": True} | operations(operation)(**request)
        except BaseException as error:  # noqa: BLE001 - a plugin may raise SystemExit or worse; the run goes on
            reply = failure(error)
        if not reply["ok"]:
            # The frames of the traceback held tensors, and are in cycles with the exception: an out-of-memory left
            # 113 GiB in its worker's hands, and the neighbours ran out in their turn.
            gc.collect()
        channel.send(reply)
        if reply.get("fatal"):
            os._exit(1)


def failure(error: BaseException) -> Message:
    """The answer to a request that raised: what kind of failure, in one line, and the end of the traceback."""
    text = "".join(traceback.format_exception(error))
    first_line = (str(error).strip() or "(no message)").splitlines()[0]
    return {
        "ok": False,
        "status": _status_of(error),
        "reason": _one_line(error, first_line),
        "evidence": "" if isinstance(error, Refusal) else evidence(text),
        "fatal": getattr(error, "fatal", False) or _device_is_lost(),
    }


def _one_line(error: BaseException, text: str) -> str:
    line = text if isinstance(error, Refusal) else f"{type(error).__name__}: {text}"
    return line if len(line) <= MOST_REASON else line[: MOST_REASON - 1] + "…"


def _status_of(error: BaseException) -> Status:
    if isinstance(error, Refusal):
        return error.status
    torch = sys.modules.get("torch")  # not imported here: that it cannot be may be the very error
    out_of_memory = isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError))
    # torch's CPU allocator raises a plain RuntimeError, and libraries pass cudaErrorMemoryAllocation on as text.
    told = ("can't allocate memory", "out of memory", "cannot allocate memory")
    return Status.OOM if out_of_memory or any(t in str(error).lower() for t in told) else Status.ERROR


def _device_is_lost() -> bool:
    """Whether CUDA is in an error that stays: every later call in this process would fail too."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> None:
    spec, fd = json.loads(sys.argv[1]), int(sys.argv[2])
    die_with(spec["parent"])
    volunteer_for_oom_killer()
    trace_fatal_signals()
    if spec["device"] == "cpu":
        limit_host_memory()
    channel_socket = socket.socket(fileno=fd)
    # A child that a plugin forks must neither speak on this socket nor outlive this process.
    os.register_at_fork(after_in_child=lambda: _leave_to_parent(channel_socket))
    serve(Channel(channel_socket), _operations(spec))


def _leave_to_parent(channel_socket: socket.socket) -> None:
    channel_socket.close()
    die_with(os.getppid())


def _operations(spec: dict[str, Any]) -> Callable[[str], Callable[..., Message]]:
    """Looks up an operation by name on the role this process plays; its torch import waits until it is needed."""
    roles: list[Any] = []

    def operation(name: str) -> Callable[..., Message]:
        if name == "hello" and (why := _unavailable_without_torch(spec)):
            return lambda: {"version": "unknown", "unavailable": why}
        if not roles:
            roles.append(_role(spec))
        found: Callable[..., Message] = getattr(roles[0], f"do_{name}")
        return found

    return operation


def _role(spec: dict[str, Any]) -> Any:
    """What answers the requests of this process."""
    if spec["serves"]:
        module, _, name = spec["serves"].partition(":")
        return getattr(importlib.import_module(module), name)(spec["role"], spec["device"])
    from attnbench.harness.run.referee import Referee
    from attnbench.harness.run.solver import Solver

    return Referee(spec["device"]) if spec["role"] == REFEREE else Solver(spec["role"], spec["device"])


def _unavailable_without_torch(spec: dict[str, Any]) -> str:
    """Why a plugin cannot run on a CPU, found before two seconds of importing torch are spent on it."""
    if spec["role"] == REFEREE or spec["device"] != "cpu":
        return ""
    try:
        found = registry.load(spec["role"]).unavailable(Device("cpu"))
    except registry.PluginError as error:
        return str(error)
    return found.line if found else ""


if __name__ == "__main__":
    # By its import name, so that a Refusal raised elsewhere is the class that is caught here.
    from attnbench.harness.run import worker

    worker.main()
