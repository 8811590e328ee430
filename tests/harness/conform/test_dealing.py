"""Every pair is asked once, by whom and when it should be; a budget, a kill or a full device make no finding."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.dealing import SHARE_BESIDE_OTHERS, _Hand, _order, examine_all
from attnbench.harness.conform.verdict import Finding, Verdict
from attnbench.harness.problem import Problem

CASES = [
    Case(Problem(1, 1, length, 8, dtype="fp32"), "c", "w", suite="s", check=check)
    for length in range(1, 7)
    for check in ("agrees", "own_results")
]
LARGE = Case(Problem(1, 1, 3, 8, dtype="fp32"), "large", "w", suite="s", alone=True)
Answer = Callable[[str, Case, float], Verdict]


class Examined:
    """Stands in for an Examination: ``answer`` says what becomes of a case; who was asked is written down."""

    def __init__(self, answer: Answer | None = None, compilers: dict[str, int] | None = None) -> None:
        self.device = "cuda:0"
        self.answer = answer or (lambda *_: Verdict.PASS)
        self.compilers = compilers or {}
        self.asked: list[tuple[str, int, Case, float, float]] = []
        self.closed: list[tuple[str, int]] = []
        self.at_once, self.most_at_once = 0, 0
        self.ended = False
        self.lock = threading.Lock()

    def about(self, impl: str) -> dict[str, Any]:
        return {"compile_processes": self.compilers.get(impl, 1)}

    def examine(
        self, impl: str, case: Case, part: int = 0, *, limit_s: float, memory_share: float
    ) -> Finding:
        with self.lock:
            self.asked.append((impl, part, case, limit_s, memory_share))
            self.at_once += case.alone
            self.most_at_once = max(self.most_at_once, self.at_once)
        verdict = self.answer(impl, case, memory_share)
        with self.lock:
            self.at_once -= case.alone
        reason = "" if verdict is Verdict.PASS else "planted"
        return Finding(case.id, impl, "1", "cpu", verdict, reason)

    def close(self, impl: str, part: int = 0) -> None:
        self.closed.append((impl, part))

    def kill(self) -> None:
        self.ended = True


def deal(
    examined: Examined, impls: list[str], cases: list[Case], jobs: int = 4, **more: Any
) -> list[Finding]:
    told: list[Finding] = []
    examine_all(examined, impls, cases, jobs, told.append, **more)  # type: ignore[arg-type]
    return told


def test_every_pair_is_asked_once_however_many_ask() -> None:
    examined = Examined(lambda *_: time.sleep(0.001) or Verdict.PASS, {"slow": 3})  # type: ignore[func-returns-value]
    told = deal(examined, ["slow", "quick"], [*CASES, LARGE], jobs=8)
    pairs = {(impl, case.id) for impl in ("slow", "quick") for case in [*CASES, LARGE]}
    assert Counter(finding.pair for finding in told) == Counter(pairs)
    assert {impl for impl, _ in examined.closed} == {"slow", "quick"}
    # Cases of one question go to one worker, for they share an oracle.
    askers = {(impl, case.question, case.alone): set() for impl, _, case, *_ in examined.asked}
    for impl, part, case, *_ in examined.asked:
        askers[impl, case.question, case.alone].add(part)
    assert {len(parts) for parts in askers.values()} == {1}


def test_what_was_found_is_not_asked_and_who_has_nothing_left_is_not_started() -> None:
    examined = Examined()
    found = {("done", case.id) for case in CASES} | {("half", case.id) for case in CASES[:5]}
    told = deal(examined, ["done", "half"], CASES, found=found)
    assert {finding.pair for finding in told} == {("half", case.id) for case in CASES[5:]}
    assert {impl for impl, *_ in examined.asked} == {"half"}


def test_slow_compilers_begin_first_and_take_the_jobs_that_are_left() -> None:
    hands = [_Hand.deal(impl, CASES, n) for impl, n in (("a", 1), ("triton", 3), ("b", 1), ("flex", 6))]
    order = [(hand.impl, part) for hand, part in _order(hands, 8)]
    begun = [*(("flex", n) for n in range(6)), *(("triton", n) for n in range(3)), ("a", 0), ("b", 0)]
    assert order[:13] == [*begun, ("flex", 6), ("flex", 7)]
    assert [(hand.impl, part) for hand, part in _order(hands, 1)] == [
        ("flex", 0),
        ("triton", 0),
        ("a", 0),
        ("b", 0),
    ]


def test_one_implementation_has_all_cores_where_it_is_asked_much() -> None:
    """Four workers at eight jobs on a GPU: each has to come for the first of them to go on."""
    all_there = threading.Barrier(4)
    waited = threading.local()

    def answer(impl: str, case: Case, share: float) -> Verdict:
        if not hasattr(waited, "once"):
            waited.once = True
            all_there.wait(timeout=60)
        return Verdict.PASS

    examined = Examined(answer)
    told = deal(examined, ["quick"], [case.with_seed(n) for case in CASES for n in range(20)], jobs=8)
    assert len({finding.case for finding in told}) == len(told) == 240
    assert {part for _, part, *_ in examined.asked} == {0, 1, 2, 3}


def test_more_workers_are_worth_their_start_where_much_or_much_that_is_slow_is_left() -> None:
    many = [case.with_seed(n) for case in CASES for n in range(20)]
    wants = {
        (n, len(cases)): _Hand.deal("a", cases, n).wants_help for n in (1, 3) for cases in ([], CASES, many)
    }
    assert wants == {
        (1, 0): False,
        (1, 12): False,
        (1, 240): True,
        (3, 0): False,
        (3, 12): True,
        (3, 240): True,
    }


def test_a_slow_compilers_large_cases_come_before_its_others_and_anybody_elses_behind() -> None:
    examined = Examined(compilers={"slow": 2})
    deal(examined, ["slow", "quick"], [*CASES, LARGE], jobs=1)
    of = {
        impl: [case.alone for who, _, case, *_ in examined.asked if who == impl] for impl in ("slow", "quick")
    }
    assert of == {"slow": [True] + [False] * 12, "quick": [False] * 12 + [True]}


def test_large_cases_are_asked_one_at_a_time_and_leave_memory_to_others() -> None:
    examined = Examined(lambda *_: time.sleep(0.005) or Verdict.PASS)  # type: ignore[func-returns-value]
    deal(examined, [f"impl-{n}" for n in range(6)], [LARGE, CASES[0]], jobs=6)
    assert examined.most_at_once == 1
    assert {(case.alone, share) for *_, case, _, share in examined.asked} == {
        (True, SHARE_BESIDE_OTHERS),
        (False, 1.0),
    }


def test_a_large_case_that_runs_out_of_memory_beside_others_is_asked_again_alone() -> None:
    def answer(impl: str, case: Case, share: float) -> Verdict:
        full = case.alone and (share < 1 or impl == "too-large")
        return Verdict.OOM if full else Verdict.PASS

    examined = Examined(answer)
    told = deal(examined, ["fits-alone", "too-large"], [*CASES, LARGE])
    assert {f.impl: f.verdict for f in told if f.case == LARGE.id} == {
        "fits-alone": "PASS",
        "too-large": "OOM",
    }
    assert len(told) == 26
    assert [case.alone for _, _, case, *_ in examined.asked[-2:]] == [True, True]


def test_what_no_budget_is_left_for_has_no_finding() -> None:
    asked: list[str] = []

    def answer(impl: str, case: Case, share: float) -> Verdict:
        asked.append(case.id)
        if len(asked) == 3:
            time.sleep(0.3)
            return Verdict.TIMEOUT  # cut off by the budget: it did not have the time that a case has
        return Verdict.PASS

    examined = Examined(answer)
    told = deal(examined, ["impl"], [*CASES, LARGE], jobs=1, budget_s=0.2)
    assert [finding.verdict for finding in told] == ["PASS", "PASS"]
    assert len(asked) == 3
    assert all(0 < limit <= 0.2 for *_, limit, _ in examined.asked)


def test_a_timeout_of_its_own_is_a_finding() -> None:
    assert {f.verdict for f in deal(Examined(lambda *_: Verdict.TIMEOUT), ["impl"], CASES)} == {"TIMEOUT"}


def test_a_run_that_is_ended_says_nothing_of_the_workers_it_killed() -> None:
    examined = Examined()

    def answer(impl: str, case: Case, share: float) -> Verdict:
        if impl == "broken":
            raise RuntimeError("planted")
        while not examined.ended:
            time.sleep(0.001)
        return Verdict.CRASHED

    examined.answer = answer
    told: list[Finding] = []
    with pytest.raises(RuntimeError, match="planted"):
        examine_all(examined, ["waits", "broken"], CASES, 2, told.append)  # type: ignore[arg-type]
    assert examined.ended
    assert not told
