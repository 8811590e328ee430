from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.report.summary import summarise


def test_the_head_of_a_report(run_folder: Path) -> None:
    run = load_run(run_folder)
    found = summarise(run, frame(run))
    facts = dict(found.facts)
    assert found.title == "attnbench: made-up on NVIDIA H200"
    assert facts["command"] == "bench run --suite made-up --only '<script>alert(1)</script>'"
    assert facts["commit"] == "0123456789ab with uncommitted changes"
    assert sum(share for _, _, share in found.phases) == pytest.approx(1)
    assert found.phases[0][0] == "prepare"
    assert dict(found.counts)["INCORRECT"] == 2
    assert sum(count for _, count in found.counts) == len(run.cells)
    assert ("devices[0].sm_count", "132") in found.environment


def test_warnings_name_what_a_reader_must_know(run_folder: Path) -> None:
    run = load_run(run_folder)
    said = "\n".join(summarise(run, frame(run)).warnings)
    for part in (
        "declares torch<2.11",
        "uncommitted changes",
        "4242 someone_else",
        "power cap",
        "118 samples were thrown away",
    ):
        assert part in said, part


def test_a_bare_run_is_summarised_and_says_so(builder: ModuleType, tmp_path: Path) -> None:
    folder = builder.write_run(tmp_path, builder.problems(lengths=(1024,), head_dims=(64,)), environment={})
    run = load_run(folder)
    found = summarise(run, frame(run))
    assert found.title == "attnbench: made-up on cuda:0"
    assert any(warning.startswith("environment.json: not there") for warning in found.warnings)


def test_odd_environments_do_not_stop_a_report() -> None:
    odd = {"command": "bench run", "devices": None, "warnings": None, "host": [], "packages": {"a": None}}
    empty = Run(Path(), [], [], odd)
    found = summarise(empty, frame(empty))
    assert dict(found.facts)["command"] == "bench run"
    assert (found.phases, found.counts) == ([], [])


def test_a_processor_is_called_by_its_name() -> None:
    run = Run(
        Path(),
        [],
        [],
        {"devices": [{"id": "cpu", "name": "cpu"}], "host": {"cpu": "a CPU"}, "suite": "smoke"},
    )
    assert summarise(run, frame(run)).title == "attnbench: smoke on cpu (a CPU)"


def test_many_lines_with_one_cause_are_one_sentence() -> None:
    run = Run(
        Path(),
        [],
        [],
        {},
        [f"records.jsonl:{n}: its group g is not complete" for n in range(3, 9)] + ["x.jsonl:1: torn"],
    )
    assert summarise(run, frame(run)).warnings == [
        "records.jsonl:3 to records.jsonl:8: its group g is not complete",
        "x.jsonl:1: torn",
    ]


def test_what_a_resumed_part_stood_on_is_told(builder: ModuleType, tmp_path: Path) -> None:
    later = {"started": "2026-11-21", "differs": ["torch was 2.11.0 and is 2.13.0"]}
    environment = builder.ENVIRONMENT | {"resumed": [later, {"started": "2026-11-22", "differs": []}]}
    run = load_run(builder.write_run(tmp_path, builder.problems(head_dims=(64,)), environment))
    summary = summarise(run, frame(run))
    assert [text for name, text in summary.facts if name == "resumed"] == ["2026-11-21", "2026-11-22"]
    told = [warning for warning in summary.warnings if "other ground" in warning]
    assert told == ["resumed 2026-11-21 on other ground: torch was 2.11.0 and is 2.13.0"]
