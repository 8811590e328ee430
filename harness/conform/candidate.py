"""One implementation seen from the parent: its worker, started when first asked, replaced when lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnbench.harness.run.channel import Message
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.process import Worker, WorkerLost

START_LIMIT_S = 120.0
MOST_LOSSES = 8
"""Workers lost in a row, without a case answered in between, after which no other is started."""


class Candidate:
    """Asks one role (an implementation or the referee) one thing at a time; a lost worker costs the request alone."""

    def __init__(self, role: str, serves: str, device: str, logs: Path, time_limit_s: float) -> None:
        self.role = role
        self.about: Message = {}
        self._start = (role, device, logs)
        self._serves = serves
        self._time_limit_s = time_limit_s
        self._worker: Worker | None = None
        self._losses: list[WorkerLost] = []
        self._ended = False

    def hello(self) -> Message:
        """What the worker says of itself, starting it if need be; WorkerLost when none comes up."""
        if self._ended:
            raise RunError(f"the examination of {self.role} was ended", Exit.INTERRUPTED)
        if self._worker is None:
            if len(self._losses) >= MOST_LOSSES:
                last = self._losses[-1]
                reason = f"not started again after {MOST_LOSSES} losses in a row; last: {last.reason}"
                raise WorkerLost(last.status, reason, last.evidence)
            self._worker = Worker(*self._start, serves=self._serves)
            self.about = self._request("hello", START_LIMIT_S)
        return self.about

    def ask(self, operation: str, **arguments: Any) -> Message:
        """The answer, good or bad (``ok``); raises WorkerLost when the worker is gone, which the next ask replaces."""
        self.hello()
        reply = self._request(operation, self._time_limit_s, **arguments)
        self._losses.clear()
        return reply

    def _request(self, operation: str, limit_s: float, **arguments: Any) -> Message:
        assert self._worker is not None
        try:
            self._worker.ask(operation, **arguments)
            reply = self._worker.answer(limit_s)
        except WorkerLost as lost:
            self._worker = None
            self._losses.append(lost)
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
