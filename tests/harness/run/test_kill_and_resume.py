"""A run killed with SIGKILL at random moments and resumed ends with every cell once; with real processes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.run import journal
from attnbench.harness.run.record import Cell

KILLS = 20
pytestmark = pytest.mark.timeout(400)
SUITE = """
name = "many-small"
why = "many groups, so that a kill finds the run at any stage of one"

[[case]]
name = "small"
why = "as above"
batch = 1
heads = 1
seqlen = [16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35]
head_dim = [8, 16]
dtype = "fp32"
direction = ["fwd", "bwd"]
"""


def command(suite: Path, run: Path, *, resume: bool) -> list[str]:
    where = ["--resume", str(run)] if resume else ["--suite", str(suite), "--output-dir", str(run)]
    options = ["--device", "cpu", "--only", "steady,raises", "--rounds", "2", "--samples", "2", "-q"]
    program = "from attnbench.harness.cli import main; main()"
    return [sys.executable, "-c", program, "run", *where, *([] if resume else options)]


def test_twenty_kills_lose_no_cell_and_double_none(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNBENCH_COMMIT", "under-test")  # whatever is committed meanwhile
    planted.register({"steady": "faulty:steady", "raises": "faulty:raises"})
    suite, run = tmp_path / "many-small.toml", tmp_path / "run"
    suite.write_text(SUITE)
    moments = random.Random(20)
    survivors: list[int] = []
    for kill in range(KILLS):
        process = subprocess.Popen(
            command(suite, run, resume=(run / "plan.json").exists()),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if kill % 2:  # anywhere among the groups: after some more records, and a moment
            wait_for_lines(run, lines_of(run) + moments.randrange(1, 8), process)
            time.sleep(moments.uniform(0.0, 0.3))
        else:  # anywhere in start-up
            time.sleep(moments.uniform(0.1, 3.0))
        process.kill()
        process.wait()
        survivors += workers_left(planted, process.pid)
    # The journal may also be cut in the middle of a line, which is rarer than any kill will show.
    part = journal.parts(run)[-1]
    part.write_bytes(part.read_bytes()[:-40])
    finished = subprocess.run(command(suite, run, resume=True), capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr  # "raises" did
    planned = [
        cell
        for plan in json.loads((run / "plan.json").read_text())["plans"]
        for cell in (
            f"{impl}/{problem_key(problem)}" for impl in plan["impls"] for problem in plan["problems"]
        )
    ]
    records, problems = journal.read(run)
    recorded = [record.id for record in records if isinstance(record, Cell)]
    assert len(planned) == 20 * 2 * 2 * 2
    assert sorted(recorded) == sorted(planned)
    assert not problems
    assert "records.jsonl" in finished.stderr  # the torn line was named
    assert (run / journal.SET_ASIDE).exists()
    assert not survivors


def lines_of(run: Path) -> int:
    return sum(part.read_bytes().count(b"\n") for part in journal.parts(run)) if run.exists() else 0


def wait_for_lines(run: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    """Returns when the journal is that long, or the process ended (every group was done)."""
    while process.poll() is None and lines_of(run) < lines:
        time.sleep(0.01)


def problem_key(problem: dict[str, Any]) -> str:
    from attnbench.harness.problem import Problem

    return Problem.from_json(problem).key


def workers_left(planted: Any, parent: int) -> list[int]:
    """Pids of workers of a dead parent that are still alive after a moment's grace."""
    deadline = time.monotonic() + 10
    while left := planted.workers_of(parent):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []
