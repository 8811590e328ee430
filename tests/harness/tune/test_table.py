"""Tables brought up to date, and what is shown of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.report.stats import Estimate
from attnbench.harness.run.errors import RunError
from attnbench.harness.tune.search import Trial, Tuned
from attnbench.harness.tune.table import COLUMNS, rows, updated


def environment(name: str = "NVIDIA H200") -> dict[str, Any]:
    return {"devices": [{"name": name, "capability": [9, 0]}], "torch": "2.11", "triton": "3.6"}


def tuned(seqlen: int, low: float = 1.1, choice: int = 1, why: str = "") -> Tuned:
    problem = Problem(1, 1, seqlen, 64)
    unasked, best = (Trial(i, f"c{i}", {"n": seqlen}, {"c": i}, rounds=[[1.0]] * 5) for i in (0, choice))
    if why:
        return Tuned("planted", problem, why=why)
    return Tuned("planted", problem, [unasked, best], best, Estimate(1.2, low, 1.3))


def written(path: Path, *found: Tuned) -> Path:
    path.write_text(json.dumps(updated(path, found, environment())))
    return path


def test_a_table_says_where_it_holds_and_keeps_what_is_faster(tmp_path: Path) -> None:
    document = updated(None, [tuned(64), tuned(128, low=0.99), tuned(256, why="absent")], environment())
    assert document["device"] == {"name": "NVIDIA H200", "capability": [9, 0]}
    assert document["environment"]["triton"] == "3.6"
    assert [entry["key"] for entry in document["choices"]] == [{"n": 64}]


def test_a_problem_tuned_again_has_one_entry_and_others_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "table.json", tuned(64), tuned(128), tuned(256))
    document = updated(
        path, [tuned(64, choice=2), tuned(128, low=0.9), tuned(256, why="absent")], environment()
    )
    assert [(e["key"]["n"], e["choice"]["c"]) for e in document["choices"]] == [(256, 1), (64, 2)]


def test_tables_of_two_devices_do_not_mix(tmp_path: Path) -> None:
    path = written(tmp_path / "table.json", tuned(64))
    with pytest.raises(RunError, match="tuned on NVIDIA H200, and this is NVIDIA A100"):
        updated(path, [], environment("NVIDIA A100"))


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2, "device": {}, "choices": []}', '{"schema": 1}'])
def test_a_file_that_is_no_table_is_not_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(RunError, match="not a table that bench tune wrote"):
        updated(tmp_path / "table.json", [], environment())


def test_every_problem_has_its_line() -> None:
    kept, doubtful, failed = rows([tuned(64), tuned(128, low=0.99), tuned(256, why="absent")])
    assert {len(row) for row in (kept, doubtful, failed)} == {len(COLUMNS)}
    assert (kept[0], kept[-2], kept[-1]) == (
        "planted/" + Problem(1, 1, 64, 64).key,
        "1.200 (1.100 to 1.300)",
        "yes",
    )
    assert doubtful[-1] == "no"
    assert "absent" in failed
