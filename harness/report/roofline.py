"""The roofline: throughput against FLOP a byte of the traffic that no algorithm avoids, under the device's roofs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import seaborn as sns
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnbench.harness.report.floor import EXP_PER_CLOCK_PER_SM, PASSES
from attnbench.harness.report.tables import length_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from attnbench.harness.report.palette import Style

GRID: dict[str, Any] = {"grid.color": "#e3e6ea", "axes.edgecolor": "#9aa4b1"}
ROOF: dict[str, Any] = {"color": "#5d6673", "linewidth": 1.2}


def has_roofline(cells: pd.DataFrame) -> bool:
    return bool((cells["tflops"].notna() & cells["gemm_tflops"].notna() & cells["copy_gbs"].notna()).any())


def roofline(cells: pd.DataFrame, impls: list[str], style: dict[str, Style]) -> Figure:
    """A panel a head_dim, for cells of one direction. Roofs are medians over the cells: the copy's slope and the GEMM's
    level in full, the level that exponentials allow at the median SM clock dotted."""
    cells = cells[cells["tflops"].notna() & cells["gemm_tflops"].notna()]
    sizes = sorted(cells["head_dim"].unique())
    with sns.axes_style("whitegrid", GRID):
        height = max(3.4, 0.21 * (len(impls) + 2) + 0.1)  # as tall as its legend
        figure = Figure(figsize=(3.5 * len(sizes) + 2.0, height), layout="constrained")
        panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        here = cells[cells["head_dim"] == size]
        for impl in impls:
            own = here[here["impl"] == impl]
            axes.plot(
                own["intensity"], own["tflops"], style[impl].marker, color=style[impl].colour,
                markersize=0.8 * style[impl].size, markeredgecolor="white", markeredgewidth=0.3, alpha=0.9,
            )  # fmt: skip
        draw_roofs(axes, here, cells)
        lengths = sorted(here["seqlen_k"].unique())
        axes.set_title(f"head_dim {size}, {length_text(lengths[0])} to {length_text(lengths[-1])}")
        axes.set_xlabel("FLOP per byte that must move")
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
            axis.set_minor_formatter(ticker.NullFormatter())  # its own writes TeX, which is not set here
    panels[0].set_ylabel("TFLOP/s")
    handles = [
        Line2D([], [], color=style[i].colour, marker=style[i].marker, linestyle="", markersize=style[i].size)
        for i in impls
    ]
    handles += [Line2D([], [], **ROOF), Line2D([], [], **ROOF, linestyle=":")]
    labels = [*impls, "copy and GEMM, measured", "exponentials"]
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def draw_roofs(axes: Axes, here: pd.DataFrame, cells: pd.DataFrame) -> None:
    gemm, copy = here["gemm_tflops"].median(), here["copy_gbs"].median() / 1e3
    ridge = gemm / copy
    low, high = min(cells["intensity"].min(), ridge) / 2, max(cells["intensity"].max(), ridge) * 1.5
    axes.plot([low, ridge, high], [low * copy, gemm, gemm], **ROOF)
    exp = exp_roof(here)
    if not math.isnan(exp):
        axes.axhline(exp, **ROOF, linestyle=":")


def exp_roof(cells: pd.DataFrame) -> float:
    """TFLOP/s at which exponentials alone take all the time; NaN where the SM clock or count is not known."""
    rate = EXP_PER_CLOCK_PER_SM * cells["sm_count"].astype(float) * cells["sm_mhz"] * 1e6
    passes = cells["direction"].map(PASSES)
    return float((rate * cells["flops"] / (passes * cells["visible_pairs"])).median() / 1e12)
