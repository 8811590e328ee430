"""An approximation in a real run: timed though it is wrong, with its error, and only where it was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.harness.run import journal
from attnbench.harness.run.record import Cell, Status

SUITE = """
name = "own"
why = "One problem that a window of 128 keys on each side cannot see whole."

[[case]]
name = "long"
why = "More keys than the window holds."
dtype = "fp32"
batch = 1
heads = 1
head_dim = 16
mask = "full"
seqlen = 512
direction = ["fwd", "bwd"]
"""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("bench"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("approximate")
    (folder / "own.toml").write_text(SUITE)
    done = bench(
        "run", "--suite", str(folder / "own.toml"), "--only", "standard,local", "--device", "cpu", "--rounds", "2",
        "--samples", "2", "--output-dir", str(folder / "run"), "--metrics", "latency,error", "-q",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_it_is_timed_and_its_error_is_on_record(run: Path) -> None:
    records, _ = journal.read(run)
    cells = {cell.id: cell for cell in records if isinstance(cell, Cell)}
    assert {cell.status for cell in cells.values()} == {Status.OK}
    for cell in cells.values():
        assert cell.timing
        assert cell.judgement
        assert cell.approximate == (cell.impl == "local")
        assert cell.judgement.ok == (cell.impl == "standard")
    forward = next(c for c in cells.values() if c.approximate and c.problem.direction == "fwd")
    assert forward.judgement
    out = forward.judgement.tensors["out"]
    assert out.mean_error
    assert out.mean_want
    assert 0.1 < out.mean_error / out.mean_want < 2


def test_the_report_marks_it(run: Path) -> None:
    assert "local (approximate)" in (run / "tables.md").read_text()


def test_no_other_run_meets_it() -> None:
    listed = json.loads(bench("list", "--json").stdout)
    names = {one["name"] for one in listed["implementations"]}
    rough = {one["name"] for one in listed["approximations"]}
    assert {"local", "linformer", "butterfly"} <= rough
    assert not names & rough
