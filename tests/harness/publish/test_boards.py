"""Rankings by family: of one run, the latest; the same numbers as the report's; nothing lost between families."""

from __future__ import annotations

import dataclasses

import pytest

from attnbench.harness.publish.boards import Board, boards
from attnbench.harness.publish.cells import lines_of
from attnbench.harness.publish.rows import PublishedRun, published
from attnbench.harness.publish.support import matrices
from attnbench.harness.publish.timeline import timelines
from attnbench.harness.report.frame import frame
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.ranking import rank
from attnbench.harness.run.record import Judgement, TensorError


@pytest.fixture(scope="module")
def board(runs: list[PublishedRun]) -> Board:
    (found,) = boards(runs)
    return found


def test_a_device_and_a_suite_make_a_board(board: Board) -> None:
    assert (board.device, board.suite) == ("NVIDIA H200", "made-up")
    assert [column.ranking.direction for column in board.overall] == ["fwd", "bwd"]


def test_the_suite_that_poses_most_comes_first(runs: list[PublishedRun]) -> None:
    newer, older = (run.run for run in runs)
    aside = [dataclasses.replace(cell, suite="aside") for cell in older.cells]
    latest = published(dataclasses.replace(older, cells=aside))
    found = boards([latest, published(newer)])
    assert [(board.suite, board.posed) for board in found] == [("made-up", 16), ("aside", 4)]


def test_a_line_tells_dropout(runs: list[PublishedRun]) -> None:
    cells = [
        dataclasses.replace(cell, problem=dataclasses.replace(cell.problem, dropout_p=0.1))
        for cell in runs[0].run.cells
    ]
    told, plain = (
        {line["mask"] for line in lines_of(run)}
        for run in (published(dataclasses.replace(runs[0].run, cells=cells)), runs[0])
    )
    assert plain == {"full", "causal"}
    assert told == {"full, dropout 0.1", "causal, dropout 0.1"}


def test_the_latest_run_speaks(board: Board, runs: list[PublishedRun]) -> None:
    assert {column.run.slug for column in board.families} == {runs[0].slug}
    assert len(board.families) == 2 * 2 * 2


def test_a_family_that_only_an_older_run_posed_is_still_there(runs: list[PublishedRun]) -> None:
    older_is_latest = boards(list(reversed(runs)))[0]
    by_run = {column.run.slug for column in older_is_latest.families}
    assert by_run == {run.slug for run in runs}
    assert len(older_is_latest.families) == 8


def test_overall_rankings_are_the_reports(board: Board, runs: list[PublishedRun]) -> None:
    table = frame(runs[0].run)
    for column in board.overall:
        expected = rank(table, METRICS["latency"], column.ranking.direction)
        assert [place.standing for place in column.places] == expected.standings


def test_every_problem_is_in_one_family(board: Board, runs: list[PublishedRun]) -> None:
    posed = {row.cell.problem.key for row in runs[0].rows}
    assert sum(column.ranking.posed for column in board.families) == len(posed)


def test_a_place_has_its_geometric_means(board: Board) -> None:
    (column,) = [c for c in board.families if c.family and c.family.key == "fwd-full-d128-bf16"]
    leader = column.ranked[0]
    assert leader.standing.rank == 1
    assert leader.ceiling is not None
    assert 0 < leader.ceiling < 100
    assert all(place.why for place in column.unranked)


def test_an_approximation_is_shown_with_its_error_and_neither_ranked_nor_refused(
    runs: list[PublishedRun],
) -> None:
    off = TensorError(0.5, 0.02, 0.01, 0.001, ok=False, first_bad=(0, 0, 0, 0), mean_want=0.2)
    rough = Judgement({"out": off}, 64, 64)
    cells = [
        dataclasses.replace(cell, approximate=True, judgement=rough)
        if cell.impl == "fused_a" and cell.timing
        else cell
        for cell in runs[0].run.cells
    ]
    run = published(dataclasses.replace(runs[0].run, cells=cells))
    assert not [row.refusals for row in run.rows if row.refusals]
    for column in boards([run])[0].overall:
        place = column.of["fused_a (approximate)"]
        assert place.standing.rank is None
        assert place.why == "an approximation, its mean error up to 10%"
        assert column.ranked[0].standing.impl == "fused_b"
    assert all(
        baseline.cell.impl != "fused_a"
        for row in run.rows
        if row.cell.timing and (baseline := run.baseline_of(row))
    )
    lines = [line for line in lines_of(run) if line["impl"] == "fused_a (approximate)"]
    assert lines
    assert all(line["status"] == "OK" for line in lines)


def test_support_says_yes_no_failed_absent_and_counts(runs: list[PublishedRun]) -> None:
    (matrix,) = matrices(runs)
    place = {feature: number for number, feature in enumerate(matrix.features)}
    forward, backward = place["direction", "forward"], place["direction", "backward"]
    state = {impl: [entry.state for entry in entries] for impl, entries in matrix.entries.items()}
    assert state["fused_a"][forward] == "yes"
    assert state["compiled"][backward] == "failed"
    assert state["unlucky"][forward] == "failed"
    assert state["other_vendor"][forward] == "absent"
    assert state["forward_only"][backward] == "no"
    hostile = matrix.entries["<script>alert(1)</script>"][forward]
    assert (hostile.state, hostile.ok, hostile.posed) == ("partly", 4, 8)
    assert [group for group, _ in matrix.features] == sorted(
        (group for group, _ in matrix.features), key=["direction", "dtype", "mask", "head_dim", "shape"].index
    )


def test_support_counts_a_problem_once_over_runs(runs: list[PublishedRun]) -> None:
    (both,), (newest,) = matrices(runs), matrices(runs[:1])
    assert both == newest


def test_a_timeline_compares_on_what_all_runs_completed(runs: list[PublishedRun]) -> None:
    forward = timelines(runs)[0]
    assert [run.slug for run in forward.runs] == [run.slug for run in reversed(runs)]
    assert forward.cells["fused_a"] == 2  # the older run posed two groups
    older, newer = forward.percent["fused_a"]
    assert older == pytest.approx(newer)  # made up alike
    assert next(iter(forward.percent)) in {"fused_a", "fused_b"}
    assert "unlucky" not in forward.percent
