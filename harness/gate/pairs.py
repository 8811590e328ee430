"""Process pairs: a fresh process of each side, timed turn by turn in the same rounds, and the log-ratios they leave.

A *pair* is the unit of resampling: everything that a process draws once (where its memory lies, which kernels its
libraries picked) is the same in all of its rounds, so its rounds are not independent of one another. A *flip* is two
rounds in a row, the second in the opposite order; their mean log-ratio is free of any advantage of going first.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from attnbench.harness.gate.rounds import RoundLogs
from attnbench.harness.report.stats import Array
from attnbench.harness.run.record import Cell, Status


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
class Contrast:
    """Side ``over`` against side ``under`` in one cell. logs: log of the ratio of their times, (pairs, flips); cycles:
    the same in SM clock cycles, None where the clock could not be read in every round.
    """

    key: CellKey
    logs: Array
    cycles: Array | None = None

    def joined(self, other: Contrast) -> Contrast:
        """With the pairs of another batch below; flips that only one batch has are left out."""
        cycles = None if self.cycles is None or other.cycles is None else _stacked(self.cycles, other.cycles)
        return Contrast(self.key, _stacked(self.logs, other.logs), cycles)


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
        pairs = [(by_role[over, n], by_role[under, n]) for n in numbers]
        if not pairs:
            continue
        logs = [(RoundLogs.of(one), RoundLogs.of(other)) for one, other in pairs]
        cycles = [
            _flips(one.cycles - other.cycles)
            for one, other in logs
            if one.cycles is not None and other.cycles is not None
        ]
        times = _stacked(*(_flips(one.ms - other.ms) for one, other in logs))
        found[key] = Contrast(key, times, _stacked(*cycles) if len(cycles) == len(logs) else None)
    return found


def joined(batches: Sequence[Mapping[CellKey, Contrast]]) -> dict[CellKey, Contrast]:
    """The batches of each cell below one another."""
    whole: dict[CellKey, Contrast] = {}
    for batch in batches:
        for key, contrast in batch.items():
            whole[key] = whole[key].joined(contrast) if key in whole else contrast
    return whole


def _flips(rounds: Array) -> Array:
    """Means of neighbouring rounds, whose orders were opposite; an odd one at the end is left out."""
    if len(rounds) < 2:
        return rounds
    whole = len(rounds) // 2 * 2
    return (rounds[0:whole:2] + rounds[1:whole:2]) / 2


def _stacked(*pairs: Array) -> Array:
    """One row a pair, cut to the flips that all of them have."""
    rows = [row for array in pairs for row in np.atleast_2d(array)]
    least = min(map(len, rows))
    return np.stack([row[:least] for row in rows])
