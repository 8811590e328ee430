"""The kill matrix: which suite sees which mutant. Workers do the examining, so that a mutant may crash or hang."""

from __future__ import annotations

import contextlib
import queue
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from attnbench.harness.conform.candidate import Candidate
from attnbench.harness.conform.mutants import Mutant
from attnbench.harness.conform.mutants.examine import Sight
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.process import REFEREE, WorkerLost
from attnbench.harness.run.waiting import wait_for_all

EXAMINER = "attnbench.harness.conform.mutants.examiner:MutantExaminer"
TIME_LIMIT_S = 120.0


@dataclass
class Row:
    """One mutant: what the case that is there for it saw, what its control saw, and what every suite saw."""

    mutant: Mutant
    named: Sight
    control: Sight
    suites: dict[str, Sight] = field(default_factory=dict)

    @property
    def killed(self) -> bool:
        """By the case named for it, while the control passes."""
        return self.named.killed and not self.control.killed

    @property
    def seen_by(self) -> list[str]:
        return [suite for suite, sight in self.suites.items() if sight.killed]


def kill_matrix(
    mutants: Sequence[Mutant], suites: Sequence[str], device: str, jobs: int, tell: Callable[[Row], None]
) -> list[Row]:
    """A row a mutant, in their order. tell is called with each as it is done; RunError where no worker starts."""
    todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        todo.put(mutant)
    rows: dict[str, Row] = {}

    def work(folder: Path) -> None:
        # As a referee: no implementation of that name is looked for.
        with closing(Candidate(REFEREE, EXAMINER, device, folder, TIME_LIMIT_S)) as worker:
            while not todo.empty():
                try:
                    mutant = todo.get_nowait()
                except queue.Empty:
                    return
                rows[mutant.name] = _row(worker, mutant, suites)
                tell(rows[mutant.name])

    with (
        tempfile.TemporaryDirectory(prefix="attnbench-mutants-") as scratch,
        ThreadPoolExecutor(jobs) as pool,
    ):
        try:
            wait_for_all([pool.submit(work, Path(scratch)) for _ in range(min(jobs, len(mutants)))])
        finally:  # after Ctrl-C nobody begins another one
            with contextlib.suppress(queue.Empty):
                while True:
                    todo.get_nowait()
    return [rows[mutant.name] for mutant in mutants]


def _row(worker: Candidate, mutant: Mutant, suites: Iterable[str]) -> Row:
    def sees(where: str) -> Sight:
        try:
            worker.hello()
        except WorkerLost as lost:
            raise RunError(f"no worker for the mutants starts: {lost.reason}") from None
        try:
            reply = worker.ask("sees", mutant=mutant.name, where=where)
        except WorkerLost as lost:
            return Sight(where, str(lost.status), lost.reason, 0)
        if not reply["ok"]:
            raise RunError(f"mutant {mutant.name} before {where}: {reply['reason']}")
        return Sight(reply["case"], reply["verdict"], reply["reason"], reply["posed"])

    return Row(mutant, sees(mutant.killed_by), sees(mutant.control), {suite: sees(suite) for suite in suites})


def sole_witnesses(rows: Iterable[Row]) -> dict[str, list[str]]:
    """For each suite the mutants that no other suite saw."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if len(row.seen_by) == 1:
            found.setdefault(row.seen_by[0], []).append(row.mutant.name)
    return found
