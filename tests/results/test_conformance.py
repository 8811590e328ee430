"""Published conformance: its records are whole, and its matrix is what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.harness.conform.known import explained, is_new, no_longer_seen, read_known
from attnbench.harness.conform.records import read
from attnbench.harness.conform.reproduce import SHOWS_IT, run_script
from attnbench.harness.conform.write_matrix import write_matrix

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.parent for path in ROOT.glob("results/conformance/*/*/cases.json"))
ON_CPU = sorted(ROOT.glob("results/conformance/cpu/*/reproducers/*.py"))
ON_GPU = [run for run in RUNS if run.parent.name != "cpu"]
OWN = ("flash-cuda", "flash-triton")
MOST_BYTES = 2 * 2**20


def test_there_are_some() -> None:
    assert RUNS
    assert ON_CPU


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_records_are_whole_and_the_matrix_is_what_they_say(run: Path, tmp_path: Path) -> None:
    recorded = read(run)
    assert recorded.findings
    assert not recorded.problems
    for page in write_matrix([recorded], tmp_path):
        assert page.read_text() == (run / page.name).read_text()
    assert not [path.name for path in run.rglob("*") if path.is_file() and path.stat().st_size > MOST_BYTES]


def test_what_is_known_is_what_was_published_of_others() -> None:
    known = read_known(ROOT / "results/conformance/known.toml")
    findings = [finding for run in ON_GPU for finding in read(run).findings]
    assert not [str(fault) for fault, seen in explained(findings, known).items() if not seen]
    assert not no_longer_seen(findings, known)
    # Of this project's own kernels nothing is put up with, and of others nothing is left to be told as new.
    assert not [fault.impl for fault in known if fault.impl.startswith(OWN)]
    new = [finding.pair for finding in findings if is_new(finding, known)]
    assert not [pair for pair in new if not pair[0].startswith(OWN)]


@pytest.mark.parametrize("script", ON_CPU, ids=lambda script: script.name)
def test_a_published_script_for_the_cpu_still_shows_its_fault(script: Path) -> None:
    code, said = run_script(script, "none")
    assert code == SHOWS_IT, f"the library may be mended: say so beside the script\n{said}"
