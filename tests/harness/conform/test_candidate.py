"""A worker that does not come up is a fault of the machine: shown, never taken for an answer, and tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.conform import candidate as candidates
from attnbench.harness.conform import examination as examinations
from attnbench.harness.conform.candidate import MOST_LOSSES, MOST_STARTS, Candidate, NotStarted
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examination import Examination
from attnbench.harness.conform.reproduce import worst_first
from attnbench.harness.conform.verdict import Verdict
from attnbench.harness.problem import Problem
from attnbench.harness.run.process import WorkerLost
from attnbench.harness.run.record import Status

CASE = Case(Problem(1, 1, 3, 8, dtype="fp32"), "c", "w", suite="s", check="opcheck")
Reply = dict[str, Any] | WorkerLost
READY = {"ok": True, "version": "1", "unavailable": ""}


def failed(status: str, reason: str) -> Reply:
    return {"ok": False, "status": status, "reason": reason, "evidence": "where", "fatal": False}


class Staff:
    """Stands in for worker processes, which answer with ``replies`` in turn, the last one for ever."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.started, self.ended = 0, 0

    def __call__(self, *_: Any, **__: Any) -> Staff:
        self.started += 1
        if isinstance(self.replies[0], WorkerLost) and "cannot be started" in str(self.replies[0]):
            raise self._next()  # type: ignore[misc]
        return self

    def _next(self) -> Reply:
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def ask(self, operation: str, **arguments: Any) -> None:
        pass

    def answer(self, limit_s: float) -> dict[str, Any]:
        reply = self._next()
        if isinstance(reply, WorkerLost):
            raise reply
        return reply

    def quit(self) -> None:
        self.ended += 1


def candidate(monkeypatch: pytest.MonkeyPatch, staff: Staff) -> Candidate:
    monkeypatch.setattr(candidates, "Worker", staff)
    return Candidate("impl", "", "cpu", Path(), 1.0)


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (
            failed("OOM", "CUDA out of memory"),
            Status.ERROR,
        ),  # no case was posed yet, so it is no answer to one
        (failed("ERROR", "ImportError: libcudart.so.12"), Status.ERROR),
        (WorkerLost(Status.CRASHED, "its process died of SIGSEGV", ""), Status.CRASHED),
        (WorkerLost(Status.TIMEOUT, "no answer within 120 s", ""), Status.TIMEOUT),
        (WorkerLost(Status.CRASHED, "its process cannot be started: no memory", ""), Status.CRASHED),
    ],
    ids=["memory", "raises", "dies", "hangs", "no process"],
)
def test_a_start_that_fails_is_tried_again_a_few_times(
    monkeypatch: pytest.MonkeyPatch, reply: Reply, status: Status
) -> None:
    staff = Staff(reply)
    asked = candidate(monkeypatch, staff)
    for number in range(MOST_STARTS + 3):
        with pytest.raises(NotStarted, match="its worker does not start: ") as caught:
            asked.hello()
        assert caught.value.status is status
        assert str(caught.value).startswith("not started again after 3 losses") == (number >= MOST_STARTS)
    assert staff.started == MOST_STARTS
    asked.forgive()
    staff.replies = [READY]
    assert asked.hello() == READY


def test_a_start_that_comes_right_is_none_the_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    staff = Staff(failed("OOM", "CUDA out of memory"), READY, {"ok": True, "verdict": "PASS"})
    asked = candidate(monkeypatch, staff)
    with pytest.raises(NotStarted):
        asked.ask("examine")
    assert asked.ask("examine") == {"ok": True, "verdict": "PASS"}
    assert (staff.started, staff.ended) == (2, 1)


def test_one_that_dies_at_work_is_replaced_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    staff = Staff(*[READY, WorkerLost(Status.CRASHED, "died", "")] * MOST_LOSSES)
    asked = candidate(monkeypatch, staff)
    for _ in range(MOST_LOSSES + 2):
        with pytest.raises(WorkerLost) as caught:
            asked.ask("examine")
        assert not isinstance(caught.value, NotStarted)
    assert staff.started == MOST_LOSSES


def test_its_cases_were_not_asked_which_is_no_failure_and_not_shrunk_to_a_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(candidates, "Worker", Staff(failed("OOM", "CUDA out of memory")))
    examination = Examination("cuda:0", [])
    examination._scratch = tmp_path
    finding = examination.examine("impl", CASE)
    assert (finding.verdict, finding.failed, finding.asked) == (Verdict.ERROR, False, False)
    assert finding.reason == "its worker does not start: CUDA out of memory"
    assert worst_first([finding], {CASE.id: CASE}, 3) == []


def test_a_real_one_whose_module_is_not_there_does_not_start(tmp_path: Path) -> None:
    asked = Candidate("standard", "attnbench.harness.conform.nowhere:Examiner", "cpu", tmp_path, 5.0)
    with pytest.raises(NotStarted, match="its worker does not start: ModuleNotFoundError"):
        asked.hello()
    assert examinations.EXAMINER.startswith("attnbench.harness.conform.examiner")
