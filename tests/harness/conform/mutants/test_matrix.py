"""``bench mutants``, with real workers: a table, the exit code, and a mutant that takes its process along."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from attnbench.harness.cli import mutants as command
from attnbench.harness.cli.app import app
from attnbench.harness.conform.mutants import catalogue
from attnbench.harness.conform.mutants.examine import Sight
from attnbench.harness.conform.mutants.matrix import Row, sole_witnesses
from attnbench.harness.run.errors import Exit

SEEN, PASSED = Sight("a/b[c]", "FAIL", "wrong", 1), Sight("", "", "", 7)


def row(
    name: str = "aligns-top-left", *, named: Sight = SEEN, control: Sight = PASSED, **suites: Sight
) -> Row:
    return Row(catalogue()[name], named, control, suites)


def test_a_crash_is_a_kill_and_costs_nothing_but_its_worker() -> None:
    asked = ["mutants", "--mutant", "no-keys-crashes,batches-in-eight-bits", "--suite", "shapes,scale"]
    result = CliRunner().invoke(app, [*asked, "--jobs", "1", "--json"])
    assert result.exit_code == Exit.OK
    found = json.loads(result.stdout)["mutants"]
    assert found["no-keys-crashes"]["suites"]["shapes"]["verdict"] == "CRASHED"
    assert found["no-keys-crashes"]["suites"]["scale"]["case"] == ""
    assert found["batches-in-eight-bits"]["suites"]["scale"]["case"].startswith("scale/many-batches[")
    assert [mutant["killed"] for mutant in found.values()] == [True, True]


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (row(), "killed"),
        (row(named=PASSED), "SURVIVED"),
        (row(control=SEEN), "CONTROL FAILED"),
    ],
)
def test_a_mutant_is_killed_by_its_case_while_its_control_passes(found: Row, state: str) -> None:
    assert command._state(found) == state
    assert found.killed == (state == "killed")


def test_a_survivor_is_told_and_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def survivors(chosen: object, suites: list[str], device: str, jobs: int, tell: object) -> list[Row]:
        found = row(named=PASSED, **dict.fromkeys(suites, PASSED))
        tell(found)  # type: ignore[operator]
        return [found]

    monkeypatch.setattr("attnbench.harness.conform.mutants.matrix.kill_matrix", survivors)
    result = CliRunner().invoke(app, ["mutants", "--mutant", "aligns-top-left", "--markdown"])
    assert result.exit_code == Exit.CELLS
    assert "SURVIVED: aligns-top-left" in result.stderr
    assert "0 of 1 mutants killed" in result.stdout


def test_the_table_marks_a_sole_witness() -> None:
    rows = [row(causal=SEEN, gqa=PASSED), row(causal=SEEN, gqa=SEEN)]
    assert command._marks(rows[0], ["causal", "gqa"]) == ["X", "."]
    assert command._marks(rows[1], ["causal", "gqa"]) == ["x", "x"]
    assert sole_witnesses(rows) == {"causal": ["aligns-top-left"]}
    assert command._markdown(rows, ["causal", "gqa"])[2].endswith("| causal/fewer-queries | X | . | killed |")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mutant", "aligns-top-lef"], "did you mean aligns-top-left"),
        (["--suite", "casual"], "did you mean causal"),
    ],
)
def test_unknown_words_are_named(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["mutants", *words])
    assert result.exit_code == Exit.USAGE
    assert said in result.stderr


def test_listing_runs_nothing_and_says_what_is_broken() -> None:
    result = CliRunner().invoke(app, ["mutants", "--list"])
    assert result.exit_code == Exit.OK
    assert len(result.stdout.splitlines()) == len(catalogue())
    assert (
        "Aligns every band top left, whatever was asked.\tcausal/fewer-queries\tflash-attention#282"
        in result.stdout
    )
