"""Every case to every implementation, by as many workers as fit: who is asked what, when, and for how long."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examination import Examination
from attnbench.harness.conform.suite import sharing
from attnbench.harness.conform.verdict import Finding, Pair, Verdict
from attnbench.harness.run.waiting import wait_for_all

SHARE_BESIDE_OTHERS = 0.6
"""Of the device's memory, for a case that wants it to itself while other workers are about: the rest is theirs."""
WORTH_A_WORKER = 50
"""Questions left for which an implementation is given one more worker, if jobs are to spare: its start takes seconds, a
case some hundredths of one. A slow compiler's case takes seconds itself: one question is enough."""

Tell = Callable[[Finding], None]


def examine_all(
    examination: Examination,
    impls: Sequence[str],
    cases: Sequence[Case],
    jobs: int,
    tell: Tell,
    *,
    budget_s: float = math.inf,
    found: Collection[Pair] = (),
) -> None:
    """Puts the cases to the implementations, ``jobs`` workers side by side; tell is called with each finding, one call
    at a time.

    budget_s: when it is spent no case is begun, and one that is not answered by then has no finding. found: pairs that
    are not asked.
    """
    rounds = _Round(examination, tell, time.monotonic() + budget_s)
    most = jobs if examination.device == "cpu" else max(1, jobs // 2)  # a core each, as ``jobs_for`` has it
    asked = {impl: [case for case in cases if (impl, case.id) not in found] for impl in impls}
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            abouts = {impl: pool.submit(examination.about, impl) for impl in impls if asked[impl]}
            wait_for_all(abouts.values())
            hands = [
                _Hand.deal(impl, asked[impl], about.result().get("compile_processes", 1))
                for impl, about in abouts.items()
            ]
            wait_for_all([pool.submit(rounds.work, hand, part) for hand, part in _order(hands, most)])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            examination.kill()
            raise
    rounds.ask_again()


@dataclass(frozen=True)
class _Hand:
    """What one implementation is still to be asked.

    questions: cases, those with one question together, for they share an oracle. large: cases that want the device to
    themselves. compilers: how many of its workers may compile side by side; 1 where compiling takes no time.
    """

    impl: str
    questions: deque[list[Case]]
    large: deque[Case]
    compilers: int

    @property
    def wants_help(self) -> bool:
        """Whether what is left is worth the start of one more worker."""
        return len(self.questions) >= (1 if self.compilers > 1 else WORTH_A_WORKER)

    @classmethod
    def deal(cls, impl: str, cases: Iterable[Case], compilers: int) -> _Hand:
        sorted_cases = sharing(cases)
        by_question = itertools.groupby(
            (c for c in sorted_cases if not c.alone), key=lambda case: case.question
        )
        large = deque(case for case in sorted_cases if case.alone)
        return cls(impl, deque(list(of_one) for _, of_one in by_question), large, compilers)


def _order(hands: Sequence[_Hand], most: int) -> list[tuple[_Hand, int]]:
    """Which worker of whom begins when, at ``most`` of one implementation. Slow compilers come first, each with as many
    as compile side by side; then the others, with one; then more, where jobs are to spare and something is left."""
    slowest_first = sorted(hands, key=lambda hand: -hand.compilers)
    first = {hand.impl: min(hand.compilers, most) for hand in hands}
    begun = [(hand, part) for hand in slowest_first for part in range(first[hand.impl])]
    return begun + [(hand, part) for hand in slowest_first for part in range(first[hand.impl], most)]


class _Round:
    """One pass over all hands by many threads, each of which asks one worker."""

    def __init__(self, examination: Examination, tell: Tell, deadline: float) -> None:
        self._examination = examination
        self._tell = tell
        self._deadline = deadline
        self._telling = threading.Lock()
        self._room = threading.Lock()
        self._again: list[tuple[str, Case]] = []

    def work(self, hand: _Hand, part: int) -> None:
        """Asks one worker what is left of a hand, then ends the worker.

        An implementation's first one has its large cases: ahead of the rest where it compiles, which leaves the device
        to others meanwhile.
        """
        if part >= hand.compilers and not hand.wants_help:
            return
        if part == 0 and hand.compilers > 1:
            self._ask_large(hand)
        while hand.questions:
            try:
                question = hand.questions.popleft()
            except IndexError:  # another worker took the last one
                break
            for case in question:
                self._ask(hand.impl, case, part)
        if part == 0:
            self._ask_large(hand)
        self._examination.close(hand.impl, part)

    def _ask_large(self, hand: _Hand) -> None:
        """One large case at a time, of all implementations together."""
        while hand.large:
            with self._room:
                self._ask(hand.impl, hand.large.popleft(), 0, SHARE_BESIDE_OTHERS)

    def ask_again(self) -> None:
        """Puts what ran out of memory beside others to its implementation alone."""
        for impl, case in self._again:
            self._ask(impl, case, 0)
            self._examination.close(impl)

    def _ask(self, impl: str, case: Case, part: int, memory_share: float = 1.0) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return
        finding = self._examination.examine(impl, case, part, limit_s=left_s, memory_share=memory_share)
        if self._examination.ended:
            return  # its worker was killed with the run
        if finding.verdict is Verdict.TIMEOUT and time.monotonic() >= self._deadline:
            return  # it may have needed less than the time that a case has
        if finding.verdict is Verdict.OOM and memory_share < 1.0:
            self._again.append((impl, case))
            return
        with self._telling:
            self._tell(finding)
