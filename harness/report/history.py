"""How a cell moved over the runs of a folder, and between which runs it changed.

A run is one point: the median over its rounds of log time. Its uncertainty has two parts: what its rounds show, and
how far two fresh runs of one kernel lie apart whatever their rounds say (``REPEATABILITY``). Change points are those
of the most likely piecewise constant course, each paid for by ``PENALTY``: it must be worth more than chance finds
among as many places. Only runs of one device and one way of timing form a course.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attnbench.harness.report import stats
from attnbench.harness.report.load import LoadError, Run, load_run
from attnbench.harness.report.stats import Array
from attnbench.harness.run import journal
from attnbench.harness.run.record import Cell

REPEATABILITY = 0.01
"""Standard deviation of log time between fresh runs: absolute times, on a card whose clock is the weather's."""

PENALTY = 6.0
"""Log-likelihood that a change point must bring, beside the logarithm of how many places it could be at: 3.5 standard
deviations at one place."""

DESCRIBING = ("commit", "torch", "triton", "cuda", "driver", "python")


class CourseKey(NamedTuple):
    """What forms one course. way: of timing."""

    impl: str
    problem: str
    device: str
    way: str


@dataclass(frozen=True)
class Point:
    """One run of a course. log_ms: of the median time; spread: half of its 95% interval over rounds, in log time."""

    run: str
    started: str
    log_ms: float
    spread: float
    version: str
    facts: dict[str, str]

    @property
    def ms(self) -> float:
        return math.exp(self.log_ms)


@dataclass(frozen=True)
class Change:
    """Between the runs ``at - 1`` and ``at``. change: of time, relative; differs: what else is another, in words."""

    at: int
    change: float
    differs: list[str]


@dataclass(frozen=True)
class Course:
    """points: by time of the run. levels: the most likely time at each point, in ms."""

    key: CourseKey
    points: list[Point]
    levels: list[float]
    changes: list[Change]


def find_runs(folder: Path) -> list[Run]:
    """Every run under ``folder``, oldest first; LoadError where there is none."""
    folders = sorted({part.parent for part in folder.rglob("records*.jsonl") if journal.parts(part.parent)})
    if not folders:
        raise LoadError(f"{folder} holds no run")
    return sorted(
        map(load_run, folders), key=lambda run: (str(run.environment.get("started", "")), run.folder.name)
    )


def courses(runs: Sequence[Run], threshold: float) -> list[Course]:
    """A course for each cell that at least one run timed. threshold: smallest relative change that counts as one."""
    points: dict[CourseKey, list[Point]] = {}
    for run in runs:
        for key, point in _points(run):
            points.setdefault(key, []).append(point)
    return [_course(key, found, threshold) for key, found in sorted(points.items())]


def change_points(values: Array, sigmas: Array) -> list[int]:
    """Where a new level begins: the most likely piecewise constant course of independent normal values.

    By dynamic programming over the last change, O(n^2).
    """
    count = len(values)
    weights = np.concatenate([[0.0], np.cumsum(1 / sigmas**2)])
    sums = np.concatenate([[0.0], np.cumsum(values / sigmas**2)])
    squares = np.concatenate([[0.0], np.cumsum(values**2 / sigmas**2)])

    def cost(begin: int, end: int) -> float:
        """Half the weighted squares about the mean of values[begin:end]."""
        total = sums[end] - sums[begin]
        return float(squares[end] - squares[begin] - total**2 / (weights[end] - weights[begin])) / 2

    price = PENALTY + math.log(max(count - 1, 1))
    best, came_from = [-price] + [math.inf] * count, [0] * (count + 1)
    for end in range(1, count + 1):
        for begin in range(end):
            total = best[begin] + cost(begin, end) + price
            if total < best[end]:
                best[end], came_from[end] = total, begin
    found, end = [], count
    while came_from[end]:
        end = came_from[end]
        found.append(end)
    return found[::-1]


def _points(run: Run) -> Iterator[tuple[CourseKey, Point]]:
    names = {
        str(d.get("id")): str(d.get("name"))
        for d in run.environment.get("devices") or []
        if isinstance(d, dict)
    }
    facts = {name: str(run.environment[name]) for name in DESCRIBING if run.environment.get(name)}
    for cell in run.cells:
        if cell.timing:
            device = names.get(cell.device, cell.device)
            key = CourseKey(cell.impl, cell.problem.key, device, cell.timing.way)
            yield key, _point(run, cell, facts)


def _point(run: Run, cell: Cell, facts: dict[str, str]) -> Point:
    assert cell.timing is not None
    found = stats.median_over_rounds(np.log(stats.round_medians(cell.timing.rounds)))
    assert found.value is not None
    spread = 0.0 if found.low is None or found.high is None else (found.high - found.low) / 2
    started = str(run.environment.get("started", ""))
    return Point(run.folder.name, started, found.value, spread, cell.impl_version, facts)


def _course(key: CourseKey, points: list[Point], threshold: float) -> Course:
    values = np.array([point.log_ms for point in points])
    # The interval's half is about two standard deviations.
    sigmas = np.hypot(np.array([point.spread for point in points]) / 2, REPEATABILITY)
    bounds = [0, *change_points(values, sigmas), len(points)]
    means = [
        float(np.average(values[a:b], weights=1 / sigmas[a:b] ** 2)) for a, b in itertools.pairwise(bounds)
    ]
    changes = [
        Change(at, math.expm1(after - before), _differences(points[at - 1], points[at]))
        for at, before, after in zip(bounds[1:-1], means, means[1:], strict=False)
        if abs(after - before) >= math.log1p(threshold)
    ]
    levels = [
        math.exp(mean) for mean, a, b in zip(means, bounds, bounds[1:], strict=False) for _ in range(a, b)
    ]
    return Course(key, points, levels, changes)


def _differences(before: Point, after: Point) -> list[str]:
    """What the environments of two neighbouring runs do not share, ``torch 2.11 → 2.13``."""
    one, other = ({"version": point.version, **point.facts} for point in (before, after))
    return [
        f"{name} {one.get(name, '?')} → {other.get(name, '?')}"
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    ]
