"""A worker's parent: what it makes of every way a process can end or fall silent; with a stand-in for the worker."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.run import process
from attnbench.harness.run.evidence import MOST_CHARACTERS
from attnbench.harness.run.process import Worker, WorkerLost
from attnbench.harness.run.record import Status

Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts workers that are ended with the test."""
    monkeypatch.setattr(sys, "executable", str(Path(__file__).parent / "stand_in_worker.py"))
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    started: list[Worker] = []

    def starter(role: str = "steady", device: str = "cpu") -> Worker:
        started.append(Worker(role, device, tmp_path))
        return started[-1]

    yield starter
    for worker in started:
        worker.kill()


def call(worker: Worker, operation: str, limit_s: float = 30.0, **arguments: Any) -> dict[str, Any]:
    worker.ask(operation, **arguments)
    return worker.answer(limit_s)


def lose(worker: Worker, operation: str, limit_s: float = 30.0, **arguments: Any) -> WorkerLost:
    with pytest.raises(WorkerLost) as lost:
        call(worker, operation, limit_s, **arguments)
    assert not worker.alive
    return lost.value


def gone(pid: int) -> bool:
    """Waits until ``pid`` is a zombie or no more; the test's own time limit bounds the wait."""
    status = Path(f"/proc/{pid}/status")
    while status.exists():
        try:
            if "State:\tZ" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return True


def test_a_worker_answers_as_often_as_it_is_asked(start: Start) -> None:
    worker = start()
    assert worker.pid != os.getpid()
    for value in (1, "two", [3.0, None]):
        assert call(worker, "echo", value=value) == {"ok": True, "value": value}
    assert worker.alive


def test_workers_are_asked_side_by_side(start: Start) -> None:
    workers = [start(role) for role in ("a", "b")]
    for number, worker in enumerate(workers):
        worker.ask("echo", value=number)
    assert [worker.answer(30)["value"] for worker in workers] == [0, 1]


def test_no_answer_within_the_limit_is_a_timeout_and_the_worker_is_killed(start: Start) -> None:
    lost = lose(start(), "sleep", 0.3)
    assert lost.status is Status.TIMEOUT
    assert lost.reason == "no answer within 0.3 s; its worker was killed"


def test_the_limit_counts_from_the_question(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start()
    worker.ask("sleep")
    assert worker.busy_since is not None
    worker.busy_since -= 1000.0  # the parent was busy with others since
    with pytest.raises(WorkerLost) as lost:
        worker.answer(600.0)
    assert lost.value.status is Status.TIMEOUT


def test_an_answer_already_there_counts_however_late_it_is_read(start: Start) -> None:
    worker = start()
    call(worker, "echo")
    worker.ask("echo", value=1)
    assert worker.busy_since is not None
    import select

    select.select([worker._channel], [], [])
    worker.busy_since -= 1000.0
    assert worker.answer(600.0)["value"] == 1


@pytest.mark.parametrize(
    ("operation", "arguments", "reason"),
    [
        ("leave", {"code": 7}, "its process exited with code 7"),
        ("leave", {"code": 0}, "its process exited with code 0"),
        ("die", {"by": "SIGSEGV"}, "its process died of SIGSEGV"),
        ("die", {"by": "SIGKILL"}, "killed by SIGKILL, as the kernel does when memory runs out"),
        ("hang_up", {}, "closed its side of the protocol socket"),
    ],
)
def test_an_end_says_how(start: Start, operation: str, arguments: dict[str, Any], reason: str) -> None:
    lost = lose(start(), operation, **arguments)
    assert lost.status is Status.CRASHED
    assert reason in lost.reason


def test_one_that_never_starts_is_lost_at_the_first_answer(start: Start) -> None:
    lost = lose(start("stillborn"), "hello")
    assert (lost.status, lost.reason) == (Status.CRASHED, "its process exited with code 1")
    assert lost.evidence == "cannot start\n"


def test_a_signal_without_a_name_is_still_an_end(start: Start) -> None:
    lost = lose(start(), "die_by_number", number=int(signal.SIGRTMIN) + 3)
    assert lost.status is Status.CRASHED


def test_the_evidence_is_the_end_of_what_it_wrote(start: Start) -> None:
    lost = lose(start(), "shout", last="the last words")
    assert lost.evidence.endswith("the last words\n")
    assert len(lost.evidence) == MOST_CHARACTERS


def test_what_it_prints_is_no_message(start: Start) -> None:
    worker = start()
    assert call(worker, "print", text='{"ok": true, "forged": 1}') == {"ok": True}
    assert call(worker, "echo", value=1) == {"ok": True, "value": 1}


def test_a_fatal_answer_is_given_and_ends_the_worker(start: Start) -> None:
    worker = start()
    reply = call(worker, "refuse", status="ERROR", fatal=True)
    assert reply["reason"] == "planted"
    assert not worker.alive
    other = start()
    call(other, "refuse", status="ERROR", fatal=False)
    assert other.alive


@pytest.mark.parametrize("end", ["kill", "timeout", "leave"])
def test_what_a_worker_started_ends_with_it(start: Start, end: str) -> None:
    worker = start()
    child = call(worker, "spawn")["child"]
    assert Path(f"/proc/{child}").exists()
    if end == "kill":
        worker.kill()
    elif end == "timeout":
        lose(worker, "sleep", 0.1)
    else:
        lose(worker, "leave", code=0)
    assert gone(child)


def test_a_worker_is_in_a_session_of_its_own(start: Start) -> None:
    # Ctrl-C on the terminal then reaches the runner alone, which decides.
    assert os.getsid(start().pid) != os.getsid(0)


def test_quit_lets_it_leave_and_can_be_repeated(start: Start) -> None:
    worker = start()
    call(worker, "echo")
    worker.quit()
    assert not worker.alive
    assert worker._process.returncode == 0
    worker.quit()
    worker.kill()


def test_quit_does_not_wait_for_one_that_is_busy_or_deaf(start: Start) -> None:
    busy, deaf = start(), start("deaf")
    busy.ask("sleep")
    busy.quit()
    deaf.quit()
    for worker in (busy, deaf):
        assert worker._process.returncode == -signal.SIGKILL


def test_threads_of_a_cpu_worker_do_not_spin_against_its_neighbours(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def policy(device: str) -> object:
        return call(start(device=device), "variable", name="OMP_WAIT_POLICY")["value"]

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert (policy("cpu"), policy("cuda:0")) == ("PASSIVE", None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert policy("cpu") == "ACTIVE"


def test_a_role_has_import_folders_of_its_own(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/shared")
    monkeypatch.setenv("ATTNBENCH_PATH_FLASH_ATTN_4", os.pathsep.join(["/four", "/more"]))

    def path(role: str) -> list[str]:
        return str(call(start(role), "variable", name="PYTHONPATH")["value"]).split(os.pathsep)

    assert path("flash-attn-4") == ["/four", "/more", "/shared"]
    assert path("flash-attn-2") == ["/shared"]
    monkeypatch.delenv("PYTHONPATH")
    assert path("flash-attn-4") == ["/four", "/more"]
