"""Modelled accesses and hardware counters as rows of text, and the model's growth as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from attnbench.harness.limits.counters import Counted
from attnbench.harness.limits.io_model import AXES, PASSES, Exponent, Point, series_along, verdict
from attnbench.harness.report.tables import DIRECTION_TITLES, figure, length_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnbench.harness.report.palette import Style


POINT_COLUMNS = (
    "algorithm", "pass", "N", "d", "M", "share", "reads", "writes", "closed form", "over the least",
    "FLOP/byte", "bound",
)  # fmt: skip
EXPONENT_COLUMNS = ("algorithm", "pass", *(f"by {axis}" for axis in AXES))
COUNTED_COLUMNS = (
    "implementation", "problem", "pass", "kernels", "DRAM read MB", "DRAM written MB", "DRAM over the least", "L2 MB",
    "L2 over the least",
)  # fmt: skip


def point_rows(points: Iterable[Point], balance: float) -> list[tuple[str, ...]]:
    """balance: FLOP a byte of the device that the verdict is for."""
    agreement = {None: "alone", True: "equal", False: "DIFFERS"}
    return [
        (
            p.impl, p.direction, length_text(p.seqlen), str(p.head_dim), length_text(p.memory), figure(p.share),
            f"{p.predicted.reads:,}", f"{p.predicted.writes:,}", agreement[p.agrees],
            f"{figure(p.predicted.total / p.minimum)}×", figure(p.intensity), verdict(p.intensity, balance),
        )
        for p in points
    ]  # fmt: skip


def exponent_rows(exponents: Sequence[Exponent]) -> list[tuple[str, ...]]:
    """A row an algorithm and pass; "–" for an axis that was not varied."""
    values = {(e.impl, e.direction, e.axis): e.value for e in exponents}
    heads = dict.fromkeys((e.impl, e.direction) for e in exponents)
    return [
        (*head, *(f"{values[*head, axis]:.2f}" if (*head, axis) in values else "–" for axis in AXES))
        for head in heads
    ]


def counted_rows(
    counted: Iterable[Counted], models: dict[str, dict[str, float]], names: Sequence[str]
) -> list[tuple[str, ...]]:
    """models: by problem key, what each algorithm moves on a fast memory as large as an SM's, in bytes; by ``names``,
    L2 traffic over it ends a row."""
    return [_counted_row(one, models.get(one.problem.key, {}), names) for one in counted]


def _counted_row(one: Counted, models: dict[str, float], names: Sequence[str]) -> tuple[str, ...]:
    head = (one.impl, one.problem.group_key, one.problem.direction)
    if one.dram_read is None or one.dram_write is None or one.l2 is None:
        return (*head, "–", *["–"] * 4, one.reason)
    least, dram = one.problem.minimal_bytes, one.dram_read + one.dram_write
    over = (f"{figure(one.l2 / models[name])}×" if name in models else "–" for name in names)
    return (
        *head, str(len(one.kernels)), figure(one.dram_read / 1e6), figure(one.dram_write / 1e6),
        f"{figure(dram / least)}×", figure(one.l2 / 1e6), f"{figure(one.l2 / least)}×", *over,
    )  # fmt: skip


def draw_counted(counted: Sequence[Counted]) -> Figure:
    """DRAM and L2 traffic over the least of DRAM against sequence length, a row a pass, a line an implementation."""
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from attnbench.harness.report.palette import styles
    from attnbench.harness.report.plots import GRID, REFERENCE

    known = [one for one in counted if one.dram_read is not None and one.dram_write is not None]
    impls = list(dict.fromkeys(one.impl for one in known))
    passes = list(dict.fromkeys(one.problem.direction for one in known))
    style = styles(impls)
    figures = {
        "DRAM, over the least": lambda one: one.dram_read + one.dram_write,
        "L2, over the least of DRAM": lambda one: one.l2,
    }
    with sns.axes_style("whitegrid", GRID):
        canvas = Figure(figsize=(8.6, 2.5 * len(passes) + 0.4), layout="constrained")
        panels = canvas.subplots(len(passes), 2, sharex=True, sharey=True, squeeze=False)
    for row, direction in zip(panels, passes, strict=True):
        for panel, (title, moved) in zip(row, figures.items(), strict=True):
            for impl in impls:
                own = [o for o in known if (o.impl, o.problem.direction) == (impl, direction)]
                own.sort(key=lambda one: one.problem.seqlen_k)
                x, y = [o.problem.seqlen_k for o in own], [moved(o) / o.problem.minimal_bytes for o in own]
                panel.plot(
                    x, y, color=style[impl].colour, marker=style[impl].marker, markersize=5, linewidth=1.3
                )
            panel.axhline(1, **REFERENCE)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(sorted({o.problem.seqlen_k for o in known}))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_text(x)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_title(f"{title}, {DIRECTION_TITLES[direction]}")
    for panel in panels[-1]:
        panel.set_xlabel("sequence length")
    handles = [Line2D([], [], color=style[impl].colour, marker=style[impl].marker) for impl in impls]
    canvas.legend(handles, impls, loc="outside right upper", frameon=False)
    return canvas


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(
        f"| {' | '.join(row)} |\n"
        for row in (
            columns,
            ["---"] * len(columns),
            *([text.replace("|", "\\|") for text in row] for row in rows),
        )
    )


def draw(points: Sequence[Point]) -> Figure:
    """Accesses against each axis that was varied, a row a pass: lines are closed forms, dots were counted."""
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

    from attnbench.harness.report.palette import styles
    from attnbench.harness.report.plots import GRID, REFERENCE

    titles = {
        "seqlen": "sequence length N", "head_dim": "head_dim d", "memory": "fast memory M", "share": "visible share s",
    }  # fmt: skip
    impls = list(dict.fromkeys(point.impl for point in points))
    style = styles(impls)
    axes_shown = [axis for axis in AXES if len({getattr(point, axis) for point in points}) >= 3]
    with sns.axes_style("whitegrid", GRID):
        canvas = Figure(figsize=(3.1 * len(axes_shown) + 1.4, 5.2), layout="constrained")
        panels = canvas.subplots(2, len(axes_shown), sharey="row", squeeze=False)
    for down, direction in enumerate(PASSES):
        for across, axis in enumerate(axes_shown):
            panel = panels[down][across]
            for impl in impls:
                own = [p for p in points if (p.impl, p.direction) == (impl, direction)]
                for series in series_along(own, axis):
                    _line(panel, series, axis, style[impl])
                    x, least = [getattr(p, axis) for p in series], [p.minimum for p in series]
                    panel.plot(x, least, **REFERENCE)
                    if axis != "seqlen" and impl == impls[0]:
                        text = f"N {length_text(series[0].seqlen)}"
                        panel.annotate(
                            text,
                            (x[-1], least[-1]),
                            (-1, 3),
                            textcoords="offset points",
                            ha="right",
                            fontsize=7,
                        )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(
                FuncFormatter(lambda x, _: f"{x:.2g}" if x < 1 else length_text(x))
            )
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
            panel.xaxis.set_minor_formatter(NullFormatter())
            if down:
                panel.set_xlabel(titles[axis])
            if not across:
                panel.set_ylabel(f"{DIRECTION_TITLES[direction]}\nelements moved")
    handles = [Line2D([], [], color=style[impl].colour, marker=style[impl].marker) for impl in impls]
    title = "lines: closed forms\nmarks: counted runs\ndashed: the least"
    canvas.legend(handles, impls, loc="outside right upper", frameon=False, title=title, alignment="left")
    return canvas


def _line(panel: Axes, series: Sequence[Point], axis: str, style: Style) -> None:
    """The closed form over the series, and a mark wherever it was run and counted."""
    panel.plot(
        [getattr(p, axis) for p in series],
        [p.predicted.total for p in series],
        color=style.colour,
        linewidth=1.3,
    )
    ran = [(getattr(p, axis), p.counted.total) for p in series if p.counted]
    panel.plot([x for x, _ in ran], [y for _, y in ran], style.marker, color=style.colour, markersize=4.5)
