"""The course of cells over runs, drawn: a panel an implementation's problem, with its changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from attnbench.harness.report.history import Course
from attnbench.harness.report.palette import styles
from attnbench.harness.report.plots import GRID, REFERENCE, Plot

COLUMNS, MOST_PANELS = 3, 24
SLOWER, FASTER = "#b3261e", "#1b7f4b"


def history_plots(courses: Sequence[Course]) -> list[Plot]:
    """Figures of the courses of at least two runs, those with changes first; ``history``, ``history_2`` and so on."""
    moving = sorted(
        (course for course in courses if len(course.points) > 1), key=lambda course: not course.changes
    )
    parts = [moving[at : at + MOST_PANELS] for at in range(0, len(moving), MOST_PANELS)]
    return [
        Plot(f"history_{n}" if n > 1 else "history", "Time over runs", partial(_draw, part))
        for n, part in enumerate(parts, 1)
    ]


def _draw(courses: Sequence[Course]) -> Figure:
    columns = min(COLUMNS, len(courses))
    rows = math.ceil(len(courses) / columns)
    figure = Figure(figsize=(4.2 * columns, 0.6 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    style = styles(course.key.impl for course in courses)
    for axes, course in zip(panels, courses, strict=False):
        colour, marker, *_ = style[course.key.impl]
        places = range(len(course.points))
        times = [point.ms for point in course.points]
        spreads = [[ms - ms * math.exp(-p.spread) for ms, p in zip(times, course.points, strict=True)],
                   [ms * math.exp(p.spread) - ms for ms, p in zip(times, course.points, strict=True)]]  # fmt: skip
        axes.step(places, course.levels, where="mid", **REFERENCE)
        axes.errorbar(places, times, yerr=spreads, fmt=marker, color=colour, markersize=4.5, linewidth=1)
        for change in course.changes:
            tone = SLOWER if change.change > 0 else FASTER
            axes.axvline(change.at - 0.5, color=tone, linewidth=1)
            axes.annotate(
                f"{change.change:+.1%}", (change.at - 0.5, 1), xycoords=("data", "axes fraction"), color=tone,
                fontsize=8, xytext=(3, -10), textcoords="offset points",
            )  # fmt: skip
        axes.set_ylim(0, 1.25 * max(times))
        axes.set_xlim(-0.5, len(course.points) - 0.5)
        axes.set_xticks(
            list(places),
            [point.started[:10] or point.run for point in course.points],
            rotation=30,
            ha="right",
        )
        axes.tick_params(labelsize=7)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ms"))
        axes.grid(visible=True, axis="y", linewidth=0.5, color=GRID["grid.color"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{course.key.impl}\n{course.key.problem}, {course.key.way}", fontsize=8, loc="left")
    for axes in list(figure.axes)[len(courses) :]:
        axes.remove()
    return figure
