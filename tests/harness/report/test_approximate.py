"""Approximations in a report: shown with their error, never ranked, never the best of a row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import load_run
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.ranking import rank
from attnbench.harness.report.tables import build
from attnbench.harness.run.record import Energy, Judgement, TensorError


@pytest.fixture
def table(run_folder: Path) -> Any:
    """A run's frame in which the fastest implementation is an approximation that is off by a tenth."""
    run = load_run(run_folder)
    fastest = rank(frame(run), METRICS["latency"], "fwd").order[0]
    off = TensorError(0.5, 0.02, 0.01, 0.001, ok=False, first_bad=(0, 0, 0, 0), mean_want=0.2)
    near = TensorError(0.001, 0.0001, 0.01, 0.001, ok=True)

    def made_rough(cell: Any) -> Any:
        if cell.impl != fastest or cell.judgement is None or not cell.timing:
            return cell
        judgement = Judgement({"out": off, "lse": near}, 1, 1)
        return dataclasses.replace(
            cell, approximate=True, judgement=judgement, energy=Energy(500.0, 250, 2.0)
        )

    return frame(dataclasses.replace(run, cells=[made_rough(cell) for cell in run.cells]))


def test_its_error_is_relative_to_what_is_right(table: Any) -> None:
    rough = table[table["approximate"].fillna(value=False)]
    assert len(rough)
    assert rough["error_percent"].to_numpy() == pytest.approx(10)
    assert rough["energy_j"].to_numpy() == pytest.approx(2)
    assert table.loc[~table["approximate"].fillna(value=False), "error_percent"].isna().all()


def test_it_is_marked_unranked_and_never_best(table: Any) -> None:
    (name,) = table.loc[table["approximate"].fillna(value=False), "impl"].unique()
    assert name.endswith(" (approximate)")
    standings = {s.impl: s for s in rank(table, METRICS["latency"], "fwd").standings}
    assert standings[name].rank is None
    assert standings[name].covered
    assert any(s.rank == 1 for s in standings.values())
    built = build(table, [METRICS["latency"]]).tables[0]
    column = built.impls.index(name)
    assert all(not entries[column].mark for _, entries in built.rows)
    assert any(entry.mark == "best" for _, entries in built.rows for entry in entries)
