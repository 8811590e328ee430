"""How implementations moved over the runs of a suite on a device: percent of the ceiling, run by run.

The ceiling is sampled beside every cell, so that a card that ran hotter moved both; a time in ms would compare two
afternoons. Runs are compared on the problems that the implementation completed in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnbench.harness.problem import DIRECTIONS
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.report.stats import geomean


@dataclass(frozen=True)
class Timeline:
    """One suite, device and direction. runs: oldest first. percent: by implementation, one figure a run (None: it
    completed nothing comparable there). cells: by implementation, how many problems the figures are over.
    """

    device: str
    suite: str
    direction: str
    runs: list[PublishedRun]
    percent: dict[str, list[float | None]]
    cells: dict[str, int]


def timelines(runs: Sequence[PublishedRun]) -> list[Timeline]:
    """Every timeline with at least one figure. runs: latest first."""
    found = []
    for device in dict.fromkeys(run.device for run in runs):
        for suite in dict.fromkeys(suite for run in runs if run.device == device for suite in run.suites):
            own = [run for run in reversed(runs) if run.device == device and suite in run.suites]
            for direction in DIRECTIONS:
                timeline = _timeline(device, suite, direction, own)
                if timeline.percent:
                    found.append(timeline)
    return found


def _timeline(device: str, suite: str, direction: str, runs: list[PublishedRun]) -> Timeline:
    figures: list[dict[str, dict[str, float]]] = []
    for run in runs:
        table = run.table
        chosen = table[
            (table["suite"] == suite)
            & (table["direction"] == direction)
            & (table["status"] == "OK")
            & table["percent_of_floor"].notna()
        ]
        of_run: dict[str, dict[str, float]] = {}
        columns = (chosen[name] for name in ("impl", "group", "percent_of_floor"))
        for impl, group, figure in zip(*columns, strict=True):
            of_run.setdefault(impl, {})[group] = figure
        figures.append(of_run)
    percent: dict[str, list[float | None]] = {}
    cells: dict[str, int] = {}
    for impl in sorted({impl for of_run in figures for impl in of_run}):
        with_it = [set(of_run[impl]) for of_run in figures if impl in of_run]
        common = set.intersection(*with_it)
        cells[impl] = len(common)
        percent[impl] = [
            geomean([of_run[impl][group] for group in sorted(common)]) if impl in of_run and common else None
            for of_run in figures
        ]
    last = {
        impl: next((p for p in reversed(values) if p is not None), 0.0) for impl, values in percent.items()
    }
    ordered = sorted(percent, key=lambda impl: -last[impl])
    return Timeline(device, suite, direction, runs, {impl: percent[impl] for impl in ordered}, cells)
