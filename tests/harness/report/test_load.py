from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

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
