"""Statistics over raw samples: pure functions, no record and no table in sight.

The unit of independence is the *round*: samples within one share a clock, a temperature and a neighbour, so a bootstrap
over single samples would claim far more than was measured. Every interval here resamples whole rounds, with one
fixed seed, and the statistic is the median of the rounds' medians. Figures of one group are compared round by
round: both sides of a ratio saw the same card, so what the card did in the meantime cancels.

With five rounds or fewer an interval reaches from the lowest round to the highest; its true confidence is then
1 - 2 / 2^n for n rounds (94% for five, 75% for three). One round has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rounds = Sequence[Sequence[float]]
Array = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 20


class Estimate(NamedTuple):
    """A median and its bootstrap interval; None where there is too little to tell."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def scaled(self, factor: float) -> Estimate:
        """Value and interval times ``factor`` > 0."""
        return Estimate(*(None if x is None else x * factor for x in self))

    def inverse(self, numerator: float = 1.0) -> Estimate:
        """``numerator`` / value, for positive figures: a time made a rate. The interval's ends swap."""
        value, low, high = (None if x is None else numerator / x for x in self)
        return Estimate(value, high, low)


def round_medians(rounds: Rounds) -> Array:
    """Median of each round, (rounds,); NaN for a round without samples, so that rounds keep their number."""
    return np.array([np.median(samples) if len(samples) else math.nan for samples in rounds], dtype=float)


def quantile(rounds: Rounds, q: float) -> float | None:
    """The q-quantile of all samples of all rounds: the spread a caller sees, not an uncertainty."""
    samples = [sample for samples in rounds for sample in samples]
    return float(np.quantile(samples, q)) if samples else None


def median_over_rounds(values: Array) -> Estimate:
    """Median of one figure a round, (rounds,), with its interval; NaN rounds are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(None)
    value = float(np.median(values))
    if len(values) == 1:
        return Estimate(value)
    low, high = interval(resampled_medians(values))
    return Estimate(value, low, high)


def ratio(numerator: Array, denominator: Array) -> Estimate:
    """Ratio of two figures measured in the same rounds: the median of the per-round log-ratios, as a ratio."""
    estimate = median_over_rounds(log_ratios(numerator, denominator))
    return Estimate(*(None if x is None else math.exp(x) for x in estimate))


def log_ratios(numerator: Array, denominator: Array) -> Array:
    """Log-ratio of two figures, paired by round; rounds only one side has are left out."""
    paired = min(len(numerator), len(denominator))
    return np.log(numerator[:paired]) - np.log(denominator[:paired])


def geomean(values: Sequence[float]) -> float | None:
    """Geometric mean of positive figures; None of none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if len(values) else None


def geomean_over_cells(log_values: Sequence[Array]) -> Estimate:
    """Geometric mean over cells of the median over rounds. log_values: one (rounds,) array of logs a cell.

    Rounds are resampled within each cell: cells were measured apart. No interval if any cell has a single round.
    """
    if not log_values:
        return Estimate(None)
    value = math.exp(np.mean([np.median(values) for values in log_values]))
    if min(map(len, log_values)) < 2:
        return Estimate(value)
    resampled = np.mean([resampled_medians(values, cell) for cell, values in enumerate(log_values)], axis=0)
    low, high = interval(resampled)
    return Estimate(value, math.exp(low), math.exp(high))


def resampled_medians(values: Array, stream: int = 0) -> Array:
    """Medians of ``RESAMPLES`` bootstrap draws of ``values``; equal arguments give equal draws."""
    return np.median(values[_draws(len(values), stream)], axis=1)


def interval(resampled: Array) -> tuple[float, float]:
    """The central ``CONFIDENCE`` interval of a resampled statistic (percentile bootstrap)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=256)
def _draws(count: int, stream: int) -> NDArray[np.int64]:
    return np.random.default_rng((SEED, stream)).integers(0, count, (RESAMPLES, count))
