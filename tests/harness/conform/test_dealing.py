"""Every pair is asked once, by whom and when it should be; a budget, a kill or a full device make no finding."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from attnbench.harness.conform import dealing
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.dealing import (
    LEAST_ANSWERS,
    SHARE_BESIDE_OTHERS,
    START_S,
    Hand,
    Posts,
    examine_all,
    kind_of,
)
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
        self.ahead: list[Case] = []
        self.started: list[str] = []
        self.at_once, self.most_at_once = 0, 0
        self.ended = False
        self.lock = threading.Lock()

    def about(self, impl: str) -> dict[str, Any]:
        with self.lock:
            self.started.append(impl)
        return {"compile_processes": self.compilers.get(impl, 1)}

    def answer_ahead(self, cases: Iterable[Case], over: Callable[[], bool]) -> None:
        self.ahead = list(cases)

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
    assert examined.ahead == CASES[5:]  # nor is its right answer wanted


def answered(hand: Hand, cases: int, seconds: float) -> Hand:
    for _ in range(cases):
        hand.took(seconds)
    return hand


def test_slow_compilers_begin_first_and_everybody_has_one() -> None:
    hands = [Hand(impl, CASES, n) for impl, n in (("a", 1), ("triton", 3), ("b", 1), ("flex", 6))]
    posts = Posts(hands, 8)
    begun = [(post[0].impl, post[1]) for post in iter(posts.next, None)]
    assert begun == [
        *(("flex", n) for n in range(6)),
        *(("triton", n) for n in range(3)),
        ("a", 0),
        ("b", 0),
    ]
    assert not posts.over  # more may be wanted once it is seen how long their cases take
    single = Posts([Hand("a", CASES, 6), Hand("nothing left", [])], 1)
    assert [(post[0].impl, post[1]) for post in iter(single.next, None)] == [("a", 0)]


def test_who_is_free_goes_where_most_is_left_for_each_worker() -> None:
    """A compiler that did not say that it is slow, as FlashAttention-4: 326 s of one worker, and 4 minutes nobody's."""
    slow, quick, flex = Hand("slow", CASES), Hand("quick", CASES), Hand("flex", CASES, 3)
    posts = Posts([quick, flex, slow], 4)
    while posts.next():
        pass
    answered(quick, LEAST_ANSWERS, 0.02)
    answered(flex, LEAST_ANSWERS, 4.0)  # 12 cases: 48 s for 3
    answered(slow, LEAST_ANSWERS - 1, 5.0)  # 60 s for one, if that is known
    assert posts.next() is None  # to flex a fourth is worth 4 s
    slow.took(5.0)
    assert [posts.next() for _ in range(3)] == [(slow, 1), (slow, 2), None]
    answered(flex, 1, 1e6)
    assert [posts.next(), posts.next()] == [(flex, 3), None]  # as many as one implementation may have
    while slow.take((), ()):
        pass
    assert slow.left == 0
    assert not posts.over  # flex and quick still hold cases


def test_of_two_that_want_help_the_one_that_would_end_last_has_it() -> None:
    short, long = (answered(Hand(n, CASES), LEAST_ANSWERS, s) for n, s in (("short", 4.0), ("long", 9.0)))
    posts = Posts([short, long], 4)
    given = [post[0].impl for post in iter(posts.next, None)]
    # 48 s and 108 s for one each, then 54 for each of two, 36 of three.
    assert given[:6] == ["short", "long", "long", "long", "short", "long"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_more_worker_is_worth_its_start_or_is_not_started(workers: int) -> None:
    """``left / workers - left / (workers + 1)`` is what it saves."""
    for share, wanted in ((1.05, True), (0.95, False)):
        hand = answered(
            Hand("a", CASES), LEAST_ANSWERS, share * START_S * workers * (workers + 1) / len(CASES)
        )
        hand.workers = workers
        assert hand.wants_help == wanted


WIDE = [
    Case(Problem(1, 1, length, size, dtype=dtype), "c", "w", suite="s", inputs=inputs)
    for length in (5, 6, 7)
    for size in (8, 16)
    for dtype in ("fp32", "bf16")
    for inputs in ("normal", "needle")
]


def test_what_one_worker_compiled_it_is_asked_on_and_others_begin_elsewhere() -> None:
    hand, own, at = Hand("a", WIDE), [set(), set()], Counter()  # type: ignore[var-annotated]
    dealt: list[list[Case]] = []
    for turn in range(12):
        kind, cases = hand.take(own[turn % 2], at) or pytest.fail("nothing was left")
        own[turn % 2].add(kind)
        dealt.append(cases)
        assert {kind_of(case) for case in cases} == {kind}
    assert hand.take(own[0], at) is None
    # Both inputs of one problem together: what was compiled for it answers them.
    assert [len({case.problem.key for case in cases}) for cases in dealt] == [1] * 12
    assert sorted(case.id for cases in dealt for case in cases) == sorted(case.id for case in WIDE)
    assert [len(kinds) for kinds in own] == [2, 2]
    assert not own[0] & own[1]


def test_a_worker_helps_with_what_others_began_when_nothing_else_is_left() -> None:
    hand = Hand("a", [case for case in WIDE if case.problem.head_dim == 8 and case.problem.dtype == "fp32"])
    first, _ = hand.take((), ()) or pytest.fail("nothing was left")
    assert [taken[0] for taken in iter(lambda: hand.take((), {first}), None)] == [first, first]


def test_a_kind_at_which_another_implementation_is_waits_where_there_is_another() -> None:
    """Two that share a cache on disk, beginning side by side, both compiled what one of them could have read."""
    alone = Hand("alone", WIDE)
    kinds = list(dict.fromkeys(taken[0] for taken in iter(lambda: alone.take((), ()), None)))
    twin = Hand("twin", WIDE, 3).take((), set(kinds[:3])) or pytest.fail("nothing was left")
    plain = Hand("plain", WIDE).take((), set(kinds[:3])) or pytest.fail("nothing was left")
    assert (twin[0], plain[0]) == (kinds[3], kinds[0])


def test_one_implementation_has_all_cores_where_it_is_asked_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four workers at eight jobs on a GPU: each has to come for the first of them to go on."""
    monkeypatch.setattr(dealing, "START_S", 0.0)
    all_there = threading.Barrier(4)
    waited, count = threading.local(), itertools.count(1)

    def answer(impl: str, case: Case, share: float) -> Verdict:
        if not hasattr(waited, "once") and next(count) > LEAST_ANSWERS:
            waited.once = True
            all_there.wait(timeout=60)
        return Verdict.PASS

    examined = Examined(answer)
    told = deal(examined, ["quick"], [case.with_seed(n) for case in CASES for n in range(20)], jobs=8)
    assert len({finding.case for finding in told}) == len(told) == 240
    assert {part for _, part, *_ in examined.asked} == {0, 1, 2, 3}


def test_a_slow_compilers_large_cases_come_before_its_others_and_anybody_elses_behind() -> None:
    examined = Examined(compilers={"slow": 2})
    deal(examined, ["slow", "quick"], [*CASES, LARGE], jobs=1)
    of = {
        impl: [case.alone for who, _, case, *_ in examined.asked if who == impl] for impl in ("slow", "quick")
    }
    assert of == {"slow": [True] + [False] * 12, "quick": [False] * 12 + [True]}


@pytest.mark.parametrize("compilers", [{}, {"c": 2}], ids=["behind", "ahead"])
def test_who_waits_for_the_device_takes_no_thread_from_the_rest(compilers: dict[str, int]) -> None:
    """Two threads, and a large case that ends once all others are asked, of whichever implementation."""
    small, large = threading.Semaphore(0), itertools.count()

    def answer(impl: str, case: Case, share: float) -> Verdict:
        if not case.alone:
            small.release()
        elif next(large) == 0:
            return Verdict.PASS if all(small.acquire(timeout=5) for _ in range(36)) else Verdict.TIMEOUT
        return Verdict.PASS

    told = deal(Examined(answer, compilers), ["a", "b", "c"], [*CASES, LARGE], jobs=2)
    assert [finding.verdict for finding in told] == ["PASS"] * 39


def test_large_cases_are_asked_one_at_a_time_and_leave_memory_to_others() -> None:
    examined = Examined(lambda *_: time.sleep(0.005) or Verdict.PASS)  # type: ignore[func-returns-value]
    deal(examined, [f"impl-{n}" for n in range(6)], [LARGE, CASES[0]], jobs=6)
    assert examined.most_at_once == 1
    assert {(case.alone, share) for *_, case, _, share in examined.asked} == {
        (True, SHARE_BESIDE_OTHERS),
        (False, 1.0),
    }


def test_a_large_case_that_runs_out_of_memory_beside_others_is_asked_again_alone() -> None:
    """By workers that start side by side once all others have ended, for they hold what memory they once had."""
    before_the_first: list[Any] = []

    def answer(impl: str, case: Case, share: float) -> Verdict:
        if case.alone and share == 1 and not before_the_first:
            before_the_first.extend([sorted(examined.started), set(examined.closed)])
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
    assert before_the_first == [["fits-alone"] * 2 + ["too-large"] * 2, {("fits-alone", 0), ("too-large", 0)}]


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
