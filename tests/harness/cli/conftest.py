"""``bench`` in this process, with measuring and drawing replaced: tested are parsing, planning and printing."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.registry import Entry
from attnbench.harness.run import runner
from attnbench.harness.run.gpus import Gpu
from attnbench.harness.run.journal import Journal
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Group, Judgement, Status, TensorError

RIGHT = Judgement({"out": TensorError(0.0, 0.0, 1.0, 1.0, ok=True)}, 1, 1)
WRONG = Judgement({"out": TensorError(2.0, 1.0, 1.0, 1.0, ok=False, first_bad=(0, 0, 0, 0))}, 1, 1)
JUDGED = {Status.OK: RIGHT, Status.INCORRECT: WRONG}


@dataclass
class Bench:
    """Calls ``bench`` and keeps what reached the runner and the report. answer: the status of a cell, by its id."""

    answer: Callable[[str], Status] = lambda _: Status.OK
    plans: list[GroupPlan] = field(default_factory=list)
    options: runner.RunOptions | None = None
    reported: dict[str, Any] = field(default_factory=dict)
    failure: BaseException | None = None

    def __call__(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="bench")

    def run(
        self, plans: list[GroupPlan], options: runner.RunOptions, progress: runner.Progress
    ) -> runner.RunSummary:
        self.plans, self.options = plans, options
        if self.failure:
            raise self.failure
        journal = Journal(options.output)
        document = {"plans": [plan.to_json() for plan in plans], "options": options.to_json()}
        (options.output / "plan.json").write_text(json.dumps(document))
        counts: Counter[str] = Counter()
        fresh = [plan for plan in plans if plan.group not in journal.groups]
        for index, plan in enumerate(fresh, 1):
            progress.group_started(plan, index, len(fresh))
            progress.phase("judge")
            cells = [self._cell(plan, impl, problem) for impl in plan.impls for problem in plan.problems]
            group = Group("run", plan.suite, plan.case, plan.why, plan.group, "cpu", plan.cells, plan.seed)
            journal.append(cells, group)
            for cell in cells:
                counts[cell.status] += 1
                progress.cell_done(cell)
            progress.group_done(group)
        journal.close()
        return runner.RunSummary(
            options.output,
            dict(counts),
            {"judge": 3.0, "time": 1.0},
            4.0,
            len(fresh),
            len(plans) - len(fresh),
        )

    def _cell(self, plan: GroupPlan, impl: str, problem: Any) -> Cell:
        status = self.answer(f"{impl}/{problem.key}")
        reasons = [] if status is Status.OK else ["planted"]
        return Cell(
            "run", plan.suite, plan.case, plan.group, impl, "1", "cpu", problem, status, reasons,
            judgement=JUDGED.get(status),
        )  # fmt: skip

    def write_report(self, folder: Path, **keywords: Any) -> list[Path]:
        self.reported = {"folder": folder, **keywords}
        return [folder / "tables.md"]


@pytest.fixture
def gpus() -> list[Gpu]:
    """GPUs that the machine seems to have; append to it."""
    return []


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: list[Gpu]) -> Bench:
    bench = Bench()
    names = ("standard", "sdpa-math", "sdpa-flash")
    found = {name: [Entry(name, f"plugins:{name}", "planted", "1.0")] for name in names}
    report = types.ModuleType("attnbench.harness.report.write")
    report.write_all = report.write_report = report.write_plots = bench.write_report  # type: ignore[attr-defined]
    monkeypatch.setattr(runner, "run", bench.run)
    for place in ("attnbench.harness.cli.run.entries", "attnbench.harness.registry.entries"):
        monkeypatch.setattr(place, lambda approximate=False: {} if approximate else found)
    monkeypatch.setattr("attnbench.harness.cli.run.visible_gpus", lambda: gpus)
    monkeypatch.setattr("attnbench.harness.cli.show.visible_gpus", lambda: gpus)
    monkeypatch.setitem(sys.modules, "attnbench.harness.report.write", report)
    monkeypatch.chdir(tmp_path)
    return bench
