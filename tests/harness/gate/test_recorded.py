"""``bench gate`` and ``bench compare`` on recorded runs, in this process."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from gate_runs import failed, timed, written
from hypothesis import given
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.gate.compare import implementations, runs
from attnbench.harness.gate.decision import Verdict
from attnbench.harness.gate.outcome import Answer, GateExit
from attnbench.harness.gate.recorded import compare
from attnbench.harness.report.load import load_run
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.record import Cell, Status

WORDS = ("recorded run a", "recorded run b")


def gated(tmp_path: Path, base: Cell, head: Cell, threshold: float = 0.02) -> Any:
    a, b = written(tmp_path / "a", base), written(tmp_path / "b", head)
    return compare(a, b, words=WORDS, threshold=threshold, alpha=0.05)


@pytest.mark.parametrize(
    ("change", "answer", "code"),
    [(1.0, Answer.SAME, 0), (1.05, Answer.SLOWER, 1), (0.9, Answer.FASTER, 0), (1.02, Answer.UNSURE, 6)],
)
def test_two_recordings(tmp_path: Path, change: float, answer: Answer, code: int) -> None:
    result = gated(tmp_path, timed("k", 1.0, seed=1), timed("k", change, seed=2))
    (cell,) = result.cells
    assert cell.answer is answer
    assert cell.low < change - 1 < cell.high
    assert result.exit_code() == code
    assert "not measured side by side" in result.notes[0]


def test_a_card_at_another_clock_is_no_change_of_the_kernel(tmp_path: Path) -> None:
    result = gated(tmp_path, timed("k", 1.0, seed=1, mhz=1500), timed("k", 1.0, seed=2, mhz=1350))
    (cell,) = result.cells
    assert cell.answer is Answer.UNSURE
    assert cell.reason == "SLOWER in ms, SAME in cycles: the clocks of the two runs differ"
    assert cell.cycles == pytest.approx(0, abs=0.003)


@pytest.mark.parametrize(
    ("base", "head", "code"),
    [
        (timed("k", 1.0, seed=1), failed("k", Status.INCORRECT), GateExit.WRONG),
        (timed("k", 1.0, seed=1), failed("k", Status.CRASHED), GateExit.WRONG),
        (failed("k", Status.OOM), timed("k", 1.0, seed=1), GateExit.NOTHING),
        (timed("k", 1.0, seed=1), timed("other", 1.0, seed=1), GateExit.NOTHING),
        (timed("k", 1.0, seed=1, noise=0.2), timed("k", 1.0, seed=2, noise=0.2), GateExit.UNFIT),
        (timed("k", 1.0, seed=1, rounds=1), timed("k", 1.0, seed=2, rounds=1), GateExit.UNFIT),
    ],
)
def test_what_recordings_can_end_with(tmp_path: Path, base: Cell, head: Cell, code: GateExit) -> None:
    assert gated(tmp_path, base, head).exit_code() is code


@pytest.mark.parametrize("way", [{"renewed": True}, {"mode": "hot"}])
def test_two_ways_of_timing_are_not_compared(tmp_path: Path, way: dict[str, Any]) -> None:
    base, head = timed("k", 1.0, seed=1), timed("k", 1.2, seed=2)
    assert head.timing is not None
    other = dataclasses.replace(head, timing=dataclasses.replace(head.timing, **way))
    assert gated(tmp_path / "one", base, head).exit_code() is GateExit.REGRESSION
    result = gated(tmp_path / "two", base, other)
    assert result.exit_code() is GateExit.NOTHING
    assert result.cells[0].reason.startswith("timed in two ways: base cold, on inputs that came back, head ")


def test_two_devices_are_not_compared(tmp_path: Path) -> None:
    a = written(tmp_path / "a", timed("k", 1.0, seed=1), device="one card")
    b = written(tmp_path / "b", timed("k", 1.0, seed=1), device="another")
    with pytest.raises(RunError, match="base ran on one card, head on another: not comparable"):
        compare(a, b, words=WORDS, threshold=0.02, alpha=0.05)


def bench(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="bench")


def test_the_gate_command_on_recordings(tmp_path: Path) -> None:
    a = written(tmp_path / "a", timed("k", 1.0, seed=1))
    b = written(tmp_path / "b", timed("k", 1.2, seed=2))
    done = bench("gate", "--base", a, "--head", b, "--output-dir", tmp_path / "out", "--json")
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["cells"][0]["answer"] == "SLOWER"
    assert (tmp_path / "out" / "gate.md").read_text().startswith("<!-- attnbench gate -->")
    again = bench("gate", "--base", a, "--head", b, "--output-dir", tmp_path / "out")
    assert again.exit_code == 2
    assert "every gate has one of its own" in again.stderr


@pytest.mark.parametrize(
    ("accident", "code"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("planted"), 70)]
)
def test_no_accident_reads_as_a_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accident: BaseException, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise accident

    monkeypatch.setattr("attnbench.harness.gate.recorded.compare", fail)
    a = written(tmp_path / "a", timed("k", 1.0, seed=1))
    assert bench("gate", "--base", a, "--head", a, "--output-dir", tmp_path / "out").exit_code == code


def test_comparing_runs_shows_what_changed_and_only_that_on_demand(tmp_path: Path) -> None:
    a = written(
        tmp_path / "a",
        timed("same", 1, seed=1),
        timed("slow", 1, seed=2),
        timed("lost", 1, seed=3),
        torch="1",
    )
    b = written(
        tmp_path / "b",
        timed("same", 1, seed=4),
        timed("slow", 2, seed=5),
        failed("lost", Status.OOM),
        torch="2",
    )
    done = bench("compare", a, b, "--json", "--output-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    cells = {cell["impl"]: cell for cell in json.loads(done.stdout)["cells"]}
    assert (cells["same"]["verdict"], cells["slow"]["verdict"], cells["lost"]["verdict"]) == (
        "SAME",
        "SLOWER",
        None,
    )
    assert cells["slow"]["ms"]["low"] < 1.0 < cells["slow"]["ms"]["high"]
    assert cells["slow"]["cycles"]["change"] == pytest.approx(1.0, abs=0.02)
    assert cells["lost"]["statuses"] == ["OK", "OOM"]
    assert "note: torch is 1 in A and 2 in B" in done.stderr
    for name in ("compare.md", "compare.json", "changes.png", "changes.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    fewer = bench("compare", a, b, "--only-changed")
    assert [line.split("\t")[:2] for line in fewer.stdout.splitlines()] == [
        ["SLOWER", "slow"],
        ["OK → OOM", "lost"],
    ]
    assert bench("compare", a, b, "--only", "nobody").exit_code == 2
    assert bench("compare", a, tmp_path / "nowhere").exit_code == 2


def test_comparing_implementations_of_one_run(tmp_path: Path) -> None:
    run = written(tmp_path / "a", timed("x", 1.0, seed=1), timed("y", 1.1, seed=2))
    done = bench("compare", "x", "y", "--run", run, "--markdown")
    assert done.exit_code == 0, done.output
    assert "| SLOWER | y / x | b1\\_h2\\_q64\\_d32\\_fp32\\_full\\_fwd | 1 | 1.1 |" in done.stdout
    assert bench("compare", "x", "z", "--run", run).exit_code == 2


def test_rounds_of_one_run_are_paired_and_of_two_runs_are_not(tmp_path: Path) -> None:
    """Both sides drift together by a third: within a run that cancels, between runs it is noise."""
    drift = [1.0 + 0.03 * n for n in range(12)]
    cells = [timed(name, 1.0, seed=seed, noise=0.001) for seed, name in enumerate(("x", "y"))]
    for cell in cells:
        assert cell.timing
        cell.timing.rounds[:] = [
            [ms * by for ms in turn] for turn, by in zip(cell.timing.rounds, drift, strict=True)
        ]
    one = load_run(written(tmp_path / "a", *cells))
    (paired,) = implementations(one, "x", "y")
    apart = runs(one, one, ["x"])[0]
    assert paired.ms
    assert apart.ms
    assert paired.ms.verdict(math.log1p(0.02)) is Verdict.SAME
    assert apart.ms.high - apart.ms.low > 10 * (paired.ms.high - paired.ms.low)


@given(st.floats(0.5, 2.0))
def test_the_other_way_round_is_the_inverse(ratio: float) -> None:
    from attnbench.harness.gate.recorded import _welch
    from attnbench.harness.gate.rounds import RoundLogs

    a, b = (RoundLogs.of(timed("k", ms, seed=seed)).ms for seed, ms in ((1, 1.0), (2, ratio)))
    one, other = _welch(a, b, 0.05), _welch(b, a, 0.05)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
