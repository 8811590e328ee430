"""What the rounds of one recorded cell say, as logarithms: a ratio is a difference of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnbench.harness.gate.estimators import Estimator, estimator_on
from attnbench.harness.report.stats import Array
from attnbench.harness.run.record import Cell


@dataclass(frozen=True)
class RoundLogs:
    """ms: log of each round's time, (rounds,). cycles: the same in SM clock cycles, None where the clock was not
    read in every round. estimator: what made times of samples.
    """

    ms: Array
    cycles: Array | None
    estimator: Estimator

    @classmethod
    def of(cls, cell: Cell) -> RoundLogs:
        """Of a cell that was timed."""
        assert cell.timing is not None
        estimator = estimator_on(cell.device)
        ms = np.log(estimator.rounds(cell.timing.rounds))
        clocks = [mhz or math.nan for mhz in cell.timing.sm_mhz]
        known = len(clocks) == len(ms) and not np.isnan(clocks).any()
        return cls(ms, ms + np.log(clocks) if known else None, estimator)
