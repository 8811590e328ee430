"""What a gate found: an answer a cell, and the exit code that they add up to. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnbench.harness.gate.calibration import Calibration


class GateExit(IntEnum):
    """Exit codes of ``bench gate``, never renumbered."""

    OK = 0  # no regression; a faster cell never fails
    REGRESSION = 1  # some cell is slower than the threshold allows
    USAGE = 2  # bad option, REF or suite; a side that does not install
    NOTHING = 3  # not one cell could be compared
    WRONG = 4  # head answers wrongly, or no longer answers what base answers
    UNFIT = 5  # the machine is throttled, shared, or too noisy for the threshold
    UNSURE = 6  # the budget ended before every cell was decided


class Answer(StrEnum):
    """What is known of one cell; the first four are ``decision.Verdict``."""

    FASTER = "FASTER"
    SLOWER = "SLOWER"
    SAME = "SAME"
    UNSURE = "UNSURE"
    WRONG = "WRONG"  # head was judged INCORRECT
    LOST = "LOST"  # base answers, head does not
    SKIPPED = "SKIPPED"  # base does not answer, so there is nothing to compare with


TIMED = (Answer.FASTER, Answer.SLOWER, Answer.SAME, Answer.UNSURE)
BROKEN = (Answer.WRONG, Answer.LOST)


@dataclass(frozen=True)
class CellResult:
    """change: head's time over base's, minus 1; low and high hold for all cells and looks together and decide the
    answer; spread is the 95% bootstrap interval of this cell by itself; cycles is the change in SM clock cycles, where
    the clock was read. All relative, None where not measured. base_ms, head_ms: of all of a side's rounds
    (estimators.py).
    units: what was resampled, ``5 pairs``. detectable: smallest slowdown that the calibration would find here.
    """

    impl: str
    problem: str
    answer: Answer
    reason: str = ""
    change: float | None = None
    low: float | None = None
    high: float | None = None
    spread: tuple[float, float] | None = None
    cycles: float | None = None
    base_ms: float | None = None
    head_ms: float | None = None
    units: str = ""
    detectable: float | None = None

    @property
    def broken(self) -> bool:
        return self.answer in BROKEN


@dataclass(frozen=True)
class GateResult:
    """base, head: the sides in words. unfit: why this machine cannot tell, one line each. calibration: None where the
    gate ended before it. notes: what a reader must know to weigh the figures.
    """

    base: str
    head: str
    device: str
    command: Sequence[str]
    threshold: float
    alpha: float
    seconds: float
    cells: Sequence[CellResult]
    calibration: Calibration | None = None
    unfit: Sequence[str] = ()
    notes: Sequence[str] = field(default=())

    def exit_code(self, *, unsure_passes: bool = False) -> GateExit:
        """A wrong answer says more than any time; where the machine is unfit, times say nothing."""
        answers = {cell.answer for cell in self.cells}
        if answers & set(BROKEN):
            return GateExit.WRONG
        if not answers & set(TIMED):
            return GateExit.NOTHING
        if self.unfit:
            return GateExit.UNFIT
        if Answer.SLOWER in answers:
            return GateExit.REGRESSION
        if Answer.UNSURE in answers and not unsure_passes:
            return GateExit.UNSURE
        return GateExit.OK


def calibration_in_words(found: Calibration) -> str:
    """One line: how often an unchanged kernel would fail, and what would be seen."""
    rate, smallest = found.false_positives, found.smallest
    sees = (
        "sees no slowdown in every cell"
        if smallest is None
        else f"sees a slowdown of {smallest:.2%} in any cell"
    )
    return (
        f"calibration: {rate.count} false positives in {rate.of} gates replayed from {found.drawn_from} (at most "
        f"{rate.most:.1%}), {found.unsure.share:.0%} unsure; {sees}, four times in five"
    )


def too_noisy(found: Calibration) -> str:
    """Why these rounds cannot carry the threshold; empty if they can."""
    if found.fit:
        return ""
    share = f"{found.unsure.share:.0%} of gates on an unchanged kernel would end UNSURE"
    return f"too noisy for a threshold of {found.design.threshold:.2%}: {share}"
