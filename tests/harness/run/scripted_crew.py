"""A group as tests run it: the crew is the real one; its workers are scripted and live in this process."""

from __future__ import annotations

import itertools
import os
import runpy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run import crew as crew_module
from attnbench.harness.run.channel import Message
from attnbench.harness.run.crew import Crew
from attnbench.harness.run.group import Conditions, GroupRun
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import WorkerLost
from attnbench.harness.run.record import Cell, Group, Status

STAND_IN = runpy.run_path(str(Path(__file__).parent / "stand_in_worker.py"))
in_a_run, judgement = STAND_IN["in_a_run"], STAND_IN["judgement"]

Outcome = Message | WorkerLost
CRASH = WorkerLost(Status.CRASHED, "planted crash", "its stderr")
OUT_OF_MEMORY = {"ok": False, "status": "OOM", "reason": "planted", "evidence": "", "fatal": False}
REFUSED = {"ok": False, "status": "INCORRECT", "reason": "shape", "evidence": "", "fatal": False}


class Script:
    """What was asked, and what some answers are instead of good ones."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Message]] = []
        self.pids = itertools.count(100)
        self._planted: dict[tuple[str, str], list[Outcome | None]] = {}

    def plant(self, role: str, operation: str, *outcomes: Outcome | None) -> None:
        """The first answers of ``role`` to ``operation``; None is a good one, and all after them are good."""
        self._planted[role, operation] = list(outcomes)

    def answer(self, role: str, operation: str) -> Outcome:
        planted = self._planted.get((role, operation))
        found = planted.pop(0) if planted else None
        if isinstance(found, WorkerLost):
            return found
        return {"ok": True} | in_a_run(role, operation) | (found or {})

    def order(self, *operations: str) -> list[tuple[str, str]]:
        return [(role, operation) for role, operation, _ in self.asked if operation in operations]

    def count(self, role: str, operation: str) -> int:
        return self.order(operation).count((role, operation))


class ScriptedWorker:
    def __init__(self, script: Script, role: str) -> None:
        self.role, self.pid = role, next(script.pids)
        self._script = script
        self._operation = ""

    def ask(self, operation: str, **arguments: Any) -> None:
        self._operation = operation
        self._script.asked.append((self.role, operation, arguments | {"pid": self.pid}))

    def answer(self, time_limit_s: float) -> Message:
        outcome = self._script.answer(self.role, self._operation)
        if isinstance(outcome, WorkerLost):
            raise outcome
        return outcome

    def ask_to_leave(self) -> None: ...
    def quit(self) -> None: ...


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(crew_module, "Worker", lambda role, device, logs, path: ScriptedWorker(made, role))
    return made


def plan(
    impls: Sequence[str] = ("a", "b"), directions: Sequence[Direction] = ("fwd",), **changes: Any
) -> GroupPlan:
    problem = Problem(**{"batch": 1, "heads": 1, "seqlen_q": 8, "head_dim": 8} | changes)
    problems = tuple(problem.with_direction(direction) for direction in directions)
    return GroupPlan("s", "c", "w", problem.group_key, problems, tuple(impls), "normal", 3)


def conditions(**changes: Any) -> Conditions:
    told: dict[str, Any] = {
        "run": "r", "rounds": 3, "samples": 2, "mode": "cold", "memory": True, "memory_mib": None,
        "scratch": Path(tempfile.gettempdir()) / f"attnbench-test-group-{os.getpid()}",
    }  # fmt: skip
    return Conditions(**told | changes)


def started_crew() -> Crew:
    """As the runner hands it to a group: the referee is there."""
    crew = Crew("cpu", Path("logs"), 30.0)
    crew.start_referee()
    return crew


def made(posed: GroupPlan, **changes: Any) -> GroupRun:
    return GroupRun(posed, started_crew(), conditions(**changes), lambda phase: None)


def execute(posed: GroupPlan, **changes: Any) -> tuple[dict[str, Cell], Group]:
    """Cells by ``impl/direction``."""
    cells, group = made(posed, **changes).execute()
    assert group.cells == [cell.id for cell in cells] == posed.cells
    return {f"{cell.impl}/{cell.problem.direction}": cell for cell in cells}, group
