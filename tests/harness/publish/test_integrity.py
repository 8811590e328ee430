"""Each rule of a row turns red by what it is there to see, and a row that breaks one is shown but not ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.publish import rows
from attnbench.harness.publish.boards import boards
from attnbench.harness.publish.clock_limit import least_ms
from attnbench.harness.publish.integrity import RULES, broken, examine
from attnbench.harness.run import journal
from attnbench.harness.run.record import Cell, Timing

H200 = {"id": "cuda:0", "name": "NVIDIA H200", "capability": [9, 0], "sm_count": 132, "max_sm_mhz": 1980}
PROBLEM = Problem(1, 16, 4096, 128)


@pytest.fixture
def cell(builder: ModuleType) -> Cell:
    """One that holds every rule."""
    made: Cell = builder.ok_cell("fused_a", PROBLEM, 0.8)
    return dataclasses.replace(made, source="0123456789abcdef", timing=timed(made, inputs=3))


def timed(cell: Cell, **fields: Any) -> Timing:
    assert cell.timing
    return dataclasses.replace(cell.timing, **fields)


def states(cell: Cell, device: dict[str, Any] | None = None) -> dict[str, str]:
    return {finding.rule: finding.state for finding in examine(cell, H200 if device is None else device)}


def test_an_honest_row_holds_every_rule(cell: Cell) -> None:
    assert set(states(cell)) == set(RULES)
    assert set(states(cell).values()) == {"held"}
    assert all(finding.why for finding in examine(cell, H200))


def test_a_cell_without_a_time_claims_nothing(builder: ModuleType) -> None:
    (refused, *_) = [c for c in builder.cells_of(PROBLEM) if not c.timing]
    assert examine(refused, H200) == []


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("timed calls checked", {"checked": 7}),
        ("fresh inputs", {"inputs": 1}),
        ("possible at the highest clock", {"rounds": [[0.4, 0.5], [0.5, 1e-4]]}),
    ],
)
def test_a_timing_that_breaks_a_rule_is_seen(cell: Cell, rule: str, change: dict[str, Any]) -> None:
    bad = dataclasses.replace(cell, timing=timed(cell, **change))
    assert states(bad)[rule] == "broken"
    (why,) = broken(examine(bad, H200))
    assert why.startswith(rule)


def test_one_set_of_inputs_that_was_renewed_is_fresh(cell: Cell) -> None:
    renewed = dataclasses.replace(cell, timing=timed(cell, inputs=1, renewed=True))
    assert states(renewed)["fresh inputs"] == "held"
    assert (
        states(dataclasses.replace(cell, timing=timed(cell, inputs=1, renewed=False)))["fresh inputs"]
        == "broken"
    )


def test_a_judgement_of_no_row_is_none(cell: Cell) -> None:
    assert cell.judgement
    empty = dataclasses.replace(cell, judgement=dataclasses.replace(cell.judgement, rows=0))
    assert states(empty)["answer judged"] == "broken"


@pytest.mark.parametrize(
    ("rule", "change"),
    [("fresh inputs", {"timing": {"inputs": None}}), ("source hash stored", {"source": ""})],
)
def test_what_an_older_record_does_not_say_is_unknown(cell: Cell, rule: str, change: dict[str, Any]) -> None:
    change = {name: timed(cell, **value) if name == "timing" else value for name, value in change.items()}
    older = dataclasses.replace(cell, **change)
    assert states(older)[rule] == "unknown"
    assert broken(examine(older, H200)) == []


@pytest.mark.parametrize("device", [{}, {**H200, "capability": [9, 9]}, {"id": "cpu", "name": "cpu"}])
def test_a_device_without_a_known_peak_accuses_nobody(cell: Cell, device: dict[str, Any]) -> None:
    assert states(cell, device)["possible at the highest clock"] == "unknown"


@pytest.mark.parametrize(
    ("device", "dtype", "tflops"),
    [
        # Dense peaks of the vendor's data sheets, at the boost clock they state.
        ({"capability": [9, 0], "sm_count": 132, "max_sm_mhz": 1830}, "bf16", 989.4),
        ({"capability": [8, 0], "sm_count": 108, "max_sm_mhz": 1410}, "bf16", 312),
        ({"capability": [8, 0], "sm_count": 108, "max_sm_mhz": 1410}, "fp32", 156),
        ({"capability": [8, 9], "sm_count": 128, "max_sm_mhz": 2520}, "fp16", 330.3),
        ({"capability": [7, 0], "sm_count": 80, "max_sm_mhz": 1530}, "fp16", 125),
    ],
)
def test_the_limit_is_the_data_sheets_peak(device: dict[str, Any], dtype: str, tflops: float) -> None:
    problem = dataclasses.replace(PROBLEM, dtype=dtype)
    least = least_ms(problem, device)
    assert least is not None
    assert problem.flops / least / 1e9 == pytest.approx(tflops, rel=0.01)


def test_a_refused_row_is_shown_with_the_reason_and_not_ranked(
    builder: ModuleType, environment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    group = [PROBLEM]
    cells = [
        builder.ok_cell(impl, PROBLEM, efficiency) for impl, efficiency in (("fast", 0.8), ("slow", 0.4))
    ]
    too_fast = dataclasses.replace(cells[0], impl="wonder", timing=timed(cells[0], rounds=[[1e-4]] * 8))
    cells.append(too_fast)
    folder = builder.write_run(tmp_path / "run", [group], environment(devices=[H200]))
    lines = map(journal.seal, [*cells, builder.group_of(cells)])
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    (run,) = rows.load([folder])
    (board,) = boards([run])[0].overall
    assert [place.standing.impl for place in board.ranked] == ["fast", "slow"]
    (unranked,) = board.unranked
    assert unranked.standing.impl == "wonder"
    assert unranked.why.startswith("REFUSED: possible at the highest clock: a sample of 0.0001 ms is below")
