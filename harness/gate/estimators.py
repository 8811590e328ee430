"""How times become what a round, a side and a process pair say: two estimators, by what noise does to a time.

``TYPICAL``, on a GPU: noise goes both ways (clock, temperature), so the middle is kept at every step, and the ratio is
taken flip by flip, before it: what the card did in the meantime cancels.

``UNDISTURBED``, on a CPU: a sample is host time, to which the neighbours of a shared core only ever add, for seconds
on end and often in most rounds. A round says its fastest sample, a side the lower decile of its rounds, a pair the
ratio of its sides. No ratio comes before the decile: the quiet rounds of one side need not be those of the other. What
slows some calls only, and leaves one in a tenth of the rounds alone, is not seen.

Measured in 26 calibrations and looks of equal processes (up to four cells, 48 rounds of five samples, on two cores that
were left alone or kept busy by compilers): how far pairs lay apart, as standard deviation of the log-ratio.

    ===========================================  =====  =======  =====
    a pair says                                  least  all, rms  most
    ===========================================  =====  =======  =====
    median flip of rounds' medians               0.40%  1.07%    2.2%
    median flip of rounds' fastest samples       0.30%  0.76%    1.7%
    ratio of rounds' fastest, lower quartiles    0.28%  0.52%    0.85%
    ratio of rounds' fastest, lower deciles      0.16%  0.47%    0.77%
    ratio of the fastest samples of all          0.33%  0.77%    1.4%
    ===========================================  =====  =======  =====
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from attnbench.harness.report.stats import Array, Rounds, round_medians

QUIET = 0.1
"""Quantile over rounds. From 0.05 to 0.2 it made no difference but on the noisiest machine, where 0.25 met noise."""


class Estimator(ABC):
    """name: as a bank of A/A rounds has it."""

    name: str

    @abstractmethod
    def rounds(self, samples: Rounds) -> Array:
        """What each round says, (rounds,), in the samples' unit."""

    @abstractmethod
    def side(self, logs: Array) -> Array:
        """What one side says, (...), from logs of its rounds' times (..., rounds)."""

    @abstractmethod
    def pair(self, logs: Array) -> Array:
        """The log-ratio of a pair's two sides, (...), from (..., flips, 2, 2): logs of a round's time, by side (under,
        over) and round of the flip.
        """


class _Typical(Estimator):
    name = "typical"

    def rounds(self, samples: Rounds) -> Array:
        return round_medians(samples)

    def side(self, logs: Array) -> Array:
        median: Array = np.median(logs, axis=-1)
        return median

    def pair(self, logs: Array) -> Array:
        ratios = logs[..., 1, :] - logs[..., 0, :]
        # A burst of a neighbour moves the mean over flips, not their median.
        return self.side((ratios[..., 0] + ratios[..., 1]) / 2)


class _Undisturbed(Estimator):
    name = "undisturbed"

    def rounds(self, samples: Rounds) -> Array:
        return np.array([min(turn) for turn in samples], dtype=float)

    def side(self, logs: Array) -> Array:
        decile: Array = np.quantile(logs, QUIET, axis=-1)
        return decile

    def pair(self, logs: Array) -> Array:
        *drawn, flips, sides, turns = logs.shape
        by_side = np.moveaxis(logs, -2, -3).reshape(*drawn, sides, flips * turns)
        under, over = np.moveaxis(self.side(by_side), -1, 0)
        ratio: Array = over - under
        return ratio


TYPICAL, UNDISTURBED = _Typical(), _Undisturbed()
BY_NAME: dict[str, Estimator] = {estimator.name: estimator for estimator in (TYPICAL, UNDISTURBED)}


def estimator_on(device: str) -> Estimator:
    """device: as in a record, ``cpu`` or ``cuda:N``."""
    return UNDISTURBED if device == "cpu" else TYPICAL
