from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import Run
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.ranking import Ranking, rank
from attnbench.harness.run.record import Cell, Status

PROBLEMS = [Problem(1, 16, length, 64) for length in (1024, 2048, 4096, 8192)]


def ranking(builder: ModuleType, cells: list[Cell], metric: str = "latency") -> Ranking:
    groups = {cell.group: [c for c in cells if c.group == cell.group] for cell in cells}
    run = Run(Path(), cells, [builder.group_of(members) for members in groups.values()])
    return rank(frame(run), METRICS[metric], "fwd")


def places(found: Ranking) -> dict[str, int | None]:
    return {standing.impl: standing.rank for standing in found.standings}


def test_fast_before_slow_and_equals_share_a_place(builder: ModuleType) -> None:
    speeds = {"fast": 0.8, "twin": 0.8, "slow": 0.79, "last": 0.3}
    found = ranking(
        builder, [builder.ok_cell(impl, p, speed) for p in PROBLEMS for impl, speed in speeds.items()]
    )
    assert places(found) == {"fast": 1, "twin": 1, "slow": 3, "last": 4}
    assert found.standings[0].score.value == pytest.approx(1)
    assert 0.3 / 0.8 < found.standings[-1].score.value < 0.42  # a fixed 5 us of launch narrows the gap


def test_a_drift_of_the_card_does_not_tie_what_differs_by_one_percent(builder: ModuleType) -> None:
    cells = [builder.ok_cell(impl, PROBLEMS[-1], speed) for impl, speed in (("a", 0.80), ("b", 0.79))]
    times = frame(Run(Path(), cells, [builder.group_of(cells)])).set_index("impl")
    assert times.at["b", "median_ms_low"] < times.at["a", "median_ms_high"]  # alone, the intervals overlap
    assert places(ranking(builder, cells)) == {"a": 1, "b": 2}


def test_one_that_failed_is_listed_and_never_ranked(builder: ModuleType) -> None:
    cells = [builder.ok_cell("right", p, 0.1) for p in PROBLEMS]
    cells += [
        builder.failed_cell("wrong", p, Status.INCORRECT, ["out[0, 17, 3, 5] is off"]) for p in PROBLEMS
    ]
    found = ranking(builder, cells)
    assert places(found) == {"right": 1, "wrong": None}
    assert [(s.impl, s.covered) for s in found.standings] == [("right", 4), ("wrong", 0)]
    assert found.posed == 4


def test_only_common_cells_count(builder: ModuleType) -> None:
    """``picky`` skips the problem on which everyone is slow; it may not win by that."""
    problems = [Problem(1, 16, 1024 * (1 + place), 64) for place in range(10)]
    cells = [builder.ok_cell("steady", p, 0.5 if p != problems[0] else 0.01) for p in problems]
    cells += [builder.ok_cell("picky", p, 0.45) for p in problems[1:]]
    found = ranking(builder, cells)
    assert found.common == 9
    assert places(found) == {"steady": 1, "picky": 2}


def test_one_with_too_few_cells_does_not_shrink_the_common_set(builder: ModuleType) -> None:
    cells = [builder.ok_cell(impl, p, 0.5) for p in PROBLEMS for impl in ("a", "b")]
    cells.append(builder.ok_cell("narrow", PROBLEMS[0], 0.9))
    found = ranking(builder, cells)
    assert found.common == 4
    assert places(found)["narrow"] is None
    assert found.order[-1] == "narrow"


@pytest.mark.parametrize("metric", ["latency", "memory"])
def test_what_has_no_rank_stands_beside_the_leader_over_its_own_cells(
    builder: ModuleType, metric: str
) -> None:
    cells = [builder.ok_cell("a", p, 0.4 if p.seqlen_q < 8192 else 0.01) for p in PROBLEMS]
    short = [builder.ok_cell("scores", p, 0.2) for p in PROBLEMS[:3]]
    beside = ranking(builder, [*cells, *short], metric).standings[-1]
    assert (beside.impl, beside.rank, beside.geomean) == ("scores", None, None)
    ranked = ranking(builder, [*cells[:3], *short], metric).standings[-1]
    assert ranked.rank == (2 if metric == "latency" else 1)
    assert beside.score.value == pytest.approx(ranked.score.value)
    if metric == "latency":
        assert beside.score.low <= beside.score.value <= beside.score.high


def test_memory_ties_only_where_equal(builder: ModuleType) -> None:
    cells = [
        builder.ok_cell(impl, p, s)
        for p in PROBLEMS
        for impl, s in (("a", 0.5), ("b", 0.4), ("scores", 0.05))
    ]
    assert places(ranking(builder, cells, "memory")) == {"a": 1, "b": 1, "scores": 3}


def test_nothing_ran(builder: ModuleType) -> None:
    cells = [builder.failed_cell("a", p, Status.OOM, ["out of memory"]) for p in PROBLEMS]
    found = ranking(builder, cells)
    assert (found.common, found.posed, places(found)) == (0, 4, {"a": None})


def test_a_single_round_ranks_without_intervals(builder: ModuleType) -> None:
    cells = [builder.ok_cell(impl, p, s, rounds=1) for p in PROBLEMS for impl, s in (("a", 0.5), ("b", 0.4))]
    found = ranking(builder, cells)
    assert places(found) == {"a": 1, "b": 2}
    assert pd.isna(found.standings[0].score.low)
