"""What is said while a run goes on, on a terminal and piped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from attnbench.harness.problem import Problem
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.progress import BarProgress, LineProgress, QuietProgress, make_progress
from attnbench.harness.run.record import Cell, Group, Judgement, Status, TensorError, Timing

PROBLEM = Problem(batch=1, heads=1, seqlen_q=8, head_dim=8)
PLAN = GroupPlan("s", "c", "w", PROBLEM.group_key, (PROBLEM,), ("[a]", "b"), "normal", 0)
GROUP = Group("r", "s", "c", "w", PLAN.group, "cpu", PLAN.cells, 0)
NAMES = {"run": "r", "suite": "s", "case": "c", "group": PLAN.group, "impl_version": "1", "device": "cpu"}
RIGHT = Judgement({"out": TensorError(0.0, 0.0, 1.0, 1.0, ok=True)}, 1, 1)
GOOD = Cell(
    **NAMES,
    impl="[a]",
    problem=PROBLEM,
    status=Status.OK,
    judgement=RIGHT,
    timing=Timing([[2.0, 1.5]], "cold"),
)
CRASHED = Cell(**NAMES, impl="b", problem=PROBLEM, status=Status.CRASHED, reasons=["died of SIGSEGV"])


def tell(progress: QuietProgress) -> None:
    with progress:
        progress.note("a note with [brackets]")
        progress.group_started(PLAN, 3, 7)
        progress.phase("judge")
        progress.cell_done(GOOD)
        progress.cell_done(CRASHED)
        progress.group_done(GROUP)


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, highlight=False, soft_wrap=True, width=200), file


def test_piped_it_is_a_line_a_group_and_one_for_each_failure() -> None:
    where, file = console(terminal=False)
    tell(LineProgress(where))
    note, crash, group = file.getvalue().splitlines()
    assert note == "a note with [brackets]"
    assert crash == f"  CRASHED b/{PROBLEM.key}: died of SIGSEGV"
    assert group.startswith(f"[3/7] {PLAN.group}: 1 OK, 1 CRASHED (")


def test_verbose_adds_every_cell_and_phase() -> None:
    where, file = console(terminal=False)
    tell(LineProgress(where, verbose=True))
    lines = file.getvalue().splitlines()
    assert "  judge" in lines
    assert f"  OK [a]/{PROBLEM.key}: 1.500 ms at best" in lines


def test_on_a_terminal_it_is_a_bar_with_the_group_and_the_phase() -> None:
    where, file = console(terminal=True)
    progress = BarProgress(where)
    with progress:
        progress.group_started(PLAN, 1, 2)
        progress.phase("judge")
        (task,) = progress._bar.tasks
        assert (task.total, task.completed, task.description) == (2, 0, f"{PLAN.group} · judge")
        progress.cell_done(CRASHED)
        progress.group_done(GROUP)
        assert task.completed == 1
    assert "CRASHED b/" in file.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tell(make_progress(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_talk_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    tell(make_progress())
    out, err = capsys.readouterr()
    assert out == ""
    assert "[3/7]" in err
