"""Rankings by problem family: for each device and suite, from the latest run that posed the family.

A ranking is of one run alone: its scores are ratios within rounds, and two runs share none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnbench.harness.problem import DIRECTIONS
from attnbench.harness.publish.devices import CPU
from attnbench.harness.publish.families import Family
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.ranking import Ranking, Standing, rank
from attnbench.harness.report.stats import geomean

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Place:
    """An implementation's standing, with geometric means over the ranking's common cells: TFLOP/s, and percent of the
    ceiling (what the GEMM, the copy and the clock of the same rounds allow). None if missing. why: it is not ranked.
    """

    standing: Standing
    tflops: float | None = None
    ceiling: float | None = None
    why: str = ""


@dataclass(frozen=True)
class FamilyBoard:
    """One family's ranking (family None: all problems of a direction), and the run it is from."""

    family: Family | None
    ranking: Ranking
    places: list[Place]
    run: PublishedRun

    @property
    def ranked(self) -> list[Place]:
        return [place for place in self.places if place.standing.rank]

    @property
    def unranked(self) -> list[Place]:
        return [place for place in self.places if not place.standing.rank]

    @property
    def of(self) -> dict[str, Place]:
        return {place.standing.impl: place for place in self.places}


@dataclass(frozen=True)
class Board:
    """What one suite says of one device. overall: one ranking a direction, over all families of the latest run."""

    device: str
    suite: str
    overall: list[FamilyBoard]
    families: list[FamilyBoard]

    @property
    def key(self) -> str:
        return "-".join(
            "".join(c if c.isalnum() else "-" for c in f"{self.device} {self.suite}").lower().split("-")
        )

    @property
    def posed(self) -> int:
        """How many problems its families hold together."""
        return sum(board.ranking.posed for board in self.families)

    @property
    def runs(self) -> list[PublishedRun]:
        """The runs that stand in it, latest first."""
        found = {id(board.run): board.run for board in [*self.overall, *self.families]}
        return sorted(found.values(), key=lambda run: run.started, reverse=True)

    @property
    def impls(self) -> list[str]:
        """All implementations, those first that lead more: by mean place over the families, then by mean score."""
        standings: dict[str, list[tuple[float, float]]] = {}
        for board in self.families:
            last = len(board.places)
            for place in board.places:
                own = place.standing
                standings.setdefault(own.impl, []).append((own.rank or last, -(own.score.value or 0)))
        return sorted(standings, key=lambda impl: (*np.mean(standings[impl], axis=0), impl))


def boards(runs: Sequence[PublishedRun]) -> list[Board]:
    """Every device's boards, CPUs last; of a device, the suite first that poses most. runs: latest first."""
    found: list[Board] = []
    for device in dict.fromkeys(run.device for run in runs):
        of_device = [run for run in runs if run.device == device]
        suites = []
        for suite in dict.fromkeys(suite for run in of_device for suite in run.suites):
            families: dict[Family, FamilyBoard] = {}
            overall: dict[str, FamilyBoard] = {}
            for run in of_device:
                table = run.table[run.table["suite"] == suite]
                for direction in DIRECTIONS:
                    posed = table[table["direction"] == direction]
                    if not posed.empty and direction not in overall:
                        overall[direction] = _board(None, posed, direction, run)
                for family, posed in table.groupby("family", sort=False):
                    if family not in families:
                        families[family] = _board(family, posed, family.direction, run)
            ordered = sorted(families.values(), key=lambda board: board.family.order if board.family else ())
            suites.append(Board(device, suite, list(overall.values()), ordered))
        found += sorted(suites, key=lambda board: -board.posed)
    return sorted(found, key=lambda board: board.device.startswith(CPU))


def _board(family: Family | None, posed: pd.DataFrame, direction: str, run: PublishedRun) -> FamilyBoard:
    ranking = rank(posed, METRICS["latency"], direction)
    ranked = [standing.impl for standing in ranking.standings if standing.rank]
    done = posed[posed["status"] == "OK"].set_index(["impl", "group"])
    common = set.intersection(*(set(done.loc[impl].index) for impl in ranked)) if ranked else set()
    places = []
    for standing in ranking.standings:
        if standing.rank:
            cells = done.loc[[(standing.impl, group) for group in sorted(common)]]
            places.append(Place(standing, _mean(cells["tflops"]), _mean(cells["percent_of_floor"])))
        else:
            places.append(Place(standing, why=_why(posed, standing.impl)))
    return FamilyBoard(family, ranking, places, run)


def _mean(values: pd.Series) -> float | None:
    return None if values.isna().any() else geomean(list(values))


def _why(posed: pd.DataFrame, impl: str) -> str:
    own = posed[posed["impl"] == impl]
    failed = own.loc[own["status"] != "OK", ["status", "reason"]]
    reasons = [f"{status}: {reason}" for status, reason in failed.to_numpy()]
    if own["approximate"].fillna(value=False).any():
        reasons.insert(0, f"an approximation, its mean error up to {own['error_percent'].max():.2g}%")
    return "; ".join(dict.fromkeys(reasons))
