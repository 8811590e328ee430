"""Process pairs: a fresh process of each side, timed turn by turn in the same rounds, and the times they leave.

A *pair* is the unit of resampling: everything that a process draws once (where its memory lies, which kernels its
libraries picked) is the same in all of its rounds, so its rounds are not independent of one another. A *flip* is two
rounds in a row, the second in the opposite order: what is kept and drawn by whole flips is free of any advantage of
going first, which each side has in half of its rounds.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnbench.harness.gate.estimators import TYPICAL, Estimator
from attnbench.harness.gate.rounds import RoundLogs
from attnbench.harness.report.stats import Array
from attnbench.harness.run.record import Cell, Status

Indices = NDArray[np.int64]


class CellKey(NamedTuple):
    """What is compared: an implementation on a problem (``Problem.key``)."""

    impl: str
    problem: str

    @property
    def id(self) -> str:
        return f"{self.impl}/{self.problem}"


class Role(NamedTuple):
    """One process of one side: ``flash-triton@head.3`` is the third process of the side ``head``."""

    impl: str
    side: str
    number: int

    def __str__(self) -> str:
        return f"{self.impl}@{self.side}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> Role:
        impl, _, mark = text.partition("@")
        side, _, number = mark.rpartition(".")
        return cls(impl, side, int(number))


def mirrored(members: Sequence[str], number: int) -> list[str]:
    """The order of round ``number``: random for an even one, and the same backwards for the odd one after it."""
    order = sorted(members)
    random.Random(number // 2).shuffle(order)
    return order[::-1] if number % 2 else order


@dataclass(frozen=True)
class PairLogs:
    """Logs of the times of process pairs, and how they are read.

    times: (..., pairs, flips, 2, 2), by side (under, over) and round of the flip.
    """

    times: Array
    estimator: Estimator

    @classmethod
    def of_ratios(cls, ratios: Array) -> PairLogs:
        """Of flips' mean log-ratios (..., pairs, flips), where no more than these is known."""
        sides = np.stack([np.zeros_like(ratios), ratios], axis=-1)
        return cls(np.stack([sides, sides], axis=-1), TYPICAL)

    @property
    def pairs(self) -> int:
        return int(self.times.shape[-4])

    @property
    def flips(self) -> int:
        return int(self.times.shape[-3])

    def values(self) -> Array:
        """The log-ratio that each pair says, (..., pairs)."""
        return self.estimator.pair(self.times)

    def redrawn(self, pairs: Indices, rng: np.random.Generator) -> Array:
        """What the pairs of these numbers say, (...), each of as many flips as it has, drawn with replacement."""
        flips = rng.integers(0, self.flips, (*pairs.shape, self.flips))
        return self.estimator.pair(self.times[pairs[..., None], flips])

    @classmethod
    def stacked(cls, parts: Sequence[PairLogs]) -> PairLogs:
        """The pairs of all parts, which one estimator reads; flips that not all of them have are left out."""
        (estimator,) = {part.estimator for part in parts}
        flips = min(part.flips for part in parts)
        return cls(np.concatenate([part.times[:, :flips] for part in parts]), estimator)


@dataclass(frozen=True)
class Contrast:
    """Side ``over`` against side ``under`` in one cell. logs: in ms; cycles: in SM clock cycles, None where the clock
    could not be read in every round.
    """

    key: CellKey
    logs: PairLogs
    cycles: PairLogs | None = None

    def joined(self, other: Contrast) -> Contrast:
        """With the pairs of another batch below."""
        cycles = PairLogs.stacked([self.cycles, other.cycles]) if self.cycles and other.cycles else None
        return Contrast(self.key, PairLogs.stacked([self.logs, other.logs]), cycles)


def contrasts(cells: Iterable[Cell], over: str, under: str) -> dict[CellKey, Contrast]:
    """The contrast of two sides in every cell that some pair answered on both; pairs go by their number."""
    timed: dict[CellKey, dict[tuple[str, int], Cell]] = {}
    for cell in cells:
        if cell.status is Status.OK and cell.timing:
            role = Role.parse(cell.impl)
            key = CellKey(role.impl, cell.problem.key)
            timed.setdefault(key, {})[role.side, role.number] = cell
    found = {}
    for key, by_role in timed.items():
        numbers = sorted(n for side, n in by_role if side == over and (under, n) in by_role)
        pairs = [(RoundLogs.of(by_role[under, n]), RoundLogs.of(by_role[over, n])) for n in numbers]
        if not pairs:
            continue
        cycles = [
            _pair(one.cycles, other.cycles, one.estimator)
            for one, other in pairs
            if one.cycles is not None and other.cycles is not None
        ]
        times = PairLogs.stacked([_pair(one.ms, other.ms, one.estimator) for one, other in pairs])
        found[key] = Contrast(key, times, PairLogs.stacked(cycles) if len(cycles) == len(pairs) else None)
    return found


def _pair(under: Array, over: Array, estimator: Estimator) -> PairLogs:
    """Of one pair, from its sides' rounds; an odd round at the end is left out, but for a single one."""
    rounds = np.stack([under, over])
    if rounds.shape[1] < 2:
        rounds = rounds.repeat(2, axis=1)
    flips = rounds.shape[1] // 2
    return PairLogs(rounds[None, :, : flips * 2].reshape(1, 2, flips, 2).swapaxes(1, 2), estimator)
