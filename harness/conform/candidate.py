"""One implementation seen from the parent: its worker, started when first asked, replaced when lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnbench.harness.conform.second_opinion import upsets
from attnbench.harness.run.channel import Message
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.process import Worker, WorkerLost
from attnbench.harness.run.record import Status

START_LIMIT_S = 120.0
MOST_STARTS = 3
"""Workers that did not come up, without a case answered in between, after which no other is started."""
MOST_LOSSES = 8
"""Workers lost in a row, without a case answered in between, after which no other is started."""


class NotStarted(WorkerLost):
    """No worker came up, whatever it was to be asked: a fault of the machine, or of what is installed on it."""


class Candidate:
    """Asks one role (an implementation or the referee) one thing at a time; a lost worker costs the request alone.

    upset: whether the worker that is asked next has given an answer before in which something may have been raised.
    """

    def __init__(self, role: str, serves: str, device: str, logs: Path, time_limit_s: float) -> None:
        self.role = role
        self.about: Message = {}
        self.upset = False
        self._start = (role, device, logs)
        self._serves = serves
        self._time_limit_s = time_limit_s
        self._worker: Worker | None = None
        self._losses: list[WorkerLost] = []
        self._ended = False

    def hello(self) -> Message:
        """What the worker says of itself, starting it if need be; NotStarted when none comes up."""
        if self._ended:
            raise RunError(f"the examination of {self.role} was ended", Exit.INTERRUPTED)
        if self._worker is None:
            self._give_up_after_many()
            self.about = self._started()
        return self.about

    def _give_up_after_many(self) -> None:
        not_started = sum(isinstance(loss, NotStarted) for loss in self._losses)
        if not_started < MOST_STARTS and len(self._losses) < MOST_LOSSES:
            return
        last = self._losses[-1]
        reason = f"not started again after {len(self._losses)} losses in a row; last: {last.reason}"
        raise type(last)(last.status, reason, last.evidence)

    def _started(self) -> Message:
        """Starts a worker, and returns what it says of itself."""
        self.upset = False
        try:
            self._worker = Worker(*self._start, serves=self._serves)
            reply = self._request("hello", START_LIMIT_S)
        except WorkerLost as lost:
            raise self._not_started(lost.status, lost.reason, lost.evidence) from None
        if not reply["ok"]:
            self.close()
            raise self._not_started(Status(reply["status"]), reply["reason"], reply["evidence"])
        return reply

    def _not_started(self, status: Status, reason: str, evidence: str) -> NotStarted:
        # Memory that runs out before any case is posed is no answer to one.
        status = Status.ERROR if status is Status.OOM else status
        lost = NotStarted(status, f"its worker does not start: {reason}", evidence)
        self._losses.append(lost)
        return lost

    def ask(self, operation: str, *, limit_s: float | None = None, **arguments: Any) -> Message:
        """The answer, good or bad (``ok``); raises WorkerLost when the worker is gone, which the next ask replaces."""
        self.hello()
        try:
            reply = self._request(operation, limit_s or self._time_limit_s, **arguments)
        except WorkerLost as lost:
            self._losses.append(lost)
            raise
        self._losses.clear()
        self.upset = self.upset or upsets(reply)
        return reply

    def _request(self, operation: str, limit_s: float, **arguments: Any) -> Message:
        assert self._worker is not None
        try:
            self._worker.ask(operation, **arguments)
            reply = self._worker.answer(limit_s)
        except WorkerLost:
            self._worker = None
            raise
        if reply.get("fatal"):
            self._worker = None
        return reply

    def forgive(self) -> None:
        """Forgets the losses: the next ask starts a worker again."""
        self._losses.clear()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.quit()
            self._worker = None

    def kill(self) -> None:
        """Ends the worker now and for good, from another thread than the one that waits for it."""
        self._ended = True
        if (worker := self._worker) is not None:
            worker.kill()
