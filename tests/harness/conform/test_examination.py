"""Conformance with real processes and planted plugins: every way to end is a verdict, and costs its own case alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.conform import records
from attnbench.harness.conform.candidate import Candidate
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.dealing import examine_all
from attnbench.harness.conform.examination import Examination, OracleFailed
from attnbench.harness.conform.reproduce import SHOWS_IT, run_script
from attnbench.harness.conform.second_opinion import ENOUGH
from attnbench.harness.conform.suite import select
from attnbench.harness.conform.verdict import UPSET, Finding, Verdict
from attnbench.harness.problem import Problem
from attnbench.harness.run.errors import Exit

Findings = dict[tuple[str, str], Finding]


def by_name(findings: list[Finding]) -> Findings:
    return {(finding.impl, finding.case.partition("[")[0].partition("/")[2]): finding for finding in findings}


@pytest.fixture(scope="module")
def examined(suite: str) -> tuple[Findings, int]:
    """Findings of a few plugins, and how many processes were started for the one that raises at everything."""
    cases = select([suite], "cpu")
    impls = ["right", "last-key", "aborts", "poisoned", "never", "sdpa-cudnn"]
    told: list[Finding] = []
    with Examination("cpu", cases) as examination:
        examine_all(examination, impls, cases, 2, told.append)
        started = len(list(examination._scratch.glob("never-*.log")))
    assert len(told) == 18
    return by_name(told), started


@pytest.fixture(scope="module")
def found(examined: tuple[Findings, int]) -> Findings:
    return examined[0]


def test_the_referee_answers_ahead_what_is_asked_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        Case(Problem(1, 1, length, 8, dtype="fp32"), "c", "w", suite="s", check=check)
        for length in (1, 2, 3, 4)
        for check in ("agrees", "own_results", "double_backward")
    ]
    solved: list[str] = []

    def solve(_: Examination, case: Case) -> OracleFailed | str:
        solved.append(case.question)
        return OracleFailed("planted") if case.problem.seqlen_q == 2 else "a file"

    monkeypatch.setattr(Examination, "_solve", solve)
    examination = Examination("cpu", asked)
    examination.answer_ahead([case for case in asked if case.check == "double_backward"], lambda: False)
    assert not solved, "a check that needs no right answer asked for one"
    examination.answer_ahead(asked, lambda: len(solved) == 3)
    assert solved == list(dict.fromkeys(case.question for case in asked))[:3]
    examination.ended = True
    examination.answer_ahead(asked, lambda: False)
    assert len(solved) == 3


def test_a_right_one_passes_everything(found: Findings) -> None:
    assert {found["right", case].verdict for case in ("even", "odd", "tail")} == {Verdict.PASS}


def test_a_wrong_one_fails_where_it_is_wrong(found: Findings) -> None:
    assert found["last-key", "even"].verdict is Verdict.PASS
    wrong = found["last-key", "tail"]
    assert wrong.verdict is Verdict.FAIL
    assert wrong.reason.startswith("out[0, 0, 0, 0] is ")
    assert set(wrong.facts["tensors"]) == {"out", "dq", "dk", "dv"}


def test_one_that_dies_or_raises_loses_that_case_alone(found: Findings) -> None:
    assert [found["aborts", case].verdict for case in ("even", "odd", "tail")] == ["PASS", "CRASHED", "PASS"]
    assert "SIGABRT" in found["aborts", "odd"].reason
    poisoned = [found["poisoned", case] for case in ("even", "odd", "tail")]
    assert [finding.verdict for finding in poisoned] == ["PASS", "ERROR", "PASS"]
    assert poisoned[1].reason == "ZeroDivisionError: planted"
    assert "in attend" in poisoned[1].evidence
    # The process that raised at the odd number did so again; a fresh one has it right.
    assert poisoned[2].facts == {UPSET: "ERROR: RuntimeError: left over from 7 keys"}


def test_one_that_raises_at_everything_is_believed_after_a_few_processes(
    examined: tuple[Findings, int],
) -> None:
    found, started = examined
    findings = [found["never", case] for case in ("even", "odd", "tail")]
    assert {finding.verdict for finding in findings} == {Verdict.ERROR}
    assert all(finding.reason.startswith("RuntimeError: no kernel for ") for finding in findings)
    assert started == ENOUGH < len(findings)


def test_one_that_is_for_another_device_is_unavailable(found: Findings) -> None:
    assert found["sdpa-cudnn", "even"].verdict is Verdict.UNAVAILABLE
    assert "runs on cuda" in found["sdpa-cudnn", "even"].reason


def test_one_that_hangs_is_ended_and_started_again(suite: str) -> None:
    cases = select([suite], "cpu", only=["even", "odd"])
    with Examination("cpu", cases, time_limit_s=20.0) as examination:
        examination.examine("hangs", cases[0])  # its imports are not what is timed
        examination._time_limit_s = 3.0
        found = [examination.examine("hangs", case).verdict for case in (cases[1], cases[0])]
    assert found == [Verdict.TIMEOUT, Verdict.PASS]


def test_ctrl_c_ends_it_at_once_and_keeps_what_was_found(suite: str, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("bench"), "conform", "--device", "cpu", "--suite", suite, "--impl",
               "right,hangs", "--time-limit", "3600", "--output-dir", tmp_path / "out"]  # fmt: skip
    found = tmp_path / "out" / "findings-right.jsonl"
    hanging = tmp_path / "out" / "findings-hangs.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            while not (hanging.exists() and found.exists() and len(found.read_text().splitlines()) == 3):
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == Exit.INTERRUPTED
    assert f"interrupted; findings so far are in {tmp_path / 'out'}" in said
    left = records.read(tmp_path / "out")
    # The worker that hung was killed with the run: that is no finding, and a resumed run asks the case.
    assert [finding.verdict for finding in left.findings] == [Verdict.PASS] * 4
    assert {impl for impl, _ in left.unexamined} == {"hangs"}
    assert not workers_of(process.pid)


def test_no_worker_is_left(found: Findings) -> None:
    assert not workers_of(os.getpid())


def workers_of(parent: int) -> list[Path]:
    mine = f'"parent": {parent}'.encode()
    return [p for p in Path("/proc").glob("[0-9]*/cmdline") if mine in _read(p) and b"run.worker" in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# ---- bench conform -------------------------------------------------------------------------------------------


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["conform", "--device", "cpu", *map(str, arguments)], prog_name="bench")


@pytest.fixture(scope="module", autouse=True)
def one_commit() -> Iterator[None]:
    """A run is gone on with at the commit that it began with, whatever is committed to the tree meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNBENCH_COMMIT", "ba9876543210")
        yield


@pytest.fixture(scope="module")
def run(suite: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of a plugin that is wrong and one that is right, with its folder."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return bench("--impl", "last-key,right", "--suite", suite, "--output-dir", folder, "--json"), folder


def test_a_failure_is_exit_1_with_its_script(run: tuple[Any, Path]) -> None:
    answer, folder = run
    assert answer.exit_code == Exit.CELLS
    document = json.loads(answer.stdout)
    assert document["counts"] == {"last-key": {"PASS": 2, "FAIL": 1}, "right": {"PASS": 3}}
    (failure,) = document["failures"]
    assert failure["impl"] == "last-key"
    assert str(folder / "reproducers" / "last-key-planted-tail.py") in document["files"]


def test_the_records_read_back(run: tuple[Any, Path]) -> None:
    _, folder = run
    recorded = records.read(folder)
    assert not recorded.problems
    assert len(recorded.findings) == 6
    assert {recorded.cases[finding.case].name for finding in recorded.findings} == {"even", "odd", "tail"}
    assert recorded.environment["command"][0] == "bench"
    line = (folder / "findings-right.jsonl").read_text().splitlines()[0]
    with (folder / "findings-right.jsonl").open("a") as file:
        file.write(line.replace("PASS", "FAIL") + "\n" + line[:40] + "\n")
    problems = records.read(folder).problems
    assert ["checksum does not match" in problems[0], "torn" in problems[1], len(problems)] == [True, True, 2]


def test_a_planted_fault_is_shown_at_its_smallest_by_a_script_of_its_own(run: tuple[Any, Path]) -> None:
    _, folder = run
    (reproducer,) = json.loads((folder / "reproducers.json").read_text())["reproducers"]
    problem = reproducer["smallest"]["problem"]
    sizes = {
        name: problem[name] for name in ("batch", "heads", "seqlen_q", "seqlen_k", "head_dim", "direction")
    }
    assert sizes == {"batch": 1, "heads": 1, "seqlen_q": 1, "seqlen_k": 65, "head_dim": 1, "direction": "fwd"}
    said = (folder / "reproducers" / "last-key-planted-tail.txt").read_text()
    assert "Error of out by head and tile" in said


def test_a_real_fault_is_shown_from_a_plain_shell(suite: str, tmp_path: Path) -> None:
    """torch 2.13: the CPU flash kernel's is_causal multiplies -inf by a negative scale."""
    answer = bench("--impl", "torch-on-the-cpu", "--suite", "numerics", "--case", "numerics/scales", "--output-dir",
                   tmp_path / "out")  # fmt: skip
    assert answer.exit_code == Exit.CELLS
    script = tmp_path / "out" / "reproducers" / "torch-on-the-cpu-numerics-scales.py"
    text = script.read_text()
    assert "attnbench" not in text.replace("torch-on-the-cpu", "")
    assert "SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V = 2, 2, 1, 1" in text
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", script], check=False, capture_output=True, text=True, env=bare
    )
    assert done.returncode == SHOWS_IT, done.stderr
    assert "is nan, not" in done.stdout
    # The same script against a library without the fault ends well.
    script.write_text(text.replace("FLASH_ATTENTION", "MATH"))
    assert run_script(script, "right") == (0, run_script(script, "right")[1])


def test_nothing_answered_is_exit_3(suite: str, tmp_path: Path) -> None:
    answer = bench("--impl", "sdpa-cudnn", "--suite", suite, "--output-dir", tmp_path / "out")
    assert answer.exit_code == Exit.NOTHING
    assert answer.stdout.splitlines()[0].startswith("sdpa-cudnn: unavailable, runs on cuda")
    assert answer.stdout.count("unavailable") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--impl", "standrd"], "--impl: unknown implementation 'standrd'; did you mean standard?"),
        (["--suite", "causl"], "unknown conformance suite 'causl'; did you mean causal"),
        (["--suite", "causal", "--case", "nowhere"], "--case 'nowhere' is part of no case's name"),
    ],
)
def test_a_slip_is_one_line_and_exit_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    answer = bench(*arguments, "--output-dir", tmp_path / "out")
    assert answer.exit_code == Exit.USAGE
    assert said in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_run_is_not_written_over(suite: str, run: tuple[Any, Path]) -> None:
    answer = bench("--impl", "right", "--suite", suite, "--output-dir", run[1])
    assert answer.exit_code == Exit.USAGE
    assert "holds a conformance run already" in answer.stderr


def lines(folder: Path, impl: str) -> list[str]:
    return (folder / f"findings-{impl}.jsonl").read_text().splitlines()


@pytest.fixture
def cut_short(run: tuple[Any, Path], tmp_path: Path) -> Path:
    """The run as a kill left it: ``right`` has one finding, the failing one of ``last-key`` is torn."""
    folder = tmp_path / "cut-short"
    shutil.copytree(run[1], folder, ignore=shutil.ignore_patterns("reproducers*"))
    (folder / "findings-right.jsonl").write_text(lines(run[1], "right")[0] + "\n")
    found = lines(run[1], "last-key")
    torn = next(line for line in found if '"FAIL"' in line)[:50]
    (folder / "findings-last-key.jsonl").write_text(
        "\n".join([line for line in found if "PASS" in line] + [torn])
    )
    return folder


def test_a_run_that_was_cut_short_is_gone_on_with(run: tuple[Any, Path], cut_short: Path) -> None:
    kept = lines(cut_short, "right"), lines(cut_short, "last-key")[:2]
    assert len(records.read(cut_short).unexamined) == 3
    answer = bench("--resume", cut_short, "--json", "--shrink-seconds", "1")
    assert answer.exit_code == Exit.CELLS, answer.stderr
    document = json.loads(answer.stdout)
    assert document["counts"] == {"last-key": {"PASS": 2, "FAIL": 1}, "right": {"PASS": 3}}
    assert document["not_examined"] == []
    assert document["bounds"]["right"]["answered"] == 3
    assert (lines(cut_short, "right")[:1], lines(cut_short, "last-key")[:2]) == kept
    (shrunk,) = records.read(cut_short).reproducers
    assert shrunk["script"] == "last-key-planted-tail.py"
    (call,) = records.read(cut_short).environment["resumed"]
    assert call["differs"] == []
    assert "to be shrunk, each for at most 1 s: 1 failures of last-key\n" in answer.stderr
    assert re.search(
        r"[\d.]+ s \(examining [\d.]+ s, \d+%, shrinking and scripts [\d.]+ s, \d+%\)\n", answer.stderr
    )
    # Nothing is left to ask or to shrink: no worker but the referee is started.
    again = bench("--resume", cut_short)
    assert again.exit_code == Exit.CELLS
    assert "shrunk" not in again.stderr
    assert records.read(cut_short).reproducers == [shrunk]


KNOWN = """
[[known]]
impl = "last-key"
case = "planted/tail["
says = "the oracle says"
why = "the loop leaves out the tail"
issue = "attnbench#1"
"""


def test_a_known_failure_is_told_apart_and_fails_nobody(cut_short: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.toml"
    known.write_text(KNOWN)
    answer = bench("--resume", cut_short, "--known", known)
    assert answer.exit_code == Exit.OK, answer.stderr
    table, told = answer.stdout.splitlines()[:3], answer.stdout.splitlines()[3]
    assert [line.split()[0] for line in table] == ["implementation", "last-key", "right"]
    assert table[1].split()[1:] == ["2", "1", "1", "0", "of", "2", "77.6%"]
    fault = "last-key planted/tail[: the loop leaves out the tail (attnbench#1)"
    assert told == f"known, and not among the failures: 1 of {fault}"
    assert "FAIL" not in answer.stderr
    assert "shrunk" not in answer.stderr
    # The record has it as what it is.
    assert [f.verdict for f in records.read(cut_short).findings if f.failed] == [Verdict.FAIL]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--impl", "right"], "--impl: a resumed run keeps its cases and implementations"),
        (["--seeds", "2"], "--seeds: a resumed run keeps its cases"),
        (["--output-dir", "elsewhere"], "--output-dir: a resumed run stays in its folder"),
    ],
)
def test_a_resumed_run_stays_what_it_was(cut_short: Path, arguments: list[str], said: str) -> None:
    answer = bench("--resume", cut_short, *arguments)
    assert (answer.exit_code, len(answer.stderr.splitlines())) == (Exit.USAGE, 1)
    assert said in answer.stderr


def test_another_commit_is_not_gone_on_with_unasked(cut_short: Path) -> None:
    path = cut_short / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "0123456789ab"}))
    answer = bench("--resume", cut_short)
    assert answer.exit_code == Exit.USAGE
    assert "commit was 0123456789ab" in answer.stderr
    assert "--resume-anyway goes on" in answer.stderr


def test_a_run_whose_budget_is_spent_names_what_it_did_not_examine(suite: str, tmp_path: Path) -> None:
    answer = bench("--impl", "hangs", "--suite", suite, "--case", "odd", "--budget", "1", "--output-dir", tmp_path,
                   "--json")  # fmt: skip
    assert answer.exit_code == Exit.INTERRUPTED
    document = json.loads(answer.stdout)
    assert document["counts"] == {"hangs": {}}
    assert [impl for impl, _ in document["not_examined"]] == ["hangs"]
    assert f"1 not examined; go on with: bench conform --resume {tmp_path}" in answer.stderr


def test_what_the_referee_could_not_answer_fails_nobody_and_is_asked_again(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Candidate.ask

    def without_memory(self: Candidate, operation: str, **arguments: Any) -> dict[str, Any]:
        if operation == "solve" and arguments["case"]["name"] == "odd":
            return {"ok": False, "status": "OOM", "reason": "out of memory"}
        return ask(self, operation, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "ask", without_memory)
        answer = bench("--impl", "right", "--suite", suite, "--case", "even", "--case", "odd", "--output-dir",
                       tmp_path, "--json")  # fmt: skip
    document = json.loads(answer.stdout)
    assert (answer.exit_code, document["exit_code"]) == (Exit.MACHINE, Exit.MACHINE)
    assert document["counts"] == {"right": {"PASS": 1}}
    assert document["bounds"]["right"]["answered"] == 1
    assert document["failures"] == []
    (unexamined,) = document["not_examined"]
    why = "not judged: the oracle failed: out of memory"
    assert document["machine_faults"] == [[*unexamined, why]]
    assert f"NOT EXAMINED right {unexamined[1]}: {why}\n" in answer.stderr
    assert f"1 not examined; go on with: bench conform --resume {tmp_path}" in answer.stderr
    again = bench("--resume", tmp_path, "--json")
    document = json.loads(again.stdout)
    assert (again.exit_code, document["counts"]) == (Exit.OK, {"right": {"PASS": 2}})
    assert document["not_examined"] == document["machine_faults"] == []


def test_the_list_says_why(suite: str) -> None:
    answer = bench("--list", "--suite", suite)
    assert answer.exit_code == 0
    assert len(answer.stdout.splitlines()) == 3
    assert "one key more than a tile" in answer.stdout
