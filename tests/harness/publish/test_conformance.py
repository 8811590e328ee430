"""Conformance runs on the page of the support matrix: counted by suite, the latest finding of a case, failures told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.records import Recorder
from attnbench.harness.conform.verdict import NOT_ASKED, Finding, Verdict
from attnbench.harness.problem import Problem
from attnbench.harness.publish import conformance
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.publish.site import pages
from attnbench.harness.run.errors import Exit

HOSTILE = "<b onclick=alert(1)>"
CASES = [
    Case(Problem(1, 1, length, 16), name, why, suite=suite, cites=("flash-attention#282",))
    for suite, name, why, length in (
        ("causal", "short", "queries fewer than keys", 3),
        ("causal", "long", f"more {HOSTILE}", 5),
        ("gqa", "one", "heads share", 7),
    )
]


@pytest.fixture
def record(tmp_path: Path) -> Callable[[str, dict[tuple[str, int], tuple[Verdict, str]]], Path]:
    """Writes a conformance run: what came of case number N for an implementation."""

    def write(
        name: str,
        findings: dict[tuple[str, int], tuple[Verdict, str]],
        unasked: tuple[tuple[str, int], ...] = (),
    ) -> Path:
        recorder = Recorder(tmp_path / name)
        facts: dict[str, Any] = {"id": "cuda:0", "name": "NVIDIA H200", "torch": "2.11", "cuda": "13.0"}
        recorder.open(CASES, ("bench", "conform"), facts, impls=())
        for (impl, number), (verdict, reason) in findings.items():
            facts = NOT_ASKED if (impl, number) in unasked else {}
            recorder.append(Finding(CASES[number].id, impl, "1.0", "cuda:0", verdict, reason, facts=facts))
        return tmp_path / name

    return write


FIRST = {
    ("good", 0): (Verdict.PASS, ""),
    ("good", 1): (Verdict.PASS, ""),
    ("good", 2): (Verdict.REFUSED, "no gqa"),
    ("bad", 0): (Verdict.FAIL, f"out[0] is 2 {HOSTILE}"),
    ("bad", 1): (Verdict.PASS, ""),
    ("gone", 0): (Verdict.UNAVAILABLE, "not installed"),
}


def test_cases_are_counted_by_suite(record: Any) -> None:
    (found,) = conformance.load([record("run", FIRST)])
    assert (found.device, found.suites) == ("NVIDIA H200", ["causal", "gqa"])
    shown = {impl: [(tally.state, tally.text) for tally in own] for impl, own in found.tallies.items()}
    assert shown == {
        "good": [("yes", "2 of 2"), ("no", "no")],
        "bad": [("failed", "1 of 2"), ("", "1 not examined")],
        "gone": [("absent", "absent, 1 not examined"), ("", "1 not examined")],
    }
    assert [finding.impl for finding in found.failures] == ["bad"]


def test_a_fault_of_the_machine_is_not_examined_and_hides_no_finding(
    record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unjudged = (Verdict.ERROR, "not judged: out of memory")
    older = record("older", {("good", 0): (Verdict.PASS, "")})
    faults = {("good", number): unjudged for number in (0, 1)}
    newer = record("newer", faults, unasked=tuple(faults))
    started = {older: "2026-11-20", newer: "2026-11-21"}
    monkeypatch.setattr(conformance, "_started", lambda run: started[run.folder])
    (found,) = conformance.load([older, newer])
    causal, gqa = found.tallies["good"]
    assert (causal.state, causal.text) == ("yes", "1 of 1, 1 not examined")
    assert causal.told == "1 PASS, 1 not examined, the machine at fault: not judged: out of memory"
    assert (gqa.state, gqa.text, gqa.told) == ("", "1 not examined", "")
    assert found.failures == []


def test_the_latest_finding_of_a_case_counts(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [record("older", FIRST), record("newer", {("bad", 0): (Verdict.PASS, "")})]
    started = {folders[0]: "2026-11-20", folders[1]: "2026-11-21"}
    monkeypatch.setattr(conformance, "_started", lambda run: started[run.folder])
    for order in (folders, folders[::-1]):
        (found,) = conformance.load(order)
        assert found.tallies["bad"][0].text == "2 of 2"
        assert found.tallies["good"][0].text == "2 of 2"


def test_findings_that_cannot_be_read_are_told_when_they_are_published(
    record: Any, folders: list[Path], bench: Callable[..., Result], tmp_path: Path
) -> None:
    run = record("run", FIRST)
    with (run / "findings-good.jsonl").open("a") as file:
        file.write("rubbish\n")
    (found,) = conformance.load([run])
    assert [len(told) for told in found.problems.values()] == [1]
    done = bench("publish", folders[0], run, "--site", tmp_path / "site")
    assert done.exit_code == Exit.OK, done.stderr
    line = f"{run}: left out: findings-good.jsonl:4: the line is torn: it does not end in a checksum"
    assert line in done.stderr.splitlines()


def test_the_page_shows_them_with_reason_why_and_issue(record: Any, runs: list[PublishedRun]) -> None:
    found = conformance.load([record("run", FIRST)])
    support = dict(pages(runs[1:], found))["support.html"]
    assert "Conformance on NVIDIA H200" in support
    for text in ("1 of 2", "flash-attention#282", "queries fewer than keys", "out[0] is 2 &lt;b onclick"):
        assert text in support
    assert HOSTILE not in support
