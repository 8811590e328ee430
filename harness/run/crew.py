"""The workers of one device: one per implementation and the referee, started when first needed, replaced when lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attnbench.harness import registry
from attnbench.harness.run.channel import Message
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.process import REFEREE, Worker, WorkerLost
from attnbench.harness.run.record import Status

# An implementation whose worker was lost this often, with no work done in between, is not started again: the rest of
# its cells carry the last loss.
MOST_LOSSES = 3
REAL_WORK = ("judge", "turn", "oracle", "ceilings")
START_LIMIT_S = 120.0


class Failure(Exception):
    """A request that was not answered well: a status, one line, and longer evidence."""

    def __init__(self, status: Status, reason: str, evidence: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.evidence = status, reason, evidence


class Crew:
    """Asks implementations by name. Every failure of a worker comes back as Failure, and only the worker is lost."""

    def __init__(
        self,
        device: str,
        logs: Path,
        time_limit_s: float,
        path_of: Callable[[str], Sequence[str]] = registry.search_path,
    ) -> None:
        """path_of: the site folders that a member's process finds first."""
        self.device = device
        self.versions: dict[str, str] = {}
        self.approximate: dict[str, bool] = {}
        self.sources: dict[str, str] = {}
        self.compile_processes: dict[str, int] = {}
        self.device_facts: dict[str, Any] = {}
        self._logs = logs
        self._time_limit_s = time_limit_s
        self._path_of = path_of
        self._workers: dict[str, Worker] = {}
        self._unavailable: dict[str, str] = {}
        self._losses: dict[str, list[WorkerLost]] = {}
        self._asked: dict[str, str] = {}
        self._hired: list[Worker] = []
        self._ended = False

    # ---- members ------------------------------------------------------------------------------------------

    def start(self, names: list[str]) -> None:
        """Starts those that are not there, all at once, and hears what each has to say of itself.

        One that does not start is lost like one that dies at work: it is tried again when next needed.
        """
        self._check()
        starting = []
        for name in names:
            if name not in self._workers and name not in self.absences([name]):
                try:
                    self._workers[name] = self._worker(name)
                    starting.append(name)
                except WorkerLost as loss:
                    self._losses.setdefault(name, []).append(loss)
        for name, reply in self.call_all("hello", {name: {} for name in starting}, START_LIMIT_S):
            if isinstance(reply, Failure):
                self._not_started(name, reply)
            elif name == REFEREE:
                self.device_facts = reply
            else:
                self.versions[name] = reply["version"]
                self.approximate[name] = reply.get("approximate", False)
                self.sources[name] = reply.get("source", "")
                self.compile_processes[name] = reply.get("compile_processes", 1)
                if reply["unavailable"]:
                    self._unavailable[name] = reply["unavailable"]
                    self._workers.pop(name).quit()

    def start_referee(self) -> dict[str, Any]:
        """Facts of the device; RunError when not even the referee can work on it."""
        self.start([REFEREE])
        if REFEREE not in self._workers:
            raise RunError(f"cannot work on {self.device}: {self._losses[REFEREE][-1].reason}", Exit.MACHINE)
        return self.device_facts

    def _not_started(self, name: str, failure: Failure) -> None:
        """Takes a failed ``hello`` down as a loss: of the machine (no torch, no CUDA context), not of a capability."""
        losses = self._losses.setdefault(name, [])
        if worker := self._workers.pop(name, None):
            worker.quit()
        else:
            losses.pop()  # the death itself; told again below
        # Memory that runs out before any problem is posed is no answer to one.
        status = Status.ERROR if failure.status is Status.OOM else failure.status
        losses.append(WorkerLost(status, f"its worker does not start: {failure.reason}", failure.evidence))

    def hire(self, name: str) -> Worker:
        """One more process of an implementation, for whoever asks; only ``kill`` still reaches it from here."""
        self._hired.append(self._worker(name))
        return self._hired[-1]

    def dismiss(self, names: list[str]) -> None:
        """Ends the named workers; a later ``start`` begins fresh processes."""
        leaving = [worker for name in names if (worker := self._workers.pop(name, None))]
        for worker in leaving:
            worker.ask_to_leave()
        for worker in leaving:
            worker.quit()

    def _worker(self, name: str) -> Worker:
        return Worker(name, self.device, self._logs, self._path_of(name))

    def absences(self, names: list[str]) -> dict[str, Failure]:
        """Why each of those that can no longer be started cannot be."""
        found = {}
        for name in names:
            losses = self._losses.get(name, [])
            if name in self._unavailable:
                found[name] = Failure(Status.UNAVAILABLE, self._unavailable[name])
            elif len(losses) >= MOST_LOSSES:
                last = losses[-1]
                reason = f"not started again after {MOST_LOSSES} losses; last: {last.reason}"
                found[name] = Failure(last.status, reason, last.evidence)
        return found

    def pid(self, name: str) -> int | None:
        worker = self._workers.get(name)
        return worker.pid if worker else None

    @property
    def pids(self) -> set[int]:
        return {worker.pid for worker in self._workers.values()}

    # ---- requests -----------------------------------------------------------------------------------------

    def ask(self, name: str, operation: str, **arguments: Any) -> None:
        """Sends a request; a worker that is gone shows in ``answer``."""
        worker = self._workers.get(name)
        self._asked[name] = operation
        if worker is not None:
            worker.ask(operation, **arguments)

    def answer(self, name: str, time_limit_s: float | None = None) -> Message:
        """The answer to the last ``ask``; raises Failure."""
        self._check()
        worker = self._workers.get(name)
        if worker is None:
            raise self._why_gone(name)
        try:
            reply = worker.answer(time_limit_s or self._time_limit_s)
        except WorkerLost as loss:
            self._check()
            self._workers.pop(name)
            self._losses.setdefault(name, []).append(loss)
            raise Failure(loss.status, loss.reason, loss.evidence) from None
        if reply["ok"]:
            if self._asked[name] in REAL_WORK:
                self._losses.pop(name, None)
            return reply
        if reply["fatal"]:
            self._workers.pop(name)
            gone = WorkerLost(Status(reply["status"]), reply["reason"], reply["evidence"])
            self._losses.setdefault(name, []).append(gone)
        raise Failure(Status(reply["status"]), reply["reason"], reply["evidence"])

    def _why_gone(self, name: str) -> Failure:
        if absence := self.absences([name]).get(name):
            return absence
        if not (losses := self._losses.get(name)):
            return Failure(Status.CRASHED, "its worker is gone")
        return Failure(losses[-1].status, losses[-1].reason, losses[-1].evidence)

    def call(self, name: str, operation: str, **arguments: Any) -> Message:
        """One request to one worker; raises Failure."""
        self.ask(name, operation, **arguments)
        return self.answer(name)

    def call_all(
        self, operation: str, arguments: dict[str, Message], time_limit_s: float | None = None
    ) -> Iterator[tuple[str, Message | Failure]]:
        """The same request to many workers at once, each with its own arguments; answers in the order asked."""
        for name, message in arguments.items():
            self.ask(name, operation, **message)
        for name in arguments:
            try:
                yield name, self.answer(name, time_limit_s)
            except Failure as failure:
                yield name, failure

    def release(self, names: list[str]) -> None:
        """Has the named workers give back their device memory; one that cannot is lost, and says so when next asked."""
        for _ in self.call_all("release", {name: {} for name in names if name in self._workers}):
            continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends every worker; without asking where the user has had enough."""
        if isinstance(error, KeyboardInterrupt):
            self.kill()
        else:
            self.close()

    def close(self) -> None:
        self.dismiss(list(self._workers))

    def kill(self) -> None:
        """Ends every worker now, from another thread than the one that asks: that one's requests raise RunError."""
        self._ended = True
        for worker in [*self._workers.values(), *self._hired]:
            worker.kill()

    def _check(self) -> None:
        """A worker that the run itself ended is no loss of its implementation, and is not replaced."""
        if self._ended:
            raise RunError(f"the run on {self.device} was ended", Exit.INTERRUPTED)


def shuffled(names: list[str], seed: int) -> list[str]:
    """The order of one round."""
    order = list(names)
    random.Random(seed).shuffle(order)
    return order
