from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import LoadError, load_run


@pytest.fixture
def small(builder: ModuleType, tmp_path: Path) -> Path:
    return builder.write_run(tmp_path / "run", builder.problems(lengths=(1024, 4096), head_dims=(64,)))


def test_a_whole_run_has_no_problems(small: Path) -> None:
    run = load_run(small)
    assert run.problems == []
    assert len(run.groups) == 4
    assert {cell for group in run.groups for cell in group.cells} == {cell.id for cell in run.cells}
    assert run.environment["devices"][0]["name"] == "NVIDIA H200"


@pytest.mark.parametrize("change", ["torn", "flipped", "schema"])
def test_a_bad_line_is_named_and_the_other_groups_are_still_there(small: Path, change: str) -> None:
    path = small / "records.jsonl"
    lines = path.read_text().splitlines()
    bad = {
        "torn": lines[2][:200],
        "flipped": lines[2].replace("bf16", "fp16", 1),
        "schema": '{"schema":9,"kind":"cell"}',
    }
    path.write_text("\n".join([*lines[:2], bad[change], *lines[3:]]) + "\n")
    run = load_run(small)
    assert any(problem.startswith("records.jsonl:3: ") for problem in run.problems)
    assert len(run.groups) == 3


def test_records_without_an_environment_still_load(small: Path) -> None:
    (small / "environment.json").unlink()
    run = load_run(small)
    assert run.cells
    assert run.environment == {}
    assert run.problems == ["environment.json: not there; device, versions and command line are unknown"]


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not readable"), ("[]", "holds a list"), ('{"schema": 7}', "schema 7")]
)
def test_an_odd_environment_is_named(small: Path, text: str, said: str) -> None:
    (small / "environment.json").write_text(text)
    run = load_run(small)
    assert [said in problem for problem in run.problems] == [True]
    assert run.environment == (json.loads(text) if text.startswith('{"') else {})


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="not a folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"holds no records\*\.jsonl"):
        load_run(tmp_path)


def test_groups_that_were_planned_and_have_no_record_are_missing(builder: ModuleType, small: Path) -> None:
    planned = builder.problems(lengths=(1024, 4096, 16384), head_dims=(64,))
    builder.write_plan(small, planned)
    run = load_run(small)
    assert [plan.problems[0].seqlen_q for plan in run.missing] == [16384, 16384]
    assert run.problems == []


@pytest.mark.parametrize("text", ["{", "[]", '{"plans": [{"suite": 1}]}'])
def test_an_odd_plan_is_named(small: Path, text: str) -> None:
    (small / "plan.json").write_text(text)
    run = load_run(small)
    assert [problem.partition(":")[0] for problem in run.problems] == ["plan.json"]
    assert run.missing == []


def test_counters_beside_the_records_join_their_cells(small: Path) -> None:
    cell = next(cell for cell in load_run(small).cells if cell.timing)
    least = cell.problem.minimal_bytes
    moved = {"dram_read": least, "dram_write": least, "l2": 9 * least}
    counted = {"impl": cell.impl, "problem": cell.problem.to_json()} | moved
    refused = counted | {"impl": "other", "dram_read": None}
    (small / "counters.json").write_text(json.dumps({"schema": 1, "counted": [counted, refused]}))
    table = frame(load_run(small))
    shown = table[table["dram_over_least"].notna()]
    assert list(shown["impl"]) == [cell.impl]
    assert shown[["dram_over_least", "l2_over_least"]].to_numpy().tolist() == [[2, 9]]


def test_counters_that_cannot_be_read_are_named(small: Path) -> None:
    (small / "counters.json").write_text("[]")
    assert any(problem.startswith("counters.json: not readable") for problem in load_run(small).problems)
