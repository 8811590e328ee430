"""Published conformance: its records are whole, and its matrix is what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.harness.conform.records import read
from attnbench.harness.conform.reproduce import SHOWS_IT, run_script
from attnbench.harness.conform.write_matrix import write_matrix

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.parent for path in ROOT.glob("results/conformance/*/*/cases.json"))
ON_CPU = sorted(ROOT.glob("results/conformance/cpu/*/reproducers/*.py"))
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


@pytest.mark.parametrize("script", ON_CPU, ids=lambda script: script.name)
def test_a_published_script_for_the_cpu_still_shows_its_fault(script: Path) -> None:
    code, said = run_script(script, "none")
    assert code == SHOWS_IT, f"the library may be mended: say so beside the script\n{said}"
