"""A run: what is done is skipped, devices share the rest, and however it ends nothing false is recorded.

Its worker processes are stand-ins; test_faults.py and test_kill_and_resume.py have the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.run import journal, process, runner
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.gpus import Gpu
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.progress import QuietProgress
from attnbench.harness.run.record import Cell, Group, Record, Status
from attnbench.harness.run.runner import RunOptions, RunSummary


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(Path(__file__).parent / "stand_in_worker.py"))
    monkeypatch.setattr(process, "GRACE_S", 0.5)


class Told(QuietProgress):
    """Keeps what it is told; ``react`` is called with each phase's name."""

    def __init__(self, react: Callable[[str], object] = lambda phase: None) -> None:
        self.groups: list[tuple[str, int, int]] = []
        self.cells: list[Cell] = []
        self.done: list[Group] = []
        self.notes: list[str] = []
        self.react = react

    def group_started(self, plan: GroupPlan, index: int, total: int) -> None:
        self.groups.append((plan.group, index, total))

    def phase(self, name: str) -> None:
        self.react(name)

    def cell_done(self, cell: Cell) -> None:
        self.cells.append(cell)

    def group_done(self, group: Group) -> None:
        self.done.append(group)

    def note(self, text: str) -> None:
        self.notes.append(text)


def plans(count: int, impls: Sequence[str] = ("a",)) -> list[GroupPlan]:
    problems = [Problem(batch=1, heads=1, seqlen_q=number + 1, head_dim=8) for number in range(count)]
    return [GroupPlan("s", "c", "w", p.group_key, (p,), tuple(impls), "normal", 3) for p in problems]


def run(posed: list[GroupPlan], output: Path, told: Told | None = None, **changes: Any) -> RunSummary:
    options: dict[str, Any] = {"devices": ("cpu",), "rounds": 2, "samples": 2, "time_limit_s": 30.0}
    return runner.run(posed, RunOptions(output=output, **options | changes), told or Told())


def records(output: Path, kind: type[Record]) -> list[Any]:
    found, problems = journal.read(output)
    assert not problems
    return [record for record in found if isinstance(record, kind)]


def no_worker_left(planted: Any) -> bool:
    return planted.workers_of(os.getpid()) == []


# ---- to the end -------------------------------------------------------------------------------------------


def test_a_run_leaves_its_plan_environment_and_records(tmp_path: Path, planted: Any) -> None:
    posed, told = plans(3, impls=("a", "wrong", "absent")), Told()
    summary = run(posed, tmp_path / "run", told, seed=5, command=("bench", "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "environment.json", "plan.json", "records.jsonl",
    ]  # fmt: skip
    assert [cell.id for cell in records(tmp_path / "run", Cell)] == [
        name for plan in posed for name in plan.cells
    ]
    assert summary.counts == {Status.OK: 3, Status.INCORRECT: 3, Status.UNAVAILABLE: 3}
    assert (summary.groups, summary.skipped, summary.failed) == (3, 0, True)
    document = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [GroupPlan.from_json(plan) for plan in document["plans"]] == posed
    assert document["options"]["seed"] == 5
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["seed"], environment["devices"][0]["name"]) == (5, "stand-in")
    assert told.groups == [(plan.group, index, 3) for index, plan in enumerate(posed, 1)]
    assert [cell.id for cell in told.cells] == [cell.id for cell in records(tmp_path / "run", Cell)]
    assert [group.group for group in told.done] == [plan.group for plan in posed]
    assert no_worker_left(planted)


def test_the_phases_of_a_group_add_up_to_its_time(tmp_path: Path) -> None:
    summary = run(plans(2), tmp_path / "run")
    groups = records(tmp_path / "run", Group)
    assert {"start", "prepare", "oracle", "judge", "time fwd", "other"} <= set(groups[0].phases)
    total = sum(sum(group.phases.values()) for group in groups)
    assert sum(summary.phases.values()) == pytest.approx(total, rel=1e-3)
    assert total <= summary.wall_s


def test_workers_stay_for_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    real = process.Worker.__init__

    def counting(worker: process.Worker, role: str, *arguments: Any) -> None:
        started.append(role)
        real(worker, role, *arguments)

    monkeypatch.setattr(process.Worker, "__init__", counting)
    run(plans(4, impls=("a", "b")), tmp_path / "run")
    assert sorted(started) == ["a", "b", "referee"]


def test_complete_groups_are_skipped_and_nothing_is_started_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posed = plans(4)
    run(posed[:2], tmp_path / "run")
    told = Told()
    summary = run(posed, tmp_path / "run", told)
    assert (summary.groups, summary.skipped) == (2, 2)
    assert [group for group, _, _ in told.groups] == [plan.group for plan in posed[2:]]
    assert [cell.id for cell in records(tmp_path / "run", Cell)] == [
        name for plan in posed for name in plan.cells
    ]
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["resumed"]) == 1
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # could not start a worker
    summary = run(posed, tmp_path / "run")
    assert (summary.groups, summary.skipped, summary.counts, summary.failed) == (0, 4, {}, False)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


def test_a_torn_record_is_named_and_its_group_run_again(tmp_path: Path) -> None:
    posed, told = plans(2), Told()
    run(posed, tmp_path / "run")
    part = tmp_path / "run" / "records.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    summary = run(posed, tmp_path / "run", told)
    assert (summary.groups, summary.skipped) == (1, 1)
    assert [note[:27] for note in told.notes] == [
        "set aside: records.jsonl:3:",
        "set aside: records.jsonl:4:",
    ]
    assert len(records(tmp_path / "run", Cell)) == 2


def test_a_worker_that_leaves_costs_its_cells_and_the_run_goes_on(tmp_path: Path, planted: Any) -> None:
    summary = run(plans(5, impls=("leaves_in_judge", "a")), tmp_path / "run")
    assert summary.counts == {Status.CRASHED: 5, Status.OK: 5}
    reasons = [cell.reasons[0] for cell in records(tmp_path / "run", Cell) if cell.status is Status.CRASHED]
    assert ["not started again" in reason for reason in reasons] == [False] * 3 + [True] * 2
    assert no_worker_left(planted)


def test_fail_fast_ends_after_the_group_that_failed(tmp_path: Path) -> None:
    posed = plans(3, impls=("a", "raises_in_judge"))
    assert run(posed, tmp_path / "all").counts == {Status.OK: 3, Status.ERROR: 3}
    summary = run(posed, tmp_path / "fast", fail_fast=True)
    assert summary.counts == {Status.OK: 1, Status.ERROR: 1}
    assert len(records(tmp_path / "fast", Group)) == 1  # what was measured is kept


def test_fail_fast_is_not_for_what_is_an_answer(tmp_path: Path) -> None:
    summary = run(plans(3, impls=("a", "absent")), tmp_path / "run", fail_fast=True)
    assert summary.counts == {Status.OK: 3, Status.UNAVAILABLE: 3}
    assert not summary.failed


# ---- several devices --------------------------------------------------------------------------------------


class Meeting:
    """Replaces ``GroupRun.execute``: each device waits in its first group until every device has one."""

    def __init__(self, devices: int) -> None:
        self.threads: set[int] = set()
        self._barrier = threading.Barrier(devices, timeout=60)
        self._execute = runner.GroupRun.execute

    def __call__(self, group: runner.GroupRun) -> tuple[list[Cell], Group]:
        if threading.get_ident() not in self.threads:
            self.threads.add(threading.get_ident())
            self._barrier.wait()
        return self._execute(group)


def on_two(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    meeting = Meeting(2)

    def execute(group: runner.GroupRun) -> tuple[list[Cell], Group]:  # a method, as an instance would not be
        return meeting(group)

    monkeypatch.setattr(runner.GroupRun, "execute", execute)
    return meeting


def test_two_devices_share_the_groups(tmp_path: Path, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    posed, told, meeting = plans(8), Told(), on_two(monkeypatch)
    summary = run(posed, tmp_path / "run", told, devices=("cpu", "cpu"))
    assert len(meeting.threads) == 2
    assert summary.groups == 8
    assert sorted(cell.id for cell in records(tmp_path / "run", Cell)) == sorted(
        name for plan in posed for name in plan.cells
    )
    assert sorted(index for _, index, _ in told.groups) == list(range(1, 9))
    assert no_worker_left(planted)


def test_fail_fast_ends_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_two(monkeypatch)
    run(plans(20, impls=("raises_in_judge",)), tmp_path / "run", devices=("cpu", "cpu"), fail_fast=True)
    assert len(records(tmp_path / "run", Group)) == 2


def test_an_error_on_one_device_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, killed, ran = threading.Event(), threading.Event(), []
    kill, real = runner.Crew.kill, runner.GroupRun.execute

    def execute(group: runner.GroupRun) -> tuple[list[Cell], Group]:
        if group._crew.device == "cpu:1":
            failed.set()
            raise RunError("planted", Exit.MACHINE)
        failed.wait(30)
        ran.append(group.plan.group)
        killed.wait(3)  # the run must not wait for this device's groups before it hears of the error
        return real(group)

    def killing(crew: runner.Crew) -> None:
        kill(crew)
        killed.set()

    monkeypatch.setattr(runner.GroupRun, "execute", execute)
    monkeypatch.setattr(runner.Crew, "kill", killing)
    with pytest.raises(RunError, match="planted"):
        run(plans(3), tmp_path / "run", devices=("cpu", "cpu:1"))
    assert len(ran) <= 1  # none where the error came before its first group


# ---- ended early ------------------------------------------------------------------------------------------


def raise_interrupt(phase: str) -> None:
    if phase == "judge":
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_worker_and_no_open_group(tmp_path: Path, planted: Any) -> None:
    posed = plans(3, impls=("a", "b"))
    run(posed[:1], tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run(posed, tmp_path / "run", Told(raise_interrupt))
    assert no_worker_left(planted)
    assert [group.group for group in records(tmp_path / "run", Group)] == [posed[0].group]
    assert run(posed, tmp_path / "run").skipped == 1
    assert len(records(tmp_path / "run", Cell)) == 6


def test_ctrl_c_with_two_devices_records_no_loss_of_its_own_making(
    tmp_path: Path, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_two(monkeypatch)
    judging = threading.Semaphore(0)

    def both_judging(phase: str) -> None:
        if phase == "judge":
            judging.release()

    def interrupt() -> None:
        for _ in range(2):
            judging.acquire()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(
            plans(4, impls=("sleeps_in_judge", "a")),
            tmp_path / "run",
            Told(both_judging),
            devices=("cpu", "cpu"),
        )
    assert no_worker_left(planted)
    assert records(tmp_path / "run", Cell) == []


def test_an_output_that_cannot_be_written_ends_the_run_before_it_starts(tmp_path: Path, planted: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to") as refused:
        run(plans(1), tmp_path / "file" / "run")
    assert refused.value.exit_code == Exit.MACHINE
    assert no_worker_left(planted)


def test_a_disk_that_fills_ends_the_run_and_its_workers(
    tmp_path: Path, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    posed = plans(3)
    appended = journal.Journal.append

    def full_at_the_second(self: journal.Journal, cells: list[Cell], group: Group) -> None:
        if self.groups:
            raise RunError("disk full", Exit.MACHINE)
        appended(self, cells, group)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", full_at_the_second)
        with pytest.raises(RunError, match="disk full"):
            run(posed, tmp_path / "run")
    assert no_worker_left(planted)
    assert run(posed, tmp_path / "run").skipped == 1


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    opened = journal.Journal(tmp_path / "run")
    with pytest.raises(RunError, match="another run is writing"):
        run(plans(1), tmp_path / "run")
    opened.close()
    assert run(plans(1), tmp_path / "run").groups == 1


def test_a_device_that_another_run_holds_is_refused_before_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNBENCH_LOCK_DIR", str(tmp_path))
    monkeypatch.setattr(
        runner,
        "visible_gpus",
        lambda: [Gpu("card", "uuid-0", (9, 0), "1"), Gpu("card", "uuid-1", (9, 0), "1")],
    )
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no worker could be started
    with runner.device_lock("uuid-1"), pytest.raises(RunError, match="uuid-1 is in use by another run"):
        run(plans(1), tmp_path / "run", devices=("cuda:1",))


# ---- scratch ----------------------------------------------------------------------------------------------


def test_only_scratch_of_runs_that_are_gone_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        f"{runner.SCRATCH}{dead.pid}-abc": False,
        f"{runner.SCRATCH}{os.getpid()}-abc": True,
        f"{runner.SCRATCH}notes-abc": True,
        f"another-{dead.pid}-abc": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "judged.pt").write_text("x")
    runner._sweep(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_run_sweeps_before_it_starts_and_leaves_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    stale = tmp_path / f"{runner.SCRATCH}999999999-abc"
    stale.mkdir()
    seen: list[list[str]] = []
    watch = Told(lambda phase: seen.append([path.name for path in tmp_path.glob(f"{runner.SCRATCH}*")]))
    run(plans(1), tmp_path / "run", watch)
    assert all(stale.name not in names for names in seen[1:])
    assert [len(names) for names in seen[-3:]] == [1, 1, 1]
    assert list(tmp_path.glob(f"{runner.SCRATCH}*")) == []
    with pytest.raises(KeyboardInterrupt):
        run(plans(2), tmp_path / "run", Told(raise_interrupt))
    assert list(tmp_path.glob(f"{runner.SCRATCH}*")) == []


# ---- options ----------------------------------------------------------------------------------------------


def test_the_mode_names_what_was_timed() -> None:
    modes = {
        RunOptions(("cpu",), Path(), hot=hot, cudagraph=graph).mode
        for hot in (False, True)
        for graph in (False, True)
    }
    assert modes == {"cold", "hot", "cold+graph", "hot+graph"}
