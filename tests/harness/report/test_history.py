from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.problem import Problem
from attnbench.harness.report.history import REPEATABILITY, change_points
from attnbench.harness.run.journal import Journal

PROBLEM = Problem(batch=4, heads=16, seqlen_q=4096, head_dim=128)


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, REPEATABILITY, count)


@pytest.mark.parametrize("count", [2, 5, 20, 60])
def test_runs_that_only_repeat_have_no_change(count: int) -> None:
    sigmas = np.full(count, REPEATABILITY)
    found = sum(bool(change_points(noise(seed, count), sigmas)) for seed in range(300))
    assert found <= 6  # 2%


@pytest.mark.parametrize(("count", "at"), [(6, 3), (20, 5), (40, 38)])
def test_a_step_is_found_where_it_is(count: int, at: int) -> None:
    step = np.where(np.arange(count) >= at, 0.08, 0.0)
    found = [change_points(noise(seed, count) + step, np.full(count, REPEATABILITY)) for seed in range(100)]
    assert sum(points == [at] for points in found) >= 93


def test_two_steps_and_one_wild_run_that_was_uncertain() -> None:
    values = np.array([0, 0, 0, 0.5, 0, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1])
    sigmas = np.full(11, REPEATABILITY)
    sigmas[3] = 0.3  # its rounds were all over the place
    assert change_points(values, sigmas) == [5, 8]


def bench(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="bench")


@pytest.fixture
def results(builder: ModuleType, tmp_path: Path) -> Path:
    """Six runs of two implementations; one becomes a third slower with the fourth, which came with another torch."""
    for number in range(6):
        folder = tmp_path / "results" / "card" / f"2026-01-0{number + 1}-abc"
        speeds = {"steady": 0.5, "moved": 0.6 if number < 3 else 0.45}
        cells = [builder.ok_cell(impl, PROBLEM, speed) for impl, speed in speeds.items()]
        journal = Journal(folder)
        journal.append(cells, builder.group_of(cells))
        journal.close()
        environment = {
            "schema": 1, "started": f"2026-01-0{number + 1}T00:00:00", "torch": "2.11" if number < 3 else "2.13",
            "devices": [{"id": builder.DEVICE, "name": "card"}],
        }  # fmt: skip
        (folder / "environment.json").write_text(json.dumps(environment))
    return tmp_path / "results"


def test_the_command_names_the_run_and_what_came_with_it(results: Path, tmp_path: Path) -> None:
    done = bench("history", results, "--json", "--output-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    courses = {course["impl"]: course for course in json.loads(done.stdout)["courses"]}
    assert [len(course["points"]) for course in courses.values()] == [6, 6]
    assert courses["steady"]["changes"] == []
    (change,) = courses["moved"]["changes"]
    assert change["at"] == 3
    assert 0.2 < change["change"] < 0.4
    assert change["differs"] == ["torch 2.11 → 2.13"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "history.json",
        "history.png",
        "history.svg",
    }
    text = bench("history", results, "--only-changed").stdout
    assert [line.split("\t")[0] for line in text.splitlines()] == ["moved"]
    assert "at 2026-01-04-abc (torch 2.11 → 2.13)" in text


def test_runs_timed_in_two_ways_form_two_courses(results: Path, builder: ModuleType) -> None:
    """Inputs that come back may lie in a cache, or be recognised: such a time says nothing of a later one."""
    folder = results / "card" / "2026-01-07-abc"
    cell = builder.ok_cell("steady", PROBLEM, 0.5)
    cell = dataclasses.replace(cell, timing=dataclasses.replace(cell.timing, renewed=not cell.timing.renewed))
    journal = Journal(folder)
    journal.append([cell], builder.group_of([cell]))
    journal.close()
    (folder / "environment.json").write_text((results / "card/2026-01-06-abc/environment.json").read_text())
    courses = json.loads(bench("history", results, "--only", "steady", "--json").stdout)["courses"]
    assert sorted(len(course["points"]) for course in courses) == [1, 6]
    assert len({course["way"] for course in courses}) == 2
    assert "came back" in bench("history", results, "--only", "steady").stdout


def test_what_cannot_be_shown_is_said_in_a_line(results: Path, tmp_path: Path) -> None:
    assert bench("history", tmp_path / "empty").exit_code == 2
    assert bench("history", results, "--only", "mooved").exit_code == 2
    assert bench("history", results, "--threshold", "0").exit_code == 2
    assert bench("history", results, "--only", "mov*", "--problem", "*_bwd").stdout.strip() == ""
