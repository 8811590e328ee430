"""What a user sees while a run goes on: a bar on a terminal, plain lines when piped, nothing when asked to be quiet.

All of it is talk and goes to stderr. Each class here is a ``runner.Progress`` and a context manager.
"""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Self

from attnbench.harness.run.record import Status

if TYPE_CHECKING:
    from rich.console import Console

    from attnbench.harness.run.plan import GroupPlan
    from attnbench.harness.run.record import Cell, Group

# Answers that a user wants to hear of at once; the others are counted.
NOTEWORTHY = (Status.INCORRECT, Status.CRASHED, Status.TIMEOUT, Status.ERROR, Status.OOM)


def make_progress(*, quiet: bool = False, verbose: bool = False) -> QuietProgress:
    """The progress fit for stderr as it is: QuietProgress, LineProgress, or BarProgress on a terminal."""
    if quiet:
        return QuietProgress()
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return BarProgress(console, verbose) if console.is_terminal else LineProgress(console, verbose)


class QuietProgress:
    """Says nothing; the records say it all."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def group_started(self, plan: GroupPlan, index: int, total: int) -> None:
        """``index`` counts the groups of this call from 1."""

    def phase(self, name: str) -> None:
        pass

    def cell_done(self, cell: Cell) -> None:
        pass

    def group_done(self, group: Group) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class LineProgress(QuietProgress):
    """One line a group, and one for each cell that failed; with ``verbose``, one for every cell and phase."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        self.console = console
        self.verbose = verbose
        # Groups of several devices run side by side, so each is looked up by its name.
        self._opened: dict[str, tuple[int, int, float]] = {}
        self._answers: dict[str, Counter[str]] = {}

    def group_started(self, plan: GroupPlan, index: int, total: int) -> None:
        self._opened[plan.group] = (index, total, time.monotonic())
        self._answers[plan.group] = Counter()

    def phase(self, name: str) -> None:
        if self.verbose:
            self._say(f"  {name}")

    def cell_done(self, cell: Cell) -> None:
        self._answers.setdefault(cell.group, Counter())[cell.status] += 1
        if self.verbose or cell.status in NOTEWORTHY:
            reason = f": {cell.reasons[0]}" if cell.reasons else _fastest(cell)
            self._say(f"  {cell.status} {cell.id}{reason}")

    def group_done(self, group: Group) -> None:
        index, total, since = self._opened.pop(group.group, (0, 0, time.monotonic()))
        answers = ", ".join(
            f"{count} {status}" for status, count in self._answers.pop(group.group, {}).items()
        )
        self._say(f"[{index}/{total}] {group.group}: {answers} ({time.monotonic() - since:.1f} s)")

    def note(self, text: str) -> None:
        self._say(text)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)


class BarProgress(LineProgress):
    """A bar with the time left, the group and the phase; failures and notes scroll by above it."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        super().__init__(console, verbose)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._group = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def group_started(self, plan: GroupPlan, index: int, total: int) -> None:
        super().group_started(plan, index, total)
        self._group = plan.group
        self._bar.update(self._task, total=total, description=plan.group)

    def phase(self, name: str) -> None:
        self._bar.update(self._task, description=f"{self._group} · {name}")

    def group_done(self, group: Group) -> None:
        if self.verbose:
            super().group_done(group)
        self._bar.advance(self._task)


def _fastest(cell: Cell) -> str:
    return f": {min(map(min, cell.timing.rounds)):.3f} ms at best" if cell.timing else ""
