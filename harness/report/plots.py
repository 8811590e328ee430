"""Figures of a run: each metric against sequence length, panels by head_dim and mask, one figure a direction.

A cell that has no figure is absent from the picture, never a zero. Files are the same bytes for the same records.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from attnbench.harness.problem import DIRECTIONS
from attnbench.harness.report.axes import Layout, lay_out
from attnbench.harness.report.metrics import METRICS, Metric
from attnbench.harness.report.palette import Style, styles
from attnbench.harness.report.ranking import rank
from attnbench.harness.report.roofline import has_roofline, roofline
from attnbench.harness.report.tables import DIRECTION_TITLES, RANKED_BY, in_reading_order, length_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 130
MOST_COLUMNS = 4
"""More columns of panels go to a further figure: panels stay large enough to read."""
SUBDIVISIONS = (tuple(range(1, 10)), (1, 2, 3, 4, 6), (1, 2, 5), (1, 3), (1,))
"""Of a decade, by the ticks of a logarithmic axis: the densest whose labels stay apart is taken."""
LABELS_ALONG = {"x": 6, "y": 12}
"""How many labels an axis of a panel has room for: they lie side by side along x, one above the other along y."""

REFERENCE: dict[str, Any] = {"color": "#5d6673", "linewidth": 1, "linestyle": (0, (4, 3))}
WHOLE = {"percent_of_gemm": 100, "percent_of_floor": 100, "speedup": 1}
"""By metric: the whole ceiling, or the baseline."""
GRID: dict[str, Any] = {"grid.color": "#e3e6ea", "axes.edgecolor": "#9aa4b1"}
MARKER_EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.4}

RC: Any = {
    "svg.hashsalt": "attnbench", "svg.fonttype": "none", "path.simplify": True, "font.size": 9, "axes.titlesize": 9.5,
    "axes.labelsize": 9, "font.family": "DejaVu Sans", "axes.grid.which": "major", "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One figure. name: of its file, without suffix. Draws only when asked for, and encodes deterministically.

    draw: can be pickled where the figure is to be drawn in another process.
    """

    name: str
    title: str
    draw: Callable[[], Figure]

    def encode(self, *formats: Literal["png", "svg"]) -> dict[str, bytes]:
        """The figure's bytes in each format, drawn once."""
        with mpl.rc_context(RC), warnings.catch_warnings():
            # A name in a script the font lacks is drawn as boxes in a PNG; that is no reason to have no picture.
            warnings.filterwarnings("ignore", message="Glyph")
            figure = self.draw()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, for all formats
            return {kind: _encode(figure, kind) for kind in formats}


def plots(table: pd.DataFrame, metrics: Sequence[Metric], baseline: str | None = None) -> Iterator[Plot]:
    """The figures of a run's frame: one for each metric and direction that has at least one figure to show."""
    style = styles(table["impl"])
    for direction in DIRECTIONS:
        posed = table[table["direction"] == direction]
        if posed.empty:
            continue
        order = {family: rank(table, METRICS[name], direction).order for family, name in RANKED_BY.items()}
        layout = lay_out(posed)
        if any(metric.name == "percent_of_floor" for metric in metrics) and has_roofline(posed):
            ranked = [
                impl for impl in order["time"] if impl in set(posed.loc[posed["tflops"].notna(), "impl"])
            ]
            yield Plot(
                f"roofline_{direction}",
                f"Roofline, {DIRECTION_TITLES[direction]}",
                partial(roofline, posed, ranked, style),
            )
        for metric in metrics:
            title = f"{metric.title} {baseline}" if metric.name == "speedup" and baseline else metric.title
            yield from _plots(
                layout,
                metric,
                direction,
                f"{title}, {DIRECTION_TITLES[direction]}",
                order.get(metric.family, order["time"]),
                style,
            )


def _plots(
    layout: Layout, metric: Metric, direction: str, title: str, ranked: list[str], style: dict[str, Style]
) -> Iterator[Plot]:
    shown = layout.cells[layout.cells[metric.column].notna()]
    columns = list(dict.fromkeys(in_reading_order(shown)["column"]))
    parts = [columns[at : at + MOST_COLUMNS] for at in range(0, len(columns), MOST_COLUMNS)]
    for number, part in enumerate(parts if layout.by_length else [columns] if columns else [], 1):
        cells = shown[shown["column"].isin(part)]
        impls = [impl for impl in ranked if impl in set(cells["impl"])]
        several = len(parts) > 1 and layout.by_length
        name = f"{metric.name}_{direction}" + (f"_{number}" if several else "")
        heading = title + (f" ({number} of {len(parts)})" if several else "")

        if layout.by_length:
            draw = partial(_against_length, cells, layout, metric, heading, impls, style)
        else:
            draw = partial(_problem_by_problem, cells, metric, heading, impls, style)
        yield Plot(name, heading, draw)


def _against_length(
    cells: pd.DataFrame, layout: Layout, metric: Metric, title: str, impls: list[str], style: dict[str, Style]
) -> Figure:
    """cells: those of the layout that the figure shows."""
    rows = sorted(cells["row"].unique(), key=lambda text: int(text.split()[-1]))
    columns = list(dict.fromkeys(in_reading_order(cells)["column"]))
    with sns.axes_style("whitegrid", GRID):
        figure = Figure(figsize=(3.1 * len(columns) + 2.1, 2.45 * len(rows) + 0.9), layout="constrained")
        panels = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    beside = _side_by_side(len(impls), cells["x"])
    for at, row in enumerate(rows):
        for across, column in enumerate(columns):
            axes = panels[at][across]
            here = cells[(cells["row"] == row) & (cells["column"] == column)]
            if here.empty:
                axes.text(0.5, 0.5, "no figures", transform=axes.transAxes, ha="center", color="#9aa4b1")
            posed = layout.cells[(layout.cells["row"] == row) & (layout.cells["column"] == column)]
            lengths = pd.Index(sorted(posed["x"].unique()))
            for lane, impl in reversed(list(enumerate(impls))):
                # A length it has no figure for stays in as a gap: a line drawn across would claim one.
                own = here[here["impl"] == impl].set_index("x").reindex(lengths)
                _line(axes, own, beside[lane], metric, style[impl])
            _reference(axes, here, metric)
            axes.set_title(_panel_title(f"{row}, {column}"))
    scale_lengths(panels[0][0], sorted(cells["x"].unique()))
    _scale_figures(panels[0][0].yaxis, metric)
    figure.supxlabel(layout.x_title, fontsize=9.5)
    figure.supylabel(metric.label, fontsize=9.5)
    _finish(figure, title, metric, impls, style)
    return figure


def _problem_by_problem(
    cells: pd.DataFrame, metric: Metric, title: str, impls: list[str], style: dict[str, Style]
) -> Figure:
    problems = list(dict.fromkeys(in_reading_order(cells)["problem"]))
    width = max(8.2, 5.9 + 0.08 * max(map(len, problems)))  # of names, panel and legend
    with sns.axes_style("whitegrid", GRID):
        figure = Figure(figsize=(width, 0.42 * len(problems) + 1.6), layout="constrained")
        axes = figure.subplots()
    for lane, impl in enumerate(impls):
        own = cells[cells["impl"] == impl]
        # Each implementation keeps its own lane within a problem's band, so that equal figures do not hide each other.
        y = own["problem"].map(problems.index) + 0.6 * ((lane + 0.5) / len(impls) - 0.5)
        spread = _spread(own, metric)
        axes.errorbar(
            own[metric.column], y, xerr=spread, fmt=style[impl].marker, color=style[impl].colour,
            markersize=style[impl].size,
            elinewidth=1.2, **MARKER_EDGE,
        )  # fmt: skip
    _reference_by_problem(axes, cells, metric, problems)
    axes.set_yticks(range(len(problems)), problems)
    axes.set_ylim(len(problems) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for edge in range(len(problems) - 1):
        axes.axhline(edge + 0.5, color="#e3e6ea", linewidth=0.8)
    _scale_figures(axes.xaxis, metric)
    axes.set_xlabel(metric.label)
    _finish(figure, title, metric, impls, style)
    return figure


def _panel_title(text: str) -> str:
    """Broken at commas into lines that fit over a panel."""
    return textwrap.fill(re.sub(r",(?=\S)", ", ", text), 38)


def _side_by_side(count: int, lengths: pd.Series) -> list[float]:
    """A factor on x for each of ``count`` lines, 6% of the axis in all, so that equal figures show."""
    octaves = math.log2(lengths.max() / lengths.min()) if lengths.min() > 0 else 0.0
    return [2 ** (0.06 * octaves * (lane / max(count - 1, 1) - 0.5)) for lane in range(count)]


def _line(axes: Axes, own: pd.DataFrame, beside: float, metric: Metric, style: Style) -> None:
    x = own.index * beside
    axes.plot(
        x,
        own[metric.column],
        color=style.colour,
        marker=style.marker,
        markersize=style.size,
        linewidth=1.3,
        **MARKER_EDGE,
    )
    if metric.low in own:
        axes.fill_between(x, own[metric.low], own[metric.high], color=style.colour, alpha=0.14, linewidth=0)


def _reference(axes: Axes, here: pd.DataFrame, metric: Metric) -> None:
    """What a figure is to be read against: the whole ceiling, the baseline, or the least memory that can be."""
    if metric.name in WHOLE:
        axes.axhline(WHOLE[metric.name], **REFERENCE)
    if metric.name == "memory" and not here.empty:
        least = here.groupby("x")["minimum_mib"].min()
        axes.plot(least.index, least, **REFERENCE)


def _reference_by_problem(axes: Axes, cells: pd.DataFrame, metric: Metric, problems: list[str]) -> None:
    """The same where a problem is a band and the figures run along x."""
    if metric.name in WHOLE:
        axes.axvline(WHOLE[metric.name], **REFERENCE)
    if metric.name == "memory":
        least = cells.groupby("problem")["minimum_mib"].min()
        bands = least.index.map(problems.index)
        axes.vlines(
            least, bands - 0.5, bands + 0.5, color=REFERENCE["color"], linewidth=1, linestyles="dashed"
        )


def _spread(own: pd.DataFrame, metric: Metric) -> Any:
    if metric.low not in own:
        return None
    value = own[metric.column]
    return [
        (value - own[metric.low]).clip(lower=0).fillna(0),
        (own[metric.high] - value).clip(lower=0).fillna(0),
    ]


def scale_lengths(axes: Axes, lengths: list[int]) -> None:
    """A log2 axis whose ticks are the measured lengths, thinned evenly when they would run into one another."""
    step = math.ceil(len(lengths) / 9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(ticker.FixedLocator(lengths[::-1][::step][::-1]))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: length_text(value)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _scale_figures(axis: Any, metric: Metric) -> None:
    if metric.log:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        low, high = axis.get_view_interval()
        subs = _subdivision(math.log10(high / low), LABELS_ALONG[axis.axis_name])
        axis.set_major_locator(ticker.LogLocator(subs=subs))
        axis.set_major_formatter(
            ticker.FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else f"{value:,.0f}")
        )
        axis.set_minor_formatter(ticker.NullFormatter())
    else:
        axis.axes.set(**{f"{axis.axis_name}lim": (0, None)})


def _subdivision(decades: float, labels: int) -> tuple[int, ...]:
    """The densest ticks of a decade that leave each label its share of an axis of so many ``decades``."""
    for subs in SUBDIVISIONS[:-1]:
        closest = min(math.log10(after / before) for before, after in pairwise((*subs, 10)))
        if closest * labels >= decades:
            return subs
    return SUBDIVISIONS[-1]


def _finish(figure: Figure, title: str, metric: Metric, impls: list[str], style: dict[str, Style]) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=style[impl].colour,
            marker=style[impl].marker,
            linewidth=1.4,
            markersize=style[impl].size,
            **MARKER_EDGE,
        )
        for impl in impls
    ]
    heading = "least memory first" if metric.family == "memory" else "fastest first"
    labels = [_legend_text(impl) for impl in impls]
    if metric.name == "memory":
        handles.append(Line2D([], [], **REFERENCE))
        labels.append("least possible")
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title=heading, alignment="left")
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")


def _legend_text(impl: str) -> str:
    # Matplotlib leaves a label with a leading underscore out of the legend.
    text = impl if len(impl) <= 28 else impl[:27] + "…"
    return f" {text}" if text.startswith("_") else text


def _encode(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    target = io.BytesIO()
    if kind == "svg":
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        return target.getvalue()
    figure.savefig(target, format="png", dpi=DPI, metadata={"Software": None})
    # A few colours and their blends with white: a palette shows them all, in a third of the bytes.
    small = io.BytesIO()
    with Image.open(target) as drawn:
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()
