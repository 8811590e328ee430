"""A row's address: the same for the same content wherever it was measured, another for any other content."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attnbench.harness.publish import rows
from attnbench.harness.publish.rows import PublishedRun, address_of, content_of
from attnbench.harness.report.load import LoadError
from attnbench.harness.run.record import Cell

DEVICE = {"id": "cuda:0", "name": "NVIDIA H200", "driver": "580", "sm_count": 132}


@pytest.fixture
def cell(builder: ModuleType) -> Cell:
    made: Cell = builder.ok_cell("fused_a", builder.problems()[0][0], 0.8)
    return dataclasses.replace(made, source="0123456789abcdef")


def address(
    cell: Cell, environment: dict[str, Any], seed: int = 1, device: dict[str, Any] | None = None
) -> str:
    return address_of(content_of(cell, seed, environment, device or DEVICE))


def test_an_address_is_hexadecimal_and_repeats(
    cell: Cell, environment: Callable[..., dict[str, Any]]
) -> None:
    first = address(cell, environment())
    assert re.fullmatch(r"[0-9a-f]{12}", first)
    assert first == address(cell, environment())


def test_figures_names_and_dates_are_not_content(
    cell: Cell, builder: ModuleType, environment: Callable[..., dict[str, Any]]
) -> None:
    again = dataclasses.replace(cell, run="another", timing=builder.timing(cell.problem, 0.1), prepare_ms=9.0)
    later = environment(started="2027-01-01T00:00:00+00:00", run="another", command=["bench"])
    assert address(again, later) == address(cell, environment())


@pytest.mark.parametrize(
    "change",
    [{"impl": "b"}, {"impl_version": "9"}, {"source": "f" * 16}, {"suite": "b"}, {"case": "b"}],
    ids=lambda change: next(iter(change)),
)
def test_another_implementation_or_case_is_another_row(
    cell: Cell, environment: Callable[..., dict[str, Any]], change: dict[str, Any]
) -> None:
    assert address(dataclasses.replace(cell, **change), environment()) != address(cell, environment())


def test_another_problem_seed_environment_or_device_is_another_row(
    cell: Cell, environment: Callable[..., dict[str, Any]]
) -> None:
    problem = dataclasses.replace(cell.problem, batch=3)
    addresses = [
        address(cell, environment()),
        address(dataclasses.replace(cell, problem=problem), environment()),
        address(cell, environment(), seed=2),
        address(cell, environment(torch="2.13.0")),
        address(cell, environment(mode="hot")),
        address(cell, environment(packages={"numpy": "1"})),
        address(cell, environment(), device={**DEVICE, "driver": "590"}),
    ]
    assert len(set(addresses)) == len(addresses)


def test_runs_come_latest_first_with_names_of_their_own(
    runs: list[PublishedRun], folders: list[Path]
) -> None:
    assert [run.slug for run in runs] == ["nvidia-h200-newer", "nvidia-h200-older"]
    twice = rows.load([folders[0], folders[0] / ".." / "older"])
    assert len(twice) == 1


def test_two_folders_of_one_name_get_two_names(builder: ModuleType, tmp_path: Path) -> None:
    group = builder.problems(lengths=(1024,), head_dims=(64,))[:1]
    for parent in ("a", "A"):
        builder.write_run(tmp_path / parent / "run", group)
    loaded = rows.load([tmp_path / "a" / "run", tmp_path / "A" / "run"])
    assert sorted(run.slug for run in loaded) == ["a-run", "a-run-2"]


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no records\*\.jsonl"):
        rows.load([tmp_path])


def test_a_baseline_ships_with_torch_where_one_does(runs: list[PublishedRun]) -> None:
    run = runs[0]
    row = next(row for row in run.rows if row.cell.impl == "fused_a" and row.cell.timing)
    plain = run.baseline_of(row)
    assert plain
    assert plain.cell.impl != "fused_a"
    assert plain.cell.problem == row.cell.problem
    # The same run, had torch shipped the slowest of them.
    cells = [
        dataclasses.replace(cell, impl_version="2.11.0") if cell.impl == "eager" else cell
        for cell in run.run.cells
    ]
    shipped = rows.published(dataclasses.replace(run.run, cells=cells))
    again = next(r for r in shipped.rows if r.cell.impl == "fused_a" and r.cell.problem == row.cell.problem)
    found = shipped.baseline_of(again)
    assert found
    assert found.cell.impl == "eager"


def test_a_row_alone_in_its_rounds_has_no_baseline(builder: ModuleType, tmp_path: Path) -> None:
    run = rows.load([builder.write_run(tmp_path, builder.problems()[:1])])[0]
    lonely = dataclasses.replace(run.run, cells=[cell for cell in run.run.cells if cell.impl == "fused_a"])
    published = rows.published(lonely)
    assert published.baseline_of(published.rows[0]) is None
