"""What a gate would say of an unchanged kernel here and now, and how small a change it would see.

Both come from replaying the whole procedure (all cells, all looks, stopping at the first that decides) on gates
drawn from recorded A/A rounds: process pairs of two equal sides. A pair keeps its sign or loses it at random, since
equal sides can be swapped; a pair and the flips within it, of both sides at once, are drawn with replacement. A
slowdown of a kernel is a shift of what every pair says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from attnbench.harness.gate.decision import Design, half_widths
from attnbench.harness.gate.pairs import PairLogs
from attnbench.harness.report.stats import Array

GATES = 1000
SEED = 11
MOST_UNSURE = 0.10
"""A machine is fit when at most this share of the replayed gates ends UNSURE about an unchanged kernel."""
POWER = 0.80
STEP, LARGEST = 0.0025, 0.5

# Verdicts as numbers, for arrays of them.
UNSURE, SAME, SLOWER, FASTER = range(4)
Codes = NDArray[np.int8]


@dataclass(frozen=True)
class Rate:
    """``count`` of ``of``, with the exact 95% interval (Clopper and Pearson)."""

    count: int
    of: int

    @property
    def share(self) -> float:
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        found = scipy_stats.binomtest(self.count, self.of).proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)

    @property
    def most(self) -> float:
        """The one-sided 95% upper bound: 3 / n, nearly, for none in n."""
        if self.count == self.of:
            return 1.0
        return float(scipy_stats.beta.ppf(0.95, self.count + 1, self.of - self.count))


@dataclass(frozen=True)
class Calibration:
    """false_positives, unsure: gates of an unchanged kernel that find a cell SLOWER, or end UNSURE about one.

    detectable: per cell, the smallest slowdown found in POWER of the gates; None if none up to LARGEST is.
    drawn_from: ``5 A/A pairs``.
    """

    design: Design
    drawn_from: str
    false_positives: Rate
    unsure: Rate
    detectable: tuple[float | None, ...] = field(default=())

    @property
    def fit(self) -> bool:
        return self.unsure.share <= MOST_UNSURE and self.false_positives.share <= self.design.alpha

    @property
    def smallest(self) -> float | None:
        """The smallest slowdown that is found in whichever cell it happens."""
        found = [change for change in self.detectable if change is not None]
        return max(found) if found and len(found) == len(self.detectable) else None


def calibrate(bank: Sequence[PairLogs], design: Design, gates: int = GATES) -> Calibration:
    """bank: the A/A pairs of each cell of the gate."""
    pairs = min(logs.pairs for logs in bank)
    return summarised(replay_pairs(bank, design, gates), design, f"{pairs} A/A pairs")


def summarised(replay: Replay, design: Design, drawn_from: str) -> Calibration:
    unchanged = replay.verdicts(0.0)
    failing = (unchanged == SLOWER).any(axis=1)
    undecided = (unchanged == UNSURE).any(axis=1) & ~failing
    return Calibration(
        design=design,
        drawn_from=drawn_from,
        false_positives=Rate(int(failing.sum()), len(unchanged)),
        unsure=Rate(int(undecided.sum()), len(unchanged)),
        detectable=replay.detectable(),
    )


def replay_pairs(bank: Sequence[PairLogs], design: Design, gates: int, seed: int = SEED) -> Replay:
    """Gates of fresh pairs, drawn from a bank as for ``calibrate``."""
    rng = np.random.default_rng(seed)
    shape = (gates, design.looks * design.pairs)
    which, signs = rng.random(shape), rng.choice((-1.0, 1.0), shape)
    means, halves = [], []
    for logs in bank:
        # One draw for all cells: they were measured in the same processes, and share what those drew.
        values = signs * logs.redrawn((which * logs.pairs).astype(int), rng)
        seen = [values[:, : (look + 1) * design.pairs] for look in range(design.looks)]
        means.append([look.mean(axis=-1) for look in seen])
        halves.append([half_widths(look, design.level) for look in seen])
    return Replay(np.array(means).transpose(2, 0, 1), np.array(halves).transpose(2, 0, 1), design.margin)


@dataclass(frozen=True)
class Replay:
    """Gates that were drawn, with an unchanged kernel: estimate and half its interval, (gates, cells, looks)."""

    means: Array
    halves: Array
    margin: float

    def verdicts(self, slowdown: float) -> Codes:
        """(gates, cells): what each cell's first look that decides says, UNSURE where none does.

        slowdown: of head in every cell, relative.
        """
        value = self.means + math.log1p(slowdown)
        low, high = value - self.halves, value + self.halves
        codes = np.select(
            [low > self.margin, high < -self.margin, (low > -self.margin) & (high < self.margin)],
            [SLOWER, FASTER, SAME],
            UNSURE,
        )
        # The first look where none decides, and that one says UNSURE.
        first = (codes != UNSURE).argmax(axis=-1, keepdims=True)
        decided: Codes = np.take_along_axis(codes, first, axis=-1)[..., 0].astype(np.int8)
        return decided

    def found(self, slowdown: float) -> Array:
        """Per cell, the share of gates that find it SLOWER."""
        share: Array = (self.verdicts(slowdown) == SLOWER).mean(axis=0)
        return share

    def detectable(self) -> tuple[float | None, ...]:
        """Per cell, the smallest slowdown on a grid of STEP that POWER of the gates find."""
        smallest: list[float | None] = [None] * self.means.shape[1]
        for step in range(1, round(LARGEST / STEP) + 1):
            for cell in np.flatnonzero(self.found(step * STEP) >= POWER):
                if smallest[cell] is None:
                    smallest[cell] = step * STEP
            if None not in smallest:
                break
        return tuple(smallest)
