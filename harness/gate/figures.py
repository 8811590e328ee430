"""Pictures of ratios: the change of every cell with its interval, and how surely a gate finds a slowdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from attnbench.harness.gate.compare import Change
from attnbench.harness.gate.decision import Bounds, Verdict
from attnbench.harness.report.plots import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnbench.harness.gate.power import PowerCurve

MOST_ROWS = 40
"""More cells go to a further figure."""

COLOURS = {
    Verdict.SLOWER: "#b3261e",
    Verdict.FASTER: "#1b7f4b",
    Verdict.SAME: "#5d6673",
    Verdict.UNSURE: "#b07d00",
}
CYCLES = "#9aa4b1"
BAND = "#e9edf1"


def change_plots(changes: Sequence[Change], threshold: float, title: str) -> list[Plot]:
    """Figures of the cells that both sides timed, in the order given; ``changes``, ``changes_2`` and so on."""
    timed = [change for change in changes if change.ms is not None]
    parts = [timed[at : at + MOST_ROWS] for at in range(0, len(timed), MOST_ROWS)]
    return [
        Plot(f"changes_{n}" if n > 1 else "changes", title, partial(_draw_changes, part, threshold, title))
        for n, part in enumerate(parts, 1)
    ]


def _draw_changes(changes: Sequence[Change], threshold: float, title: str) -> Figure:
    figure = Figure(figsize=(10, 1.3 + 0.27 * len(changes)), layout="constrained")
    axes = figure.subplots()
    margin = math.log1p(threshold)
    axes.axvspan(math.expm1(-margin), threshold, color=BAND, zorder=0)
    axes.axvline(0, color=CYCLES, linewidth=0.8, zorder=1)
    for row, change in enumerate(changes):
        assert change.ms is not None
        if change.cycles is not None:
            _whisker(axes, row + 0.22, change.cycles, CYCLES, hollow=True)
        _whisker(axes, row, change.ms, COLOURS[change.ms.verdict(margin)], hollow=False)
    several = len({change.key.impl for change in changes}) > 1
    names = [
        f"{change.key.impl}  {change.key.problem}" if several else change.key.problem for change in changes
    ]
    axes.set_yticks(
        range(len(changes)), [textwrap.shorten(name, 70, placeholder=" …") for name in names], fontsize=7
    )
    axes.set_ylim(len(changes) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.1%}"))
    axes.set_xlabel("change of time, B over A")
    axes.grid(visible=True, axis="x", linewidth=0.5, color=BAND)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_title(title, loc="left")
    shown = [verdict for verdict in Verdict if any(c.verdict(margin) is verdict for c in changes)]
    handles = [axes.plot([], [], "o", color=COLOURS[verdict], label=verdict.lower())[0] for verdict in shown]
    if any(change.cycles for change in changes):
        handles += axes.plot([], [], "o", color=CYCLES, markerfacecolor="white", label="in SM clock cycles")
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=8)
    return figure


def _whisker(axes: Axes, row: float, found: Bounds, colour: str, *, hollow: bool) -> None:
    low, high = (end if math.isfinite(end) else found.value for end in (found.low, found.high))
    axes.plot(
        [math.expm1(low), math.expm1(high)], [row, row], color=colour, linewidth=1 if hollow else 2, zorder=2
    )
    fill = "white" if hollow else colour
    size = 3.0 if hollow else 4.5
    axes.plot(
        math.expm1(found.value), row, "o", color=colour, markerfacecolor=fill, markersize=size, zorder=3
    )


def power_plot(curves: Sequence[PowerCurve], threshold: float, title: str) -> Plot:
    """How often a slowdown of every size is found, and how often it passes for SAME."""
    return Plot("power", title, partial(_draw_power, curves, threshold, title))


def _draw_power(curves: Sequence[PowerCurve], threshold: float, title: str) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axvline(threshold, color=CYCLES, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(threshold, 1.02, " threshold", fontsize=8, color="#5d6673", va="bottom")
    palette = ("#0072B2", "#D55E00", "#117733", "#AA4499", "#332288", "#999933")
    for colour, curve in zip(palette, curves, strict=False):
        axes.plot(
            curve.slowdowns, curve.found, color=colour, linewidth=2, label=f"{curve.name}: found SLOWER"
        )
        axes.fill_between(
            curve.slowdowns, curve.found_low, curve.found_high, color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(
            curve.slowdowns, curve.same, color=colour, linewidth=1.2, linestyle=(0, (2, 2)),
            label=f"{curve.name}: passes for SAME",
        )  # fmt: skip
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("slowdown of the kernel")
    axes.set_ylabel("share of gates")
    axes.set_ylim(-0.02, 1.1)
    axes.set_xlim(0, max(curve.slowdowns[-1] for curve in curves))
    axes.grid(visible=True, linewidth=0.5, color=BAND)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", pad=16)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    return figure
