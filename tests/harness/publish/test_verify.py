"""Measuring a row again: what the figures say, by pure functions; and the whole of it with real processes on a CPU."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.problem import Problem
from attnbench.harness.publish import rows
from attnbench.harness.publish.rows import PublishedRun, Row
from attnbench.harness.publish.verify import choose_baseline, compare, find, judge
from attnbench.harness.report.stats import Estimate
from attnbench.harness.run import journal
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.progress import make_progress
from attnbench.harness.run.record import Cell, Status, Timing
from attnbench.harness.run.runner import RunOptions, run

SHARP = Estimate(0.5, 0.499, 0.501)


def around(value: float, noise: float) -> Estimate:
    return Estimate(value, value / (1 + noise), value * (1 + noise))


# ---- two ratios ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "outcome", "code"),
    [
        (around(0.5, 0.002), "reproduced", Exit.OK),
        (around(0.51, 0.002), "reproduced", Exit.OK),
        (around(0.56, 0.002), "differs", Exit.CELLS),
        (around(0.44, 0.002), "differs", Exit.CELLS),
        (around(0.525, 0.01), "cannot", Exit.MACHINE),  # across the edge
        (around(0.5, 0.2), "cannot", Exit.MACHINE),  # lucky in the middle, but noise alone is wider
        (Estimate(0.5), "cannot", Exit.NOTHING),
        (Estimate(None), "cannot", Exit.NOTHING),
    ],
)
def test_the_interval_decides(here: Estimate, outcome: str, code: Exit) -> None:
    found, reason, exit_code = compare(SHARP, here, 0.05)
    assert (found, exit_code) == (outcome, code)
    assert reason


@given(
    st.floats(0.01, 100),
    st.floats(1e-4, 0.5),
    st.floats(0.01, 100),
    st.floats(1e-4, 0.5),
    st.floats(1e-3, 1.0),
)
def test_neither_side_nor_direction_is_favoured(
    a: float, na: float, b: float, nb: float, tolerance: float
) -> None:
    one, other = around(a, na), around(b, nb)
    outcome, _, _ = compare(one, other, tolerance)
    assert compare(other, one, tolerance)[0] == outcome
    inside = abs(math.log(a / b)) <= math.log1p(tolerance)
    # No noise makes a row reproduced that is outside, nor another one that is inside.
    assert outcome != ("differs" if inside else "reproduced")


# ---- a row and what was measured here ------------------------------------------------------------------------


@pytest.fixture
def timed(builder: ModuleType) -> Callable[..., Cell]:
    """A timed cell of which each round took ``ms``, give or take 0.1%."""
    problem = builder.problems()[0][0]

    def make(impl: str, ms: float, **fields: object) -> Cell:
        cell: Cell = builder.ok_cell(impl, problem, 0.5)
        rounds = [[ms * (1 + 0.001 * (number % 3 - 1))] * 3 for number in range(12)]
        timing = Timing(rounds=rounds, mode="cold", checked=12, inputs=3)
        return dataclasses.replace(cell, **{"timing": timing, "source": "a" * 16} | fields)

    return make


@pytest.fixture
def of(timed: Callable[..., Cell]) -> Callable[[Cell], Row]:
    return lambda cell: Row("0123456789ab", cell, rows.family_of(cell.problem), ())


def test_a_ratio_is_compared_and_not_a_time(timed: Callable[..., Cell], of: Callable[[Cell], Row]) -> None:
    row, baseline = of(timed("own", 1.0)), of(timed("base", 2.0))
    slower_card = {"own": timed("own", 3.0), "base": timed("base", 6.0)}
    answer = judge(row, baseline, slower_card, 0.05)
    assert (answer.outcome, answer.exit_code, answer.baseline) == ("reproduced", 0, "base")
    assert answer.here
    assert answer.here.value == pytest.approx(0.5)
    lost = {"own": timed("own", 3.0), "base": timed("base", 4.0)}
    assert judge(row, baseline, lost, 0.05).outcome == "differs"


@pytest.mark.parametrize(
    ("side", "change", "why"),
    [
        ("own", {"source": "b" * 16}, "own had sources aaaaaaaaaaaaaaaa, here they are bbbbbbbbbbbbbbbb"),
        ("base", {"source": "b" * 16}, "base had sources"),
        ("own", {"impl_version": "9"}, "own was version 1.2.3, here it is 9"),
    ],
)
def test_another_kernel_cannot_reproduce_a_row(
    timed: Callable[..., Cell], of: Callable[[Cell], Row], side: str, change: dict[str, str], why: str
) -> None:
    row, baseline = of(timed("own", 1.0)), of(timed("base", 2.0))
    here = {impl: timed(impl, 1.0, **(change if impl == side else {})) for impl in ("own", "base")}
    answer = judge(row, baseline, here, 0.05)
    assert (answer.outcome, answer.exit_code) == ("cannot", Exit.NOTHING)
    assert answer.reason.startswith(why)


def test_a_record_without_a_hash_is_compared_by_version(
    timed: Callable[..., Cell], of: Callable[[Cell], Row]
) -> None:
    row, baseline = of(timed("own", 1.0)), of(timed("base", 2.0))
    older = dataclasses.replace(row, cell=dataclasses.replace(row.cell, source=""))
    here = {"own": timed("own", 1.0), "base": timed("base", 2.0)}
    assert judge(older, baseline, here, 0.05).outcome == "reproduced"


def test_another_status_differs_and_the_same_one_reproduces(
    builder: ModuleType, timed: Callable[..., Cell], of: Callable[[Cell], Row]
) -> None:
    problem = builder.problems()[0][0]
    wrong = builder.failed_cell("own", problem, Status.INCORRECT, ["out[0] is 2"])
    here = {"own": wrong, "base": timed("base", 2.0)}
    answer = judge(of(dataclasses.replace(timed("own", 1.0), source="")), of(timed("base", 2.0)), here, 0.05)
    assert (answer.outcome, answer.exit_code) == ("differs", Exit.CELLS)
    assert answer.reason == "it was OK, and is INCORRECT here: out[0] is 2"
    assert judge(of(wrong), None, {"own": wrong}, 0.05).outcome == "reproduced"


def test_a_baseline_that_fails_here_leaves_nothing_to_compare(
    builder: ModuleType, timed: Callable[..., Cell], of: Callable[[Cell], Row]
) -> None:
    lost = builder.failed_cell("base", builder.problems()[0][0], Status.OOM, ["128 GiB"])
    answer = judge(
        of(timed("own", 1.0)), of(timed("base", 2.0)), {"own": timed("own", 1.0), "base": lost}, 0.05
    )
    assert (answer.outcome, answer.exit_code) == ("cannot", Exit.NOTHING)
    assert answer.reason == "its baseline base is OOM here: 128 GiB"


# ---- rows by name --------------------------------------------------------------------------------------------


def test_a_row_is_found_by_the_beginning_of_its_address(runs: list[PublishedRun]) -> None:
    wanted = runs[0].rows[5]
    run_found, row = find(runs, wanted.address[:8])
    assert row.address == wanted.address
    assert run_found.slug == runs[0].slug


@pytest.mark.parametrize("word", ["", "12345", "zzzzzz", "no/such_cell"])
def test_an_unknown_row_is_an_error(runs: list[PublishedRun], word: str) -> None:
    with pytest.raises(RunError, match="no row"):
        find(runs, word)


def test_a_cell_in_two_environments_is_two_rows(runs: list[PublishedRun]) -> None:
    with pytest.raises(RunError, match="name more of the address"):
        find(runs, runs[1].rows[0].cell.id)


def test_a_baseline_must_have_been_there(runs: list[PublishedRun]) -> None:
    row = next(row for row in runs[0].rows if row.cell.timing)
    with pytest.raises(RunError, match="--baseline nobody: not timed beside this row"):
        choose_baseline(runs[0], row, "nobody")


# ---- with real processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two implementations on one tiny problem."""
    folder = tmp_path_factory.mktemp("published") / "cpu" / "run"
    problem = Problem(1, 1, 32, 16, dtype="fp32")
    plan = GroupPlan(
        "tiny", "one", "a test", problem.group_key, (problem,), ("sdpa-math", "standard"), "normal", 7
    )
    with make_progress(quiet=True, verbose=False) as progress:
        run(
            [plan],
            RunOptions(("cpu",), folder, rounds=6, samples=3, memory=False, command=("bench",)),
            progress,
        )
    return folder


def row_of(folder: Path, impl: str) -> Row:
    return next(row for row in rows.load([folder])[0].rows if row.cell.impl == impl)


@pytest.mark.xdist_group("verify")
def test_a_row_of_this_machine_is_reproduced(measured: Path, bench: Callable[..., Result]) -> None:
    row = row_of(measured, "standard")
    assert row.cell.source
    # A busy machine moves tiny calls by any factor: what is shown here is the way through, and the ratio's meaning.
    answer = bench("verify", row.address, "--results", measured, "--tolerance", "1000000", "--json")
    assert answer.exit_code == Exit.OK, answer.stderr
    document = json.loads(answer.stdout)
    assert (document["outcome"], document["baseline"], document["row"]) == (
        "reproduced",
        "sdpa-math",
        row.address,
    )
    assert document["here"]["low"] <= document["here"]["value"] <= document["here"]["high"]


@pytest.mark.xdist_group("verify")
def test_a_row_with_made_up_samples_differs(
    measured: Path, tmp_path: Path, bench: Callable[..., Result]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    records, _ = journal.read(folder)
    lines = []
    for record in records:
        if isinstance(record, Cell) and record.impl == "standard" and record.timing:
            rounds = [[ms / 1e6 for ms in samples] for samples in record.timing.rounds]
            timing = dataclasses.replace(record.timing, rounds=rounds)
            lines.append(journal.seal(dataclasses.replace(record, timing=timing)) + "\n")
        else:
            lines.append(journal.seal(record) + "\n")
    (folder / "records.jsonl").write_text("".join(lines))
    address = row_of(folder, "standard").address
    assert address == row_of(measured, "standard").address  # figures are no part of it
    answer = bench("verify", address, "--results", folder, "--rounds", "4")
    assert answer.exit_code == Exit.CELLS, answer.stderr
    assert answer.stdout.startswith("differs: standard/")
    assert "beyond 5%" in answer.stdout
    assert "of the time of sdpa-math" in answer.stdout


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"devices": [{"id": "cpu", "name": "NVIDIA H200"}]},
            "the row was measured on NVIDIA H200, and this is ",
        ),
        ({"host": {"cpu": "an abacus"}}, "the row was measured on an abacus, and this is "),
    ],
)
def test_a_row_of_another_machine_cannot_be_verified(
    measured: Path, tmp_path: Path, bench: Callable[..., Result], change: dict[str, object], why: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    document = json.loads((folder / "environment.json").read_text()) | change
    (folder / "environment.json").write_text(json.dumps(document))
    answer = bench("verify", row_of(folder, "standard").address, "--results", folder, "--device", "cpu")
    assert answer.exit_code == Exit.MACHINE
    assert answer.stdout.startswith("cannot: standard/")
    assert why in answer.stdout
