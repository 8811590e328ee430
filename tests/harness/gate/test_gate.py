"""``bench gate`` with real processes: each exit code, reached by its real cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from attnbench.harness.report.load import load_run

# Three pairs, one look and a wide threshold: sure of changes that are far beyond it, on a busy machine, in seconds.
QUICK = [
    "--pairs",
    "3",
    "--looks",
    "1",
    "--rounds",
    "8",
    "--samples",
    "5",
    "--device",
    "cpu",
    "--threshold",
    "50%",
]
Sides = Callable[..., str]


class Gate:
    """Runs ``bench gate`` in its own process, as CI does."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.folder, self.suite = folder, suite

    def __call__(self, base: object, head: object, *options: object) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("bench"), "gate", "--base", base, "--head", head]
        command += ["--suite", self.suite, "--output-dir", self.folder, *options]
        return subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "gate.json").read_text())
        return found


@pytest.fixture
def gate(tmp_path: Path, suite: str) -> Gate:
    return Gate(tmp_path / "out", suite)


def test_0_a_faster_head_never_fails(gate: Gate, installed: Sides) -> None:
    done = gate(installed("base", COST_MS=8), installed("head"), *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no regression: 1 FASTER")


def test_1_a_planted_slowdown_between_two_revisions(
    gate: Gate, repository: Callable[..., Path], tmp_path: Path
) -> None:
    """Git revisions, built and installed into environments of their own."""
    repo, junit = repository(fast={}, slow={"COST_MS": 8}), tmp_path / "junit.xml"
    offline = ("--repo", repo, "--pip-arg=--no-build-isolation")
    done = gate("fast", "slow", *offline, *QUICK, "--markdown", "--junit", junit)
    assert done.returncode == 1, done.stderr
    (cell,) = gate.result["cells"]
    assert cell["answer"] == "SLOWER"
    assert cell["low"] < cell["change"] < cell["high"]
    assert done.stdout.startswith("<!-- attnbench gate -->")
    assert "| SLOWER |" in done.stdout
    assert ElementTree.parse(junit).getroot().get("failures") == "1"
    # What was measured can be read again: judged, in mirrored rounds, by fresh processes of either side.
    look = load_run(gate.folder / "gated" / "look-1")
    assert {(cell.impl, cell.impl_version) for cell in look.cells} == {
        (f"gated@{side}.{n}", version)
        for side, version in (("base", "1.0"), ("head", "1.1"))
        for n in (4, 5, 6)
    }
    assert all(cell.judgement and cell.judgement.ok and cell.timing for cell in look.cells)
    (order,) = look.groups[0].order.values()
    assert [order[n] == order[n - 1][::-1] for n in (1, 3, 5, 7)] == [True] * 4


def test_2_a_ref_that_names_nothing(gate: Gate, tmp_path: Path) -> None:
    done = gate("nowhere", "nowhere", "--repo", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("bench: --base nowhere: no such path")


def test_2_a_folder_that_is_no_side(gate: Gate, tmp_path: Path) -> None:
    done = gate(tmp_path, tmp_path)
    assert done.returncode == 2
    assert "neither a recorded run" in done.stderr


def test_2_a_revision_that_does_not_install(gate: Gate, repository: Callable[..., Path]) -> None:
    repo = repository(good={}, broken={})
    (repo / "pyproject.toml").write_text("[project\n")
    git = ["git", "-C", repo, "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "commit", "--quiet", "--all", "--message", "broken"], check=True)
    done = gate("HEAD", "good", "--repo", repo, "--pip-arg=--no-build-isolation")
    assert done.returncode == 2
    assert "--base HEAD: does not install" in done.stderr


@pytest.mark.parametrize("wrong", [("--threshold", "200%"), ("--unsure", "maybe"), ("--alpha", "1")])
def test_2_a_value_that_makes_no_sense(gate: Gate, wrong: tuple[str, str]) -> None:
    done = gate("a", "b", *wrong)
    assert done.returncode == 2
    assert wrong[0] in done.stderr


def test_3_nothing_that_base_answers(gate: Gate, installed: Sides) -> None:
    done = gate(installed("base", UNAVAILABLE=True), installed("head"), *QUICK)
    assert done.returncode == 3, done.stderr
    (cell,) = gate.result["cells"]
    assert cell["answer"] == "SKIPPED"
    assert "taken out" in cell["reason"]


def test_4_a_wrong_answer_is_found_before_anything_is_timed(gate: Gate, installed: Sides) -> None:
    done = gate(installed("base"), installed("head", WRONG=True), *QUICK, "--json")
    assert done.returncode == 4, done.stderr
    assert json.loads(done.stdout)["cells"][0]["answer"] == "WRONG"
    assert "the oracle says" in gate.result["cells"][0]["reason"]
    assert not (gate.folder / "gated" / "calibration").exists()


def test_4_a_head_that_dies_where_base_answers(gate: Gate, installed: Sides) -> None:
    done = gate(installed("base"), installed("head", DIES=True), *QUICK)
    assert done.returncode == 4, done.stderr
    (cell,) = gate.result["cells"]
    assert cell["answer"] == "LOST"
    assert "SIGABRT" in cell["reason"]


def test_5_processes_too_unlike_for_any_verdict(gate: Gate, installed: Sides) -> None:
    uneven = installed("uneven", UNEVEN=True)
    done = gate(uneven, uneven, *QUICK)
    assert done.returncode == 5, done.stderr
    assert "unfit: too noisy for a threshold of 50.00%" in done.stdout
    assert not (gate.folder / "gated" / "look-1").exists()


def test_6_unsure_at_the_end_of_the_budget(gate: Gate, installed: Sides) -> None:
    """A head that is slower in some processes than in others: three of them do not say by how much."""
    done = gate(installed("base"), installed("head", UNEVEN=True), *QUICK)
    assert done.returncode == 6, done.stderr
    assert gate.result["cells"][0]["answer"] == "UNSURE"
    assert 'failures="1"' in (gate.folder / "junit.xml").read_text()


def test_a_recorded_base_and_a_head_that_is_recorded_now(
    gate: Gate, installed: Sides, tmp_path: Path
) -> None:
    base, head = installed("base"), installed("head", COST_MS=8)
    run = [
        Path(sys.executable).with_name("bench"),
        "run",
        "--suite",
        gate.suite,
        "--only",
        "gated",
        "--no-memory",
    ]
    words = [
        *run,
        "--device",
        "cpu",
        "--rounds",
        "8",
        "--samples",
        "5",
        "--output-dir",
        tmp_path / "recorded",
    ]
    environment = os.environ | {"PYTHONPATH": base}
    subprocess.run(list(map(str, words)), env=environment, check=True, capture_output=True)
    done = gate(tmp_path / "recorded", head, "--device", "cpu", "--threshold", "50%")
    assert done.returncode == 1, done.stderr
    assert {"base": f"recorded run {tmp_path / 'recorded'}", "answer": "SLOWER"} == {
        "base": gate.result["base"],
        "answer": gate.result["cells"][0]["answer"],
    }
    assert "not measured side by side" in done.stdout
