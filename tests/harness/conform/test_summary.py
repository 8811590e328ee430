"""The end of a run in few lines: who is not there reads once, and a failing case is told once, with an example."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.known import Known
from attnbench.harness.conform.records import Recorded
from attnbench.harness.conform.summary import summary
from attnbench.harness.conform.verdict import UPSET, Finding, Verdict
from attnbench.harness.problem import Problem

CASES = [
    Case(Problem(1, 1, length, 8, dtype="fp32"), name, "w", suite="s")
    for name in ("one", "two")
    for length in (1, 2, 3)
]


def run(*answers: tuple[str, str, str], facts: dict[str, str] | None = None) -> Recorded:
    """answers: implementation, a verdict a case by its first letter, the reason of those that need one."""
    verdicts = {verdict[0]: verdict for verdict in ("PASS", "FAIL", "ERROR", "UNAVAILABLE", "REFUSED")}
    findings = [
        Finding(
            case.id,
            impl,
            "1",
            "cpu",
            Verdict(verdicts[letter]),
            "" if letter == "P" else reason,
            facts=facts or {},
        )
        for impl, letters, reason in answers
        for case, letter in zip(CASES, letters, strict=False)
    ]
    impls = tuple(impl for impl, *_ in answers)
    return Recorded(Path("run"), {case.id: case for case in CASES}, impls, findings, {})


def test_a_line_an_implementation_and_a_column_for_what_occurs() -> None:
    lines = list(summary(run(("a-long-name", "PPPPPP", ""), ("b", "PFEPR", "out is nan"))))
    assert lines[:3] == [
        "implementation  PASS  FAIL  ERROR  REFUSED  NOT EXAMINED  failed  at 95% below",
        "a-long-name        6     0      0        0             0  0 of 6         39.3%",
        "b                  2     1      1        1             1  2 of 4         90.2%",
    ]


def test_who_is_not_there_reads_once() -> None:
    found = run(("a", "UUUUUU", "not installed"), ("b", "RRRRRR", "no"), ("c", "UUUUUU", "not installed"))
    lines = list(summary(found))
    assert [line.split()[0] for line in lines] == ["implementation", "b", "a,"]
    assert lines[1].split()[1:] == ["6", "0", "of", "0", "-"]
    assert lines[2] == "a, c: unavailable, not installed"
    assert list(summary(run(("a", "UUUUUU", "not installed")))) == ["a: unavailable, not installed"]


def test_the_failures_of_a_case_are_told_once_with_an_example() -> None:
    lines = list(summary(run(("b", "PFEFPP", "r" * 500), ("a", "PPPFFF", "out is nan"))))[3:]
    point = {case.id: case.id.removeprefix(case.family) for case in CASES}
    assert lines == [
        f"a s/two: 3 FAIL of 3, as {point[CASES[3].id]}: out is nan",
        f"b s/one: 1 FAIL, 1 ERROR of 3, as {point[CASES[1].id]}: {'r' * 160}",
        f"b s/two: 1 FAIL of 3, as {point[CASES[3].id]}: {'r' * 160}",
    ]


def test_what_is_known_is_told_apart_and_leaves_the_bound() -> None:
    fault = Known("a", "s/one", "nan", "planted", "attnbench#1")
    mended = dataclasses.replace(fault, impl="b", why="was planted")
    found = run(("a", "FPPFPP", "out is nan"), ("b", "PPPPPP", ""))
    header, a, b, *lines = summary(found, [fault, mended])
    assert header.split() == ["implementation", "PASS", "FAIL", "KNOWN", "failed", "at", "95%", "below"]
    assert a.split()[1:] == ["4", "2", "1", "1", "of", "5", "65.7%"]
    assert b.split()[1:4] == ["6", "0", "0"]
    assert lines[:2] == [
        "known, and not among the failures: 1 of a s/one: planted (attnbench#1)",
        "no longer seen, so to be taken off the list: b s/one: was planted (attnbench#1)",
    ]
    assert [line.split(",")[0] for line in lines[2:]] == ["a s/two: 1 FAIL of 3"]


def test_errors_that_fresh_processes_did_not_make_are_counted() -> None:
    lines = list(summary(run(("a", "PP", ""), facts={UPSET: "ERROR: left over"})))
    told = "a: 2 errors of processes that an earlier case had upset were not those of fresh ones: ERROR: left over"
    assert lines[2] == told
