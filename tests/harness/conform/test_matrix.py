"""The support matrix says of a cell what its findings say, and nothing that was not put to the test."""

from __future__ import annotations

import dataclasses
from math import comb
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.matrix import all_features, false_alarm_bound, features, tables, totals
from attnbench.harness.conform.records import Recorded, Recorder, read
from attnbench.harness.conform.suite import select, suite_names
from attnbench.harness.conform.verdict import NOT_ASKED, Finding, Verdict
from attnbench.harness.conform.write_matrix import write_matrix
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.harness.report.escape import markdown_escape
from attnbench.harness.run.errors import Exit

FACTS = {"torch": "2", "cuda": None, "id": "cpu", "name": "cpu"}
FULL = Case(Problem(1, 2, 9, 8, dtype="fp32"), "c", "w", suite="causal")
SEEN = dataclasses.replace(FULL, suite="gqa")
CAUSAL = dataclasses.replace(FULL, problem=dataclasses.replace(FULL.problem, mask=Mask.causal(), seqlen_k=12))


def finding(case: Case, verdict: Verdict, impl: str = "a", reason: str = "planted") -> Finding:
    return Finding(case.id, impl, "1", "cpu", verdict, "" if verdict is Verdict.PASS else reason)


def recorded(*pairs: tuple[Case, Verdict, str]) -> Recorded:
    findings = [finding(case, verdict, impl) for case, verdict, impl in pairs]
    cases = {case.id: case for case, _, _ in pairs}
    impls = tuple(dict.fromkeys(impl for _, _, impl in pairs))
    return Recorded(Path("run"), cases, impls, findings, {"devices": [FACTS]})


def word(run: Recorded, feature: str, impl: str) -> str | None:
    (table,) = tables([run])
    cell = table.rows[feature][table.impls.index(impl)]
    return cell and cell.word


def test_every_builtin_case_is_evidence_for_some_row() -> None:
    rows = set(all_features())
    for kind in ("cpu", "cuda"):
        for case in select(suite_names(), kind, nightly=True):
            assert features(case), case.id
            assert set(features(case)) <= rows


def test_a_case_that_is_there_for_its_strides_says_nothing_of_its_mask() -> None:
    strided = dataclasses.replace(CAUSAL.problem, strides=(("k", (0, 16, 8, 1)),), direction="fwd_bwd")
    assert features(dataclasses.replace(CAUSAL, problem=strided)) == ["other strides, backward"]
    assert features(CAUSAL) == ["causal, aligned bottom right, forward"]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["PASS"], "yes"),
        (["PASS", "REFUSED"], "part"),
        (["REFUSED"], "no"),
        (["PASS", "REFUSED", "FAIL"], "FAIL"),
        (["PASS", "CRASHED"], "FAIL"),
        (["OOM"], "absent"),
    ],
)
def test_a_cell_is_what_its_findings_are(verdicts: list[str], expected: str) -> None:
    run = recorded(*((FULL.with_seed(n), Verdict(name), "a") for n, name in enumerate(verdicts)))
    assert word(run, "no mask, forward", "a") == expected


def test_what_was_not_asked_is_empty_and_who_is_not_there_is_left_out() -> None:
    run = recorded((FULL, Verdict.PASS, "a"), (CAUSAL, Verdict.PASS, "b"), (FULL, Verdict.UNAVAILABLE, "c"))
    assert word(run, "no mask, forward", "b") is None
    (table,) = tables([run])
    assert table.impls == ["a", "b"]


def test_the_bound_is_the_rule_of_three() -> None:
    assert false_alarm_bound(3000, 0) == pytest.approx(3 / 3000, rel=0.01)
    assert false_alarm_bound(2999, 1) > 1.5 * false_alarm_bound(3000, 0)
    # By its definition: so few failures, or fewer, have a chance of 5%.
    p = false_alarm_bound(27, 3)
    assert sum(comb(30, k) * p**k * (1 - p) ** (30 - k) for k in range(4)) == pytest.approx(0.05)
    assert false_alarm_bound(0, 2) == 1.0


def test_what_was_not_examined_is_counted_and_never_passed() -> None:
    run = recorded(
        (FULL, Verdict.PASS, "a"), (CAUSAL, Verdict.REFUSED, "a"), (FULL, Verdict.UNAVAILABLE, "b")
    )
    a, b = totals([run])
    assert run.unexamined == [("b", CAUSAL.id)]
    assert a.counts == {"PASS": 1, "REFUSED": 1}
    assert (a.failed, a.answered, a.bound) == (0, 1, pytest.approx(0.95))
    assert b.counts == {"NOT EXAMINED": 1, "UNAVAILABLE": 1}
    assert (a.there, b.there) == (True, False)


def test_a_fault_of_the_machine_is_no_failure_of_whom_it_kept_from_being_asked(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.open([FULL, SEEN], ("bench",), FACTS, impls=["a", "b"])
    why = "not judged: the oracle failed: CUDA | out of memory"
    for impl in ("a", "b"):
        unasked = Finding(SEEN.id, impl, "1", "cpu", Verdict.ERROR, why, facts=NOT_ASKED)
        recorder.append(unasked)
    recorder.append(finding(FULL, Verdict.PASS))
    run = read(tmp_path)
    assert word(run, "no mask, forward", "a") == "yes"
    assert [(total.counts, total.failed) for total in totals([run])] == [
        ({"NOT EXAMINED": 1, "PASS": 1}, 0),
        ({"NOT EXAMINED": 2}, 0),
    ]
    assert run.unexamined == [("a", SEEN.id), ("b", FULL.id), ("b", SEEN.id)]
    assert run.faults == {("a", SEEN.id): why, ("b", SEEN.id): why}
    write_matrix([run], tmp_path)
    text, page = (tmp_path / "matrix.md").read_text(), (tmp_path / "matrix.html").read_text()
    assert (
        r"- a, the machine at fault (not judged: the oracle failed: CUDA \| out of memory): gqa/c (1)" in text
    )
    assert "- b: causal/c (1)\n" in text
    assert "<b>a</b>, the machine at fault (not judged: the oracle failed: CUDA | out of memory): " in page
    assert "| a | 1 | 1 | 0 of 1 | 95% |" in text
    assert "FAIL" not in text.replace("**FAIL** some are", "")
    recorder.append(finding(SEEN, Verdict.PASS))  # asked again
    assert read(tmp_path).faults == {("b", SEEN.id): why}
    assert read(tmp_path).unexamined == [("b", FULL.id), ("b", SEEN.id)]


def test_the_pages_are_written_and_escape_what_records_say(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recorder = Recorder(folder)
    recorder.open([FULL, CAUSAL, SEEN], ("bench",), FACTS, impls=["a"])
    hostile = "<script>alert(1)</script> | *x*"
    recorder.append(finding(FULL, Verdict.FAIL, reason=hostile))
    recorder.append(finding(CAUSAL, Verdict.PASS))
    recorder.reproducers([{"impl": "a", "found": FULL.id, "script": "a-causal-c.py"}])
    answer = CliRunner().invoke(
        app, ["matrix", str(folder), "--output-dir", str(tmp_path)], prog_name="bench"
    )
    assert answer.exit_code == Exit.OK
    assert answer.stdout.split() == [str(tmp_path / "matrix.md"), str(tmp_path / "matrix.html")]
    page, text = (tmp_path / "matrix.html").read_text(), (tmp_path / "matrix.md").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "| no mask, forward | **FAIL** 1 |" in text
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \| \*x\*" in text
    assert "| causal, aligned bottom right, forward | yes 1 |" in text
    assert "| implementation | PASS | FAIL | NOT EXAMINED | failed | at 95% below |\n|:--|--:|" in text
    assert "| a | 1 | 1 | 1 | 1 of 2 | 97.5% |" in text
    assert "- a: gqa/c (1)\n" in text
    assert f"- a, causal/c: 1 FAIL of 2, first {markdown_escape(FULL.id)}: &lt;script" in text
    assert " Shown by reproducers/a-causal-c.py" in text
    missing = CliRunner().invoke(app, ["matrix", str(tmp_path / "none")], prog_name="bench")
    assert missing.exit_code == Exit.USAGE
    assert "holds no conformance run" in missing.stderr
