from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.harness.report.frame import frame, with_speedup
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.summary import summarise
from attnbench.harness.report.tables import Entry, Table, Tables, build, figure, length_text, row_labels
from attnbench.harness.run.record import Cell, Status

PROBLEM = Problem(1, 16, 4096, 64)


@pytest.fixture(scope="module")
def tables(run_folder: Path) -> Tables:
    metrics = [METRICS[name] for name in ("latency", "tflops", "speedup", "memory", "driver_memory")]
    return build(with_speedup(frame(load_run(run_folder)), "older"), metrics, "older")


def entries(table: Table, row: int) -> dict[str, Entry]:
    return dict(zip(table.impls, table.rows[row][1], strict=True))


def one_table(builder: ModuleType, cells: list[Cell], metric: str = "latency") -> Tables:
    return build(frame(Run(Path(), cells, [builder.group_of(cells)])), [METRICS[metric]])


def test_one_table_a_metric_and_direction_and_none_for_a_metric_nobody_has(tables: Tables) -> None:
    shown = [(table.metric.name, table.direction) for table in tables.tables]
    names = ("latency", "tflops", "speedup", "memory")
    assert shown == [(name, direction) for direction in ("fwd", "bwd") for name in names]
    assert all(len(table.rows) == 12 for table in tables.tables)
    assert tables.tables[2].title == "Speed-up over older (×), forward"


def test_rows_are_named_by_what_differs_in_reading_order(tables: Tables) -> None:
    table = tables.tables[0]
    assert table.labels == ["mask", "head_dim", "heads", "batch", "seqlen"]
    assert [labels[-1] for labels, _ in table.rows[:3]] == ["1k", "4k", "16k"]
    assert [labels[0] for labels, _ in table.rows] == ["full"] * 6 + ["causal"] * 6
    assert table.fixed == "dtype bf16"


def test_a_cell_without_a_figure_shows_its_status_and_reason(tables: Tables) -> None:
    notes = dict(tables.notes)
    oom = entries(tables.tables[0], 2)["eager"]
    assert (oom.text, oom.mark, oom.reason) == ("OOM", "", "tried to allocate 128.00 GiB, 88 GiB we…")
    assert notes[oom.note] == "OOM: tried to allocate 128.00 GiB, 88 GiB were free"
    backward = tables.tables[4]
    incorrect = next(
        e for row in range(12) if (e := entries(backward, row)["compiled"]).status == "INCORRECT"
    )
    assert "out[0, 17, 3, 5] is 1.5" in notes[incorrect.note]
    assert incorrect.mark == ""


def test_one_that_could_run_nothing_is_named_below_with_why(tables: Tables) -> None:
    left_out = {impl: dict(tables.notes)[note] for impl, note in tables.tables[0].left_out}
    assert left_out == {
        "forward_only": "UNSUPPORTED: has no backward pass",
        "other_vendor": "UNAVAILABLE: module other_vendor is not installed",
    }
    assert "unlucky" in tables.tables[0].impls  # failed everywhere: that is a finding, and stays in sight


def test_the_best_is_marked_and_what_cannot_be_told_from_it(builder: ModuleType) -> None:
    speeds = {"best": 0.8, "close": 0.8, "other": 0.79}
    cells = [builder.ok_cell(impl, PROBLEM, speed) for impl, speed in speeds.items()]
    found = entries(one_table(builder, cells).tables[0], 0)
    assert sorted(entry.mark for entry in found.values()) == ["", "best", "tied"]
    assert found["other"].mark == ""


def test_the_best_by_rate_is_the_largest(builder: ModuleType) -> None:
    cells = [builder.ok_cell(impl, PROBLEM, speed) for impl, speed in (("fast", 0.8), ("slow", 0.4))]
    for metric in ("latency", "tflops", "percent_of_gemm"):
        found = entries(one_table(builder, cells, metric).tables[0], 0)
        assert (found["fast"].mark, found["slow"].mark) == ("best", "")


def test_a_wrong_cell_is_not_best_and_leaves_nothing_to_beat(builder: ModuleType) -> None:
    wrong = builder.failed_cell("wrong", PROBLEM, Status.INCORRECT, ["off"])
    found = one_table(builder, [wrong, builder.ok_cell("right", PROBLEM, 0.1)])
    assert [entry.mark for entry in entries(found.tables[0], 0).values()] == ["", ""]
    assert [(s.impl, s.rank) for s in found.rankings[0].standings] == [("right", 1), ("wrong", None)]


def test_a_cell_that_was_never_recorded_is_not_called_anything_else(builder: ModuleType) -> None:
    second = Problem(1, 16, 8192, 64)
    cells = [builder.ok_cell("a", PROBLEM, 0.5), builder.ok_cell("b", PROBLEM, 0.5)]
    more = [builder.ok_cell("a", second, 0.5)]
    run = Run(Path(), cells + more, [builder.group_of(cells), builder.group_of(more)])
    missing = entries(build(frame(run), [METRICS["latency"]]).tables[0], 1)["b"]
    assert (missing.text, missing.status) == ("–", "not recorded")


def test_a_planned_group_without_records_is_a_row_that_says_so(builder: ModuleType, tmp_path: Path) -> None:
    grid = builder.problems(head_dims=(64,), directions=("bwd",))
    folder = builder.write_run(tmp_path, grid[1:])
    builder.write_plan(folder, grid)
    run = load_run(folder)
    made = build(frame(run), [METRICS["latency"]])
    (table,) = made.tables
    assert {entry.text for entry in table.rows[0][1]} == {"not recorded"}
    assert "forward_only" not in table.impls  # what could run none of the others is not shown for its sake
    assert (made.rankings[0].posed, made.rankings[0].standings[0].covered) == (len(grid), len(grid) - 1)
    said = f"1 of {len(grid)} planned groups have no records"
    assert any(warning.startswith(said) for warning in summarise(run, frame(run)).warnings)


def test_problems_that_only_the_case_or_key_tells_apart_get_it(builder: ModuleType) -> None:
    strided = Problem(1, 16, 1024, 64, strides=(("q", (0, 64, 64, 1)),))
    problems = [Problem(1, 16, 1024, 64), strided, Problem(1, 16, 1024, 64, mask=Mask.causal())]
    table = frame(Run(Path(), [builder.ok_cell("a", problem, 0.5) for problem in problems], []))
    labels, _ = row_labels(table)
    assert len(labels.drop_duplicates()) == 3


def test_an_empty_run_has_no_tables() -> None:
    assert build(frame(Run(Path(), [], [])), [METRICS["latency"]]).tables == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (99.96, "100.0"),
        (1234.5, "1234"),
        (1e-5, "1.00e-05"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert figure(value) == text.replace("100.0", "100.")


@pytest.mark.parametrize(
    ("value", "text"), [(1024, "1k"), (131072, "128k"), (1000, "1000"), (1777, "1777"), (384, "384")]
)
def test_lengths(value: int, text: str) -> None:
    assert length_text(value) == text
