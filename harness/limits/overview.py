"""How far from the limit, in one figure: ceilings, roofline, bytes moved, and the FlashAttention paper's comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from attnbench.harness.report.palette import APPROXIMATE, Style, styles
from attnbench.harness.report.plots import GRID, MARKER_EDGE, REFERENCE, scale_lengths
from attnbench.harness.report.roofline import ROOF, draw_roofs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from attnbench.harness.limits.ceilings import Sampled
    from attnbench.harness.limits.counters import Counted


def draw_overview(
    sampled: Sequence[Sampled], counted: Sequence[Counted], run: pd.DataFrame, paper: pd.DataFrame
) -> Figure:
    """sampled: ceilings. counted: calls of one head_dim. run: the frame of a run, whose forwards of that head_dim are
    set under the roofs, those of the implementations that were counted. paper: the frame of a run of fa1-paper.

    ValueError where nothing was counted, or the runs hold no such cells.
    """
    counted = [one for one in counted if one.dram_read is not None and one.problem.direction == "fwd"]
    if not counted:
        raise ValueError("the counters hold no forward that was counted")
    impls = list(dict.fromkeys(one.impl for one in counted))
    size = counted[0].problem.head_dim
    forwards = _cells(run, head_dim=size, direction="fwd", mask="full", impl=impls)
    trained = _cells(paper, direction="fwd_bwd", mask="full", dropout_p=0.0)
    style = styles([*impls, *trained["impl"]])
    with sns.axes_style("whitegrid", GRID):
        figure = Figure(figsize=(13.5, 6.6), layout="constrained")
        panels = figure.subplots(2, 3)
    (roofs, dram, l2), (ceilings, time, memory) = panels
    _roofline(roofs, forwards, style)
    roofs.set_title(f"Roofline, forward, head_dim {size}")
    _moved(dram, counted, style, lambda one: one.dram_read + one.dram_write)
    dram.set_title("DRAM bytes over the least, forward")
    _moved(l2, counted, style, lambda one: one.l2)
    l2.set_title("L2 bytes over the least of DRAM, forward")
    _ceilings(ceilings, sampled)
    ceilings.set_title("Ceilings, % of the datasheet, 10% to 90%")
    _against_length(time, trained, "median_ms", style)
    time.set(title="The paper's shapes, forward and backward", ylabel="ms")
    _against_length(memory, trained, "peak_mib", style)
    memory.set(title="Their peak memory beyond the inputs", ylabel="MiB")
    names = sorted(style, key=lambda name: (name.endswith(APPROXIMATE), name))
    handles = [Line2D([], [], **_marks(style[name])) for name in names]
    handles += [Line2D([], [], **ROOF), Line2D([], [], **ROOF, linestyle=":"), Line2D([], [], **REFERENCE)]
    names += ["copy and GEMM, measured", "exponentials", "least, or datasheet"]
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    return figure


def _cells(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Those that were timed, and are as asked in each column."""
    kept = table[table["median_ms"].notna()]
    for column, values in wanted.items():
        kept = kept[kept[column].isin(values if isinstance(values, list) else [values])]
    if kept.empty:
        raise ValueError(
            f"no cell was timed with {', '.join(f'{name} {value}' for name, value in wanted.items())}"
        )
    return kept


def _roofline(axes: Axes, cells: pd.DataFrame, style: dict[str, Style]) -> None:
    for impl, own in cells.groupby("impl"):
        axes.plot(own["intensity"], own["tflops"], linestyle="", **_marks(style[str(impl)]))
    draw_roofs(axes, cells, cells)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    _label_figures(axes.xaxis)
    _label_figures(axes.yaxis)


def _moved(
    axes: Axes, counted: Sequence[Counted], style: dict[str, Style], moved: Callable[[Any], float]
) -> None:
    for impl in dict.fromkeys(one.impl for one in counted):
        own = sorted((o for o in counted if o.impl == impl), key=lambda one: one.problem.seqlen_k)
        over = [moved(one) / one.problem.minimal_bytes for one in own]
        axes.plot([one.problem.seqlen_k for one in own], over, linewidth=1.3, **_marks(style[impl]))
    axes.axhline(1, **REFERENCE)
    axes.set(yscale="log", xlabel="sequence length")
    _label_figures(axes.yaxis, "{x:g}×")
    scale_lengths(axes, sorted({one.problem.seqlen_k for one in counted}))


def _ceilings(axes: Axes, sampled: Sequence[Sampled]) -> None:
    """Those that the datasheet, or the hardware's rate at its highest clock, has a figure of."""
    shown = [one for one in sampled if one.datasheet and one.rounds and not one.why]
    for at, one in enumerate(shown):
        shares = 100 * np.array(list(chain.from_iterable(one.rounds))) / (one.datasheet or 1)
        low, median, high = np.quantile(shares, [0.1, 0.5, 0.9])
        axes.barh(at, median, height=0.6, color="#8fa3bf")
        axes.plot([low, high], [at, at], color="#1f2933", linewidth=1.6)
    axes.axvline(100, **REFERENCE)
    axes.set_yticks(range(len(shown)), [fill(one.title, 30) for one in shown], fontsize=8)
    axes.set(xlim=(0, 105), ylim=(len(shown) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")


def _against_length(axes: Axes, cells: pd.DataFrame, column: str, style: dict[str, Style]) -> None:
    for impl, own in cells[cells[column] > 0].sort_values("seqlen_k").groupby("impl"):
        axes.plot(own["seqlen_k"], own[column], linewidth=1.2, **_marks(style[str(impl)]))
    axes.set(yscale="log", xlabel="sequence length")
    _label_figures(axes.yaxis)
    scale_lengths(axes, sorted(cells["seqlen_k"].unique()))


def _label_figures(axis: Axis, text: str = "{x:,.6g}") -> None:
    """In full, not as powers of ten; minor ticks stay without."""
    axis.set_major_formatter(text)
    axis.set_minor_formatter(NullFormatter())


def _marks(style: Style) -> dict[str, Any]:
    return {"color": style.colour, "marker": style.marker, "markersize": style.size, **MARKER_EDGE}
