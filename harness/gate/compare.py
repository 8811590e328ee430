"""Two recorded runs, or two implementations of one run, cell by cell: ratios with intervals, in ms and in cycles.

Implementations of one run took turns in the same rounds, so their ratio is taken round by round. Two runs share
nothing but the problem: their rounds are resampled apart. Intervals are 95% bootstrap intervals over rounds, each
cell by itself; ``bench gate`` is the place for a verdict on many cells at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from attnbench.harness.gate.decision import Bounds, Verdict
from attnbench.harness.gate.pairs import CellKey
from attnbench.harness.gate.rounds import RoundLogs
from attnbench.harness.report import stats
from attnbench.harness.report.load import Run
from attnbench.harness.report.stats import Array
from attnbench.harness.run.errors import RunError, unknown_word
from attnbench.harness.run.record import Cell

ABSENT = "ABSENT"
Key = TypeVar("Key")


@dataclass(frozen=True)
class Change:
    """B against A in one cell; ms and cycles are B's over A's as log-ratios, None where not both were timed.

    statuses: of A and B, ABSENT for a cell that a side does not hold.
    """

    key: CellKey
    statuses: tuple[str, str]
    reason: str = ""
    a_ms: float | None = None
    b_ms: float | None = None
    ms: Bounds | None = None
    cycles: Bounds | None = None

    def verdict(self, margin: float) -> Verdict | None:
        return self.ms.verdict(margin) if self.ms else None

    def changed(self, margin: float) -> bool:
        """Whether it is surely faster or slower by the margin, or its status is another."""
        return self.statuses[0] != self.statuses[1] or self.verdict(margin) in (
            Verdict.FASTER,
            Verdict.SLOWER,
        )


def runs(a: Run, b: Run, only: Sequence[str] = ()) -> list[Change]:
    """The same implementations in two runs; every cell of either, in A's order."""
    for name in only:
        if name not in (known := {cell.impl for run in (a, b) for cell in run.cells}):
            raise RunError(f"--only: {unknown_word('implementation', name, sorted(known))}")
    cells = [
        {CellKey(c.impl, c.problem.key): c for c in run.cells if not only or c.impl in only} for run in (a, b)
    ]
    return [_change(key, cells[0].get(key), cells[1].get(key), paired=False) for key in _union(*cells)]


def implementations(run: Run, a: str, b: str) -> list[Change]:
    """Two implementations in one run, by problem."""
    for name in (a, b):
        if name not in (known := {cell.impl for cell in run.cells}):
            raise RunError(unknown_word("implementation", name, sorted(known)))
    cells = [{c.problem.key: c for c in run.cells if c.impl == name} for name in (a, b)]
    return [
        _change(CellKey(f"{b} / {a}", problem), cells[0].get(problem), cells[1].get(problem), paired=True)
        for problem in _union(*cells)
    ]


def _union(a: Iterable[Key], b: Iterable[Key]) -> list[Key]:
    return list(dict.fromkeys([*a, *b]))


def _change(key: CellKey, a: Cell | None, b: Cell | None, *, paired: bool) -> Change:
    statuses = str(a.status) if a else ABSENT, str(b.status) if b else ABSENT
    reason = "; ".join(reason for cell in (a, b) if cell for reason in cell.reasons[:1])
    if a is None or b is None or a.timing is None or b.timing is None:
        return Change(key, statuses, reason)
    one, other = RoundLogs.of(a), RoundLogs.of(b)
    cycles = None
    if one.cycles is not None and other.cycles is not None:
        cycles = _interval(one.cycles, other.cycles, paired=paired)
    return Change(
        key,
        statuses,
        reason,
        a_ms=math.exp(np.median(one.ms)),
        b_ms=math.exp(np.median(other.ms)),
        ms=_interval(one.ms, other.ms, paired=paired),
        cycles=cycles,
    )


def _interval(a: Array, b: Array, *, paired: bool) -> Bounds:
    """Median of b - a, and where 95% of its bootstrap lie; open where a side has one round."""
    if paired:
        rounds = min(len(a), len(b))
        both = b[:rounds] - a[:rounds]
        value, drawn = float(np.median(both)), stats.resampled_medians(both)
    else:
        value = float(np.median(b) - np.median(a))
        drawn = stats.resampled_medians(b, 1) - stats.resampled_medians(a, 0)
    if min(len(a), len(b)) < 2:
        return Bounds(value, -math.inf, math.inf)
    return Bounds(value, *stats.interval(drawn))
