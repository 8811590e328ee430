"""Sampled ceilings as rows of text, and as a figure: each against the SM clock it saw."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from attnbench.harness.report.tables import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnbench.harness.limits.ceilings import Sampled

COLUMNS = ("ceiling", "unit", "median", "10% to 90%", "SM MHz", "datasheet", "share")


def rows(sampled: Sequence[Sampled]) -> list[tuple[str, ...]]:
    """One row a ceiling, as ``COLUMNS``; "–" where there is no figure, and why at the end."""
    return [_row(one) for one in sampled]


def markdown(sampled: Sequence[Sampled]) -> str:
    table = [COLUMNS, tuple("---" for _ in COLUMNS), *rows(sampled)]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def _row(one: Sampled) -> tuple[str, ...]:
    samples = list(chain.from_iterable(one.rounds))
    if one.why or not samples:
        return one.title, one.unit, "–", one.why, "–", "–", "–"
    low, median, high = np.quantile(samples, [0.1, 0.5, 0.9])
    clocks = [mhz for mhz in one.sm_mhz if mhz]
    seen = f"{min(clocks)} to {max(clocks)}" if clocks else "–"
    sheet, share = (
        ("–", "–") if one.datasheet is None else (figure(one.datasheet), f"{median / one.datasheet:.0%}")
    )
    return one.title, one.unit, figure(median), f"{figure(low)} to {figure(high)}", seen, sheet, share


def draw(sampled: Sequence[Sampled]) -> Figure:
    """A panel a ceiling: round medians against the SM clock (without clocks, against time), the datasheet dashed."""
    import seaborn as sns
    from matplotlib.figure import Figure

    from attnbench.harness.report.plots import GRID, REFERENCE

    shown = [one for one in sampled if one.rounds and not one.why]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    with sns.axes_style("whitegrid", GRID):
        canvas = Figure(figsize=(3.0 * across, 2.2 * down + 0.3), layout="constrained")
        panels = canvas.subplots(down, across, squeeze=False)
    for axes, one in zip(panels.flat, shown, strict=False):
        medians = [float(np.median(samples)) for samples in one.rounds]
        clocked = all(one.sm_mhz)
        axes.plot(
            one.sm_mhz if clocked else one.at_s, medians, "o", markersize=3.5, alpha=0.7, color="#332288"
        )
        if one.datasheet is not None:
            axes.axhline(one.datasheet, **REFERENCE)
        axes.set_ylim(0, 1.1 * max(*medians, one.datasheet or 0))
        axes.set_title(one.title, fontsize=8.5)
        axes.set_ylabel(one.unit, fontsize=8)
        axes.set_xlabel("SM clock (MHz)" if clocked else "seconds into the run", fontsize=8)
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_axis_off()
    return canvas
