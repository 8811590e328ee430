"""Every way a plugin can misbehave is a status with its evidence, and the run goes on; with real processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.run import crew
from attnbench.harness.run.record import Cell, Status
from attnbench.harness.run.runner import RunOptions, run

# One worker runs them all: the group with its time limits is run once.
pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(400)]

# plugin attribute -> status, and what its one-line reason must say
FAULTS = {
    "segfaults": (Status.CRASHED, "SIGSEGV"),
    "aborts": (Status.CRASHED, "SIGABRT"),
    "leaves": (Status.CRASHED, "exited with code 7"),
    "be_killed": (Status.CRASHED, "SIGKILL"),
    "sleeps": (Status.TIMEOUT, "no answer within"),
    "hangs": (Status.TIMEOUT, "no answer within"),
    "exhausts": (Status.OOM, "allocate memory"),
    "raises": (Status.ERROR, "ZeroDivisionError: planted"),
    "exits": (Status.ERROR, "SystemExit: planted"),
    "returns_nan": (Status.INCORRECT, "out[0, 5, 1, 3] is not finite"),
    "wrong_shape": (Status.INCORRECT, "shape"),
    "wrong_dtype": (Status.INCORRECT, "dtype"),
    "no_tensor": (Status.INCORRECT, "Tensor"),
    "writes_inputs": (Status.INCORRECT, "writes into its inputs (k)"),
    "wrong_when_timed": (Status.INCORRECT, "a timed call: out"),
    "replays": (Status.INCORRECT, "out"),
    "old": (Status.UNAVAILABLE, "older plugin contract"),
    "missing": (Status.UNAVAILABLE, "does not import"),
    "prints": (Status.OK, ""),
    "forks": (Status.OK, ""),
    "steady": (Status.OK, ""),
}


@pytest.fixture(scope="module")
def faulty(planted: Any) -> Any:
    planted.register({name: f"faulty:{name}" for name in (*FAULTS, "segfaults_forward")})
    return planted


@pytest.fixture(scope="module")
def cells(faulty: Any, quiet: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cell]:
    """All faults in one group, so that each has all the others for neighbours."""
    output = tmp_path_factory.mktemp("faults") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNBENCH_HOST_MEMORY_BYTES", str(2 * 2**30))
        run(
            [faulty.group(list(FAULTS))],
            RunOptions(("cpu",), output, rounds=3, samples=3, time_limit_s=6, memory=False),
            quiet,
        )
    return {cell.impl: cell for cell in quiet.cells}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_status_with_its_reason(cells: dict[str, Cell], name: str) -> None:
    status, reason = FAULTS[name]
    cell = cells[name]
    assert cell.status is status, cell.reasons
    assert reason in "".join(cell.reasons)
    assert (cell.timing is not None) == (status is Status.OK)


def test_a_crash_leaves_its_traceback_as_evidence(cells: dict[str, Cell]) -> None:
    assert "Segmentation fault" in cells["segfaults"].evidence
    assert "_segfault" in cells["segfaults"].evidence


def test_an_exception_leaves_its_traceback_as_evidence(cells: dict[str, Cell]) -> None:
    assert "in _raise" in cells["raises"].evidence


def test_what_is_declared_unsupported_stays_so_when_the_worker_is_lost_for_good(
    faulty: Any, quiet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "MOST_LOSSES", 1)
    told = type(quiet)()
    options = RunOptions(("cpu",), tmp_path / "run", rounds=1, samples=1, memory=False)
    run([faulty.group(["segfaults_forward"], directions=("fwd", "bwd"))], options, told)
    forward, backward = told.cells
    assert forward.status is Status.CRASHED
    assert (backward.status, backward.reasons) == (Status.UNSUPPORTED, ["has no backward pass"])


def test_no_worker_is_left(cells: dict[str, Cell], planted: Any) -> None:
    assert cells
    assert not planted.workers_of(os.getpid())
