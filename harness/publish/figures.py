"""Figures for the site: the report's own, as SVG inside the page, so that they follow its theme and its font."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import markupsafe
from matplotlib.figure import Figure

from attnbench.harness.publish.timeline import Timeline
from attnbench.harness.report.metrics import metrics_named
from attnbench.harness.report.palette import styles
from attnbench.harness.report.plots import Plot, plots
from attnbench.harness.report.tables import DIRECTION_TITLES

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("tflops", "percent_of_floor", "memory")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FONT = re.compile(r"font-family: [^;\"]*; ?")  # the page's own, by its style
_ID = re.compile(r' id="([\w-]+)"')
_REFERRED = re.compile(r'(?:url\(#|href="#)([\w-]+)')
_INDENT = re.compile(r"\n\s*")
_REFERENCE = re.compile(r'(id="|url\(#|href="#)([\w-]+)')
_PREAMBLE = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>", re.DOTALL)


def of_run(table: pd.DataFrame) -> Iterator[tuple[str, markupsafe.Markup]]:
    """Title and SVG of a run's figures, in the order of METRICS."""
    for number, plot in enumerate(plots(table, metrics_named(METRICS))):
        yield plot.title, inline(plot.encode("svg")["svg"].decode(), plot.title, f"f{number}")


def of_timeline(timeline: Timeline, number: int) -> markupsafe.Markup | None:
    """Percent of the ceiling against the runs; None for a single run, which is no line."""
    if len(timeline.runs) < 2:
        return None
    title = f"Percent of the ceiling, {DIRECTION_TITLES[timeline.direction]}, {timeline.suite} on {timeline.device}"
    plot = Plot("timeline", title, lambda: _lines(timeline))
    return inline(plot.encode("svg")["svg"].decode(), title, f"t{number}")


def inline(svg: str, title: str, prefix: str) -> markupsafe.Markup:
    """An SVG document as an element of a page: no background, short numbers, ids of its own, and a name.

    Its texts were escaped by the library that wrote it.
    """
    svg = _PREAMBLE.sub("", svg)
    svg = _REFERENCE.sub(rf"\g<1>{prefix}-\g<2>", svg)
    svg = _NUMBER.sub(lambda match: f"{float(match.group()):.1f}".removesuffix(".0"), svg)
    svg = _INDENT.sub("\n", _FONT.sub("", svg)).replace("fill: #ffffff", "fill: none")
    referred = set(_REFERRED.findall(svg))
    svg = _ID.sub(lambda match: match.group() if match[1] in referred else "", svg)
    name = markupsafe.escape(title)
    return markupsafe.Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1))


def _lines(timeline: Timeline) -> Figure:
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    axes = figure.subplots()
    style = styles(timeline.percent)
    places = range(len(timeline.runs))
    for impl, values in timeline.percent.items():
        figures = [math.nan if value is None else value for value in values]
        look = style[impl]
        axes.plot(places, figures, color=look.colour, marker=look.marker, markersize=look.size, label=impl)
    commits = [str(run.run.environment.get("commit", ""))[:7] for run in timeline.runs]
    labels = [f"{run.started[:10]}\n{commit}" for run, commit in zip(timeline.runs, commits, strict=True)]
    axes.set_xticks(places, labels)
    axes.set_ylim(0, None)
    axes.set_ylabel("percent of the ceiling")
    axes.grid(axis="y", color="#e3e6ea")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
