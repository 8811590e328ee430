from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from attnbench.harness.masks import BlockPattern, Mask
from attnbench.harness.problem import Problem
from attnbench.harness.report.axes import lay_out
from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.plots import RC, Plot, plots
from attnbench.harness.run.record import Cell, Status

LATENCY, MEMORY = METRICS["latency"], METRICS["memory"]
LENGTHS = (1024, 2048, 4096)


def run_of(cells: list[Cell]) -> Run:
    return Run(Path(), cells, [])


def drawn(cells: list[Cell], metric: str = "latency") -> list[Plot]:
    return list(plots(frame(run_of(cells)), [METRICS[metric]]))


def lines(plot: Plot) -> list[np.ndarray]:
    """y values of every line of the first panel."""
    return [np.asarray(line.get_ydata(), float) for line in plot.draw().axes[0].lines]


def test_a_cell_without_a_figure_is_a_gap_and_not_a_zero_or_a_bridge(builder: ModuleType) -> None:
    problems = [Problem(1, 16, length, 64) for length in LENGTHS]
    cells = [builder.ok_cell("whole", problem, 0.5) for problem in problems]
    cells += [builder.ok_cell("holed", problems[0], 0.4), builder.ok_cell("holed", problems[2], 0.4)]
    cells.append(builder.failed_cell("holed", problems[1], Status.INCORRECT, ["off"]))
    (plot,) = drawn(cells)
    missing = sorted(int(np.isnan(y).sum()) for y in lines(plot))
    assert missing == [0, 1]
    assert all(np.nanmin(y) > 0 for y in lines(plot))


def test_a_group_without_records_breaks_every_line(builder: ModuleType, tmp_path: Path) -> None:
    grid = builder.problems(lengths=LENGTHS, head_dims=(64,), directions=("fwd",))
    folder = builder.write_run(tmp_path, [group for group in grid if group[0].seqlen_q != LENGTHS[1]])
    bridged = list(plots(frame(load_run(folder)), [LATENCY]))
    builder.write_plan(folder, grid)
    broken = list(plots(frame(load_run(folder)), [LATENCY]))
    assert {len(y) for y in lines(bridged[0])} == {2}
    assert all(len(y) == 3 and np.isnan(y[1]) for y in lines(broken[0]))


def test_one_figure_a_metric_and_direction(builder: ModuleType) -> None:
    cells = [
        cell for group in builder.problems(head_dims=(64,)) for p in group for cell in builder.cells_of(p)
    ]
    names = [plot.name for plot in plots(frame(run_of(cells)), [LATENCY, MEMORY, METRICS["driver_memory"]])]
    assert names == ["latency_fwd", "memory_fwd", "latency_bwd", "memory_bwd"]


def test_files_are_the_same_bytes_twice_and_hold_no_markup_of_a_name(builder: ModuleType) -> None:
    cells = [
        builder.ok_cell(impl, Problem(1, 16, n, 64), 0.5)
        for n in LENGTHS
        for impl in (builder.HOSTILE, "$x_1^{", "_a")
    ]
    first, second = (drawn(cells)[0].encode("svg", "png") for _ in range(2))
    assert first == second
    document = ET.fromstring(first["svg"])
    assert not [element for element in document.iter() if element.tag.endswith("script")]
    texts = "".join(document.itertext())
    for shown in (builder.HOSTILE, "$x_1^{", "_a", "1k", "4k", "Time (ms)", "sequence length"):
        assert shown in texts, shown
    assert first["png"].startswith(b"\x89PNG")


def test_lines_join_only_problems_that_differ_in_length(builder: ModuleType) -> None:
    problems = [
        Problem(16384 // n, 16, n, 128, mask=Mask.causal()) for n in LENGTHS
    ]  # batch shrinks with length: one line
    problems += [Problem(16384 // n, 16, n, 128, kv_heads=4, mask=Mask.causal()) for n in LENGTHS]
    layout = lay_out(frame(run_of([builder.ok_cell("a", problem, 0.5) for problem in problems])))
    assert layout.by_length
    assert sorted(layout.cells["column"].unique()) == ["causal", "causal, 4 heads a kv head"]
    panels = layout.cells.groupby(["row", "column", "x"])["group"].nunique()
    assert panels.max() == 1


def test_decode_runs_over_keys_with_queries_told_apart(builder: ModuleType) -> None:
    problems = [
        Problem(1, 32, q, 128, kv_heads=8, seqlen_k=k, mask=Mask.causal()) for q in (1, 16) for k in LENGTHS
    ]
    layout = lay_out(frame(run_of([builder.ok_cell("a", problem, 0.01) for problem in problems])))
    assert layout.x_title == "keys (seqlen_k)"
    assert sorted(layout.cells["x"].unique()) == list(LENGTHS)
    assert sorted(layout.cells["column"].unique()) == ["causal, q 1", "causal, q 16"]


def test_single_cases_are_listed_by_name(builder: ModuleType) -> None:
    problems = [
        Problem(1, 4, 128, 64, dtype="fp32"),
        Problem(1, 8, 256, 64, kv_heads=2, dtype="fp32", mask=Mask.causal()),
        Problem(1, 4, 200, 64, seqlen_k=333, dtype="fp32", mask=Mask.causal()),
    ]
    cells = [builder.ok_cell(impl, problem, 0.1) for problem in problems for impl in ("a", "b")]
    (plot,) = drawn(cells)
    labels = [label.get_text() for label in plot.draw().axes[0].get_yticklabels()]
    assert labels == ["full, hd 64, 128", "causal, hd 64, 200 × 333", "causal, hd 64, 256, 4 heads a kv head"]


@pytest.mark.parametrize("lengths", [(1024,), (0, 1024, 2048)])
def test_odd_lengths_draw(builder: ModuleType, lengths: tuple[int, ...]) -> None:
    problems = [Problem(1, 4, length, 64) for length in lengths if length] or []
    cells = [builder.ok_cell("a", problem, 0.1) for problem in problems]
    cells += (
        [builder.failed_cell("a", Problem(1, 4, 0, 64), Status.UNSUPPORTED, ["empty"])]
        if 0 in lengths
        else []
    )
    assert drawn(cells)[0].encode("svg")["svg"].startswith(b"<?xml")


def test_many_masks_are_split_over_figures(builder: ModuleType) -> None:
    masks = [Mask.window(size, 0) for size in (64, 128, 256, 512, 1024)]
    cells = [builder.ok_cell("a", Problem(1, 16, n, 64, mask=mask), 0.5) for mask in masks for n in LENGTHS]
    assert [plot.name for plot in drawn(cells)] == ["latency_fwd_1", "latency_fwd_2"]


def test_nothing_to_draw() -> None:
    assert drawn([]) == []


def labels_that_meet(plot: Plot) -> list[tuple[str, str]]:
    """Neighbouring tick labels of either axis of the first panel that overlap as drawn; each axis has two at least."""
    met = []
    with mpl.rc_context(RC):
        figure = plot.draw()
        figure.draw_without_rendering()
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            assert len(shown) >= 2, axis.axis_name
            met += [
                (one.get_text(), other.get_text())
                for one, other in pairwise(shown)
                if one.get_window_extent().overlaps(other.get_window_extent())
            ]
    return met


@pytest.mark.parametrize("span", [1.5, 4.0, 40.0, 30000.0])
@pytest.mark.parametrize("by_length", [True, False])
def test_labels_of_a_logarithmic_axis_stay_apart(builder: ModuleType, by_length: bool, span: float) -> None:
    masks = [Mask(blocks=BlockPattern("random", 128, 128, density)) for density in (0.125, 0.25, 0.5)]
    problems = [
        Problem(4096 // n, 4, n, 64) if by_length else Problem(1, 4, 4096, 64, mask=mask)
        for n, mask in zip(LENGTHS, masks, strict=True)
    ]
    shares = (1e-5, 1e-5 / span, 1e-5)  # so that labels are long
    cells = [
        builder.ok_cell("of-28-characters-or-of-more-x", problem, share)
        for problem, share in zip(problems, shares, strict=True)
    ]
    (plot,) = drawn(cells)
    assert labels_that_meet(plot) == []


def test_the_least_memory_stands_beside_every_problem(builder: ModuleType) -> None:
    problems = [Problem(1, 4, n, 64, mask=Mask.window(n // 2, 0)) for n in LENGTHS]
    (plot,) = drawn([builder.ok_cell("a", problem, 0.5) for problem in problems], "memory")
    (least,) = plot.draw().axes[0].collections
    at = [min(float(x) for x, _ in segment) for segment in least.get_segments()]
    assert sorted(at) == pytest.approx(sorted(problem.minimal_result_bytes / 2**20 for problem in problems))
