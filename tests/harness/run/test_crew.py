"""A crew: workers are started once, asked by name, replaced when lost and given up when lost too often."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.run import process
from attnbench.harness.run.crew import MOST_LOSSES, Crew, Failure, shuffled
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.process import REFEREE
from attnbench.harness.run.record import Status

REFUSAL = {"status": "OOM", "reason": "planted", "evidence": "", "fatal": False}


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setattr(sys, "executable", str(Path(__file__).parent / "stand_in_worker.py"))
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    made = Crew("cpu", tmp_path, 30.0)
    yield made
    made.kill()


def fail(crew: Crew, name: str, operation: str, **arguments: Any) -> Failure:
    with pytest.raises(Failure) as failure:
        crew.call(name, operation, **arguments)
    return failure.value


def test_members_are_started_once(crew: Crew) -> None:
    crew.start(["a", "b"])
    pids = crew.pids
    assert len(pids) == 2
    crew.start(["b", "a"])
    assert crew.pids == pids
    assert crew.versions == {"a": "1.0", "b": "1.0"}
    assert crew.call("a", "echo", value=1)["value"] == 1


def test_one_that_says_it_is_unavailable_is_let_go(crew: Crew) -> None:
    crew.start(["a", "absent"])
    (absence,) = crew.absences(["a", "absent"]).values()
    assert (absence.status, absence.reason) == (Status.UNAVAILABLE, "planted")
    assert crew.pid("absent") is None
    assert crew.pids == {crew.pid("a")}
    assert fail(crew, "absent", "echo").status is Status.UNAVAILABLE


def test_one_that_does_not_start_is_a_loss_with_its_cause(crew: Crew) -> None:
    for _ in range(MOST_LOSSES):
        assert not crew.absences(["stillborn"])
        crew.start(["stillborn", "a"])
        lost = fail(crew, "stillborn", "echo")
        assert lost.status is Status.CRASHED
        assert lost.reason.endswith("its worker does not start: its process exited with code 1")
        assert lost.evidence.strip() == "cannot start"
    absence = crew.absences(["stillborn"])["stillborn"]
    assert absence.status is Status.CRASHED
    assert absence.reason.startswith(
        f"not started again after {MOST_LOSSES} losses; last: its worker does not"
    )
    assert crew.call("a", "echo")["ok"]


@pytest.mark.parametrize(("told", "status"), [("ERROR", Status.ERROR), ("OOM", Status.ERROR)])
def test_one_whose_device_cannot_be_had_is_a_loss_and_let_go(crew: Crew, told: str, status: Status) -> None:
    crew.start([f"no_device_{told}"])
    lost = fail(crew, f"no_device_{told}", "echo")
    assert (lost.status, lost.reason) == (status, "its worker does not start: no context")
    assert not crew.pids


def test_a_process_that_cannot_be_had_is_a_loss(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(process.subprocess, "Popen", refuse)
        crew.start(["a"])
    lost = fail(crew, "a", "echo")
    assert lost.reason == "its process cannot be started: Resource temporarily unavailable"
    crew.start(["a"])
    assert crew.call("a", "echo")["ok"]


def test_the_referee_speaks_for_the_device(crew: Crew) -> None:
    assert crew.start_referee()["name"] == "stand-in"
    assert REFEREE not in crew.versions


def test_without_a_referee_there_is_no_run(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match="cannot work on cpu: its worker does not start") as refused:
        crew.start_referee()
    assert refused.value.exit_code == Exit.MACHINE


def test_a_failure_is_told_and_the_worker_stays(crew: Crew) -> None:
    crew.start(["a"])
    pid = crew.pid("a")
    failure = fail(crew, "a", "refuse", status="OOM", fatal=False)
    assert (failure.status, failure.reason, failure.evidence) == (Status.OOM, "planted", "trace")
    assert crew.pid("a") == pid
    assert crew.call("a", "echo")["ok"]


def test_a_lost_worker_is_replaced_when_started_again_and_costs_no_other(crew: Crew) -> None:
    crew.start(["a", "b"])
    lost, other = crew.pid("a"), crew.pid("b")
    assert fail(crew, "a", "leave", code=3).reason == "its process exited with code 3"
    assert crew.pid("a") is None
    assert fail(crew, "a", "echo").status is Status.CRASHED  # asked while gone
    crew.start(["a", "b"])
    assert crew.pid("a") not in {None, lost}
    assert crew.pid("b") == other


def test_a_fatal_answer_is_a_lost_worker(crew: Crew) -> None:
    crew.start(["a"])
    assert fail(crew, "a", "refuse", status="ERROR", fatal=True).status is Status.ERROR
    assert crew.pid("a") is None
    crew.start(["a"])
    assert crew.call("a", "echo")["ok"]


def test_one_lost_too_often_is_given_up_with_its_last_loss(crew: Crew) -> None:
    for loss in range(MOST_LOSSES):
        assert not crew.absences(["a"])
        crew.start(["a"])
        fail(crew, "a", "leave", code=loss)
    absence = crew.absences(["a"])["a"]
    assert absence.status is Status.CRASHED
    assert (
        absence.reason
        == f"not started again after {MOST_LOSSES} losses; last: its process exited with code 2"
    )
    crew.start(["a"])
    assert crew.pid("a") is None
    assert fail(crew, "a", "echo").reason == absence.reason


def test_the_time_limit_of_a_run_holds_for_every_request(tmp_path: Path, crew: Crew) -> None:
    hasty = Crew("cpu", tmp_path, 0.3)
    hasty.start(["a"])  # starting has a limit of its own
    assert fail(hasty, "a", "sleep").status is Status.TIMEOUT
    hasty.close()


def test_all_are_asked_before_any_answer_is_awaited(crew: Crew) -> None:
    names = ["a", "b", "c"]
    crew.start(names)
    answers = crew.call_all("echo", {name: {"value": name} for name in names})
    assert [(name, reply["value"]) for name, reply in answers if not isinstance(reply, Failure)] == [
        (name, name) for name in names
    ]
    crew.call_all(
        "leave", {name: {"code": 0} for name in names}
    ).close()  # nothing is sent before it is iterated
    assert len(crew.pids) == 3


def test_one_failure_among_many_leaves_the_other_answers(crew: Crew) -> None:
    crew.start(["a", "b"])
    replies = dict(crew.call_all("echo", {"gone": {}, "a": {"ok": False, **REFUSAL}, "b": {"value": 1}}))
    assert isinstance(replies["gone"], Failure)
    assert isinstance(replies["a"], Failure)
    assert replies["b"] == {"ok": True, "value": 1}


def test_releasing_passes_over_those_that_are_gone(crew: Crew) -> None:
    crew.start(["a"])
    crew.release(["a", "gone"])
    os.kill(next(iter(crew.pids)), 9)
    crew.release(["a"])
    assert fail(crew, "a", "echo").status is Status.CRASHED


@pytest.mark.parametrize("end", ["close", "kill"])
def test_its_end_ends_every_worker(crew: Crew, end: str) -> None:
    crew.start(["a", "b", REFEREE])
    crew.ask("a", "sleep")
    workers = list(crew._workers.values())
    getattr(crew, end)()
    assert not any(worker.alive for worker in workers)


def test_the_order_of_a_round_is_random_and_repeatable() -> None:
    names = list("abcdefgh")
    orders = [shuffled(names, seed) for seed in range(20)]
    assert orders == [shuffled(names, seed) for seed in range(20)]
    assert all(sorted(order) == names for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    assert names == list("abcdefgh")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How members were ended, in order."""
    noted: list[str] = []
    for name in ("ask_to_leave", "quit", "kill"):
        real = getattr(process.Worker, name)

        def noting(worker: process.Worker, name: str = name, real: Any = real) -> None:
            noted.append(f"{name} {worker.role}")
            real(worker)

        monkeypatch.setattr(process.Worker, name, noting)
    return noted


def test_all_are_asked_to_leave_before_any_is_waited_for(crew: Crew, ends: list[str]) -> None:
    with crew:
        crew.start(["a", "b"])
    assert ends[:3] == ["ask_to_leave a", "ask_to_leave b", "quit a"]
    assert crew.pids == set()


def test_an_interrupt_asks_nobody(crew: Crew, ends: list[str]) -> None:
    crew.start(["a", "b"])
    with pytest.raises(KeyboardInterrupt), crew:
        raise KeyboardInterrupt
    assert ends == ["kill a", "kill b"]
