"""When a cell is slower, faster or the same, and when that cannot be said yet: pure functions of log-ratios.

The estimate is the mean over process pairs of what each pair says (estimators.py). The interval is Student's over
pairs: at five pairs a percentile bootstrap reaches no further than from the lowest pair to the highest, and covers
90% where 99% was asked for (tests/harness/gate/test_decision.py). Bootstrap intervals, over pairs and the flips
within them, are shown beside it for what they are good at: the spread of one cell by itself.

A verdict is a statement about the threshold: SLOWER when the whole interval lies beyond it, SAME when the whole
interval lies within it, and UNSURE otherwise. Significance and practical size stay apart: ``alpha`` is how often
anything said of an unchanged gate may be wrong, ``threshold`` how large a change matters. All cells at all looks
share ``alpha``, each look at each cell having an equal part of it: by the union bound no dependence between cells,
or between a look and the next that holds the same pairs, can spend more, and stopping at the first look that decides
is paid for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from scipy import stats as scipy_stats

from attnbench.harness.gate.pairs import PairLogs
from attnbench.harness.report.stats import CONFIDENCE, RESAMPLES, SEED, Array


class Verdict(StrEnum):
    """What is known of a change at the threshold."""

    FASTER = "FASTER"
    SLOWER = "SLOWER"
    SAME = "SAME"
    UNSURE = "UNSURE"


@dataclass(frozen=True)
class Design:
    """How much is measured and how sure a verdict must be.

    threshold: smallest relative change of time that matters. alpha: chance that any verdict of the gate is wrong, over
    all ``cells`` and ``looks``. pairs: process pairs that each look adds.
    """

    cells: int
    threshold: float = 0.02
    alpha: float = 0.05
    looks: int = 3
    pairs: int = 5

    def __post_init__(self) -> None:
        if not (self.cells >= 1 and self.looks >= 1 and self.pairs >= 2):
            raise ValueError("a design has at least one cell, one look and two pairs a look")
        if not (0 < self.threshold < 1 and 0 < self.alpha < 1):
            raise ValueError("threshold and alpha lie between 0 and 1")

    @property
    def margin(self) -> float:
        """The threshold as a log-ratio; the same both ways, so that swapping the sides swaps the verdicts."""
        return math.log1p(self.threshold)

    @property
    def level(self) -> float:
        """What one interval of one cell at one look may be wrong with."""
        return self.alpha / (self.looks * self.cells)


@dataclass(frozen=True)
class Bounds:
    """A log-ratio and the interval that decides; inf where one pair tells no spread."""

    value: float
    low: float
    high: float

    def verdict(self, margin: float) -> Verdict:
        if self.low > margin:
            return Verdict.SLOWER
        if self.high < -margin:
            return Verdict.FASTER
        return Verdict.SAME if -margin < self.low and self.high < margin else Verdict.UNSURE


def bounds(values: Array, design: Design) -> Bounds:
    """Of one cell, from what its pairs say, (pairs,), at the level that the design allows one look at one cell."""
    mean, half = float(values.mean()), float(half_widths(values, design.level))
    return Bounds(mean, mean - half, mean + half)


def half_widths(values: Array, level: float) -> Array:
    """Half of Student's interval over the last axis, for (..., pairs); inf for a single pair."""
    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], math.inf)
    half: Array = _quantile(level, count) * values.std(axis=-1, ddof=1) / math.sqrt(count)
    return half


def bootstrap(logs: PairLogs) -> tuple[float, float]:
    """The central 95% of the estimate over pairs drawn anew, and the flips within each: one cell by itself, one look.
    Describes; does not decide.
    """
    rng = np.random.default_rng(SEED)
    drawn = logs.redrawn(rng.integers(0, logs.pairs, (RESAMPLES, logs.pairs)), rng)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn.mean(axis=-1), [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=256)
def _quantile(level: float, count: int) -> float:
    return float(scipy_stats.t.ppf(1 - level / 2, count - 1))
