"""What the rounds of one recorded cell say, as logarithms: a ratio is a difference of them.

A round says the median of its samples. On a CPU it says the fastest: there a sample is host time, to which the
neighbours of a shared core only ever add. Five pairs of equal processes beside eight busy ones lay 0.8 to 1.3% apart
(standard deviation) by the fastest, 1.2 to 10% by the median; on a calm machine 0.3 to 0.4% by either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnbench.harness.report.stats import Array, round_medians
from attnbench.harness.run.record import Cell


@dataclass(frozen=True)
class RoundLogs:
    """ms: log of each round's time, (rounds,). cycles: the same in SM clock cycles, None where the clock was not
    read in every round.
    """

    ms: Array
    cycles: Array | None

    @classmethod
    def of(cls, cell: Cell) -> RoundLogs:
        """Of a cell that was timed."""
        assert cell.timing is not None
        fastest = cell.device == "cpu"
        ms = np.log(
            [min(turn) for turn in cell.timing.rounds] if fastest else round_medians(cell.timing.rounds)
        )
        clocks = [mhz or math.nan for mhz in cell.timing.sm_mhz]
        known = len(clocks) == len(ms) and not np.isnan(clocks).any()
        return cls(ms, ms + np.log(clocks) if known else None)
