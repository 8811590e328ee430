"""Every case to every implementation, by as many workers as fit: who is asked what, when, and for how long."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examination import Examination
from attnbench.harness.conform.suite import sharing
from attnbench.harness.conform.verdict import Finding, Pair, Verdict
from attnbench.harness.run.waiting import LOOK_EVERY_S, wait_for_all

SHARE_BESIDE_OTHERS = 0.6
"""Of the device's memory, for a case that wants it to itself while other workers are about: the rest is theirs."""
START_S = 5.0
"""What the start of one more worker costs: it imports torch and makes a context on the device."""
LEAST_ANSWERS = 10
"""Of an implementation, before they say how long its others will take: a first call is slow everywhere."""

Tell = Callable[[Finding], None]
Kind = tuple[object, ...]


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
    deadline = time.monotonic() + budget_s
    most = jobs if examination.device == "cpu" else max(1, jobs // 2)  # a core each, as ``jobs_for`` has it
    asked = {impl: [case for case in cases if (impl, case.id) not in found] for impl in impls}
    over = threading.Event()
    with ThreadPoolExecutor(max(1, jobs) + 1) as pool:
        try:
            # The referee is one process: while the workers start, it has nothing else to do.
            ahead = sharing({case.id: case for own in asked.values() for case in own}.values())
            answers = pool.submit(
                examination.answer_ahead, ahead, lambda: over.is_set() or time.monotonic() >= deadline
            )
            abouts = {impl: pool.submit(examination.about, impl) for impl in impls if asked[impl]}
            wait_for_all(abouts.values())
            hands = [
                Hand(impl, asked[impl], about.result().get("compile_processes", 1))
                for impl, about in abouts.items()
            ]
            rounds = _Round(examination, tell, deadline, Posts(hands, most))
            wait_for_all([pool.submit(rounds.work) for _ in range(max(1, jobs))])
            over.set()
            wait_for_all([answers, *(pool.submit(examination.about, impl) for impl in rounds.left_over)])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            examination.kill()
            raise
    rounds.ask_again()


def kind_of(case: Case) -> Kind:
    """What compilers specialise a kernel on, as far as the problem alone tells: those of one kind share code."""
    p, mask = case.problem, case.problem.mask
    sides = (mask.kind, mask.left is None, mask.right is None)
    return p.dtype, p.head_dim, p.head_dim_v, p.heads // p.kv_heads, sides, p.dropout_p > 0


class Hand:
    """What one implementation is still to be asked, and how long it took so far.

    Dealt problem by problem: the cases of one share what was compiled for it, those of one question an oracle. large:
    cases that want the device to themselves. left: how many others nobody has taken. compilers: how many of its workers
    may compile side by side from the start; 1 where compiling takes no time, or is not shared. ahead: whether its first
    worker is put to the large cases at once, since they compile too, and the rest is others'. workers: how many it was
    given for the rest; they stay until nothing is left to take.
    """

    def __init__(self, impl: str, cases: Iterable[Case], compilers: int = 1) -> None:
        self.impl = impl
        self.compilers = compilers
        self.large: deque[Case] = deque()
        self.workers = 0
        self.left = 0
        self._waiting: dict[Kind, dict[str, list[Case]]] = {}
        self._begun: set[Kind] = set()
        self._answers, self._spent_s = 0, 0.0
        for case in sharing(cases):
            if case.alone:
                self.large.append(case)
            else:
                self.left += 1
                self._waiting.setdefault(kind_of(case), {}).setdefault(case.problem.group_key, []).append(
                    case
                )
        self.ahead = compilers > 1 and bool(self.large)

    def take(self, own: Collection[Kind], elsewhere: Collection[Kind]) -> tuple[Kind, list[Case]] | None:
        """The cases of the next problem, for a worker that has compiled for the kinds ``own``; None when none is left.

        Of one of those; else of a kind that no worker of the implementation has begun; else of any. To a compiler with
        a cache on disk those that nobody, of any implementation, is at just now (``elsewhere``) come before the others:
        it may be shared, and what two would compile side by side the second then finds there.
        """
        if not self._waiting:
            return None
        shared = elsewhere if self.compilers > 1 else ()
        kind = min(self._waiting, key=lambda k: (k not in own, k in self._begun, k in shared))
        self._begun.add(kind)
        problems = self._waiting[kind]
        cases = problems.pop(next(iter(problems)))
        if not problems:
            del self._waiting[kind]
        self.left -= len(cases)
        return kind, cases

    def took(self, seconds: float) -> None:
        """One case was answered."""
        self._answers += 1
        self._spent_s += seconds

    @property
    def left_s(self) -> float:
        """Seconds of one worker, at the pace so far; 0 before there is one."""
        return self.left * self._spent_s / self._answers if self._answers >= LEAST_ANSWERS else 0.0

    @property
    def wants_help(self) -> bool:
        """Whether one more worker would bring the end nearer by more than its start costs."""
        return self.workers == 0 or self.left_s / self.workers - self.left_s / (self.workers + 1) > START_S


class Posts:
    """Who is to work for whom: workers, at ``most`` of one implementation.

    Slow compilers come first, each with as many as compile side by side, then the others, with one. From then on who is
    free goes where most is left for each worker: so a compiler that has no cache to share, and did not say that it is
    slow, has help once it shows.

    Large cases are one worker's at a time, of all together. Until it is their turn, first workers wait without anybody
    who waits with them: on an H200 a dozen threads stood in line for three minutes, in the place of workers.
    """

    def __init__(self, hands: Sequence[Hand], most: int) -> None:
        self._hands = hands
        self._most = most
        slowest_first = sorted(hands, key=lambda hand: -hand.compilers)
        self._begin = deque(hand for hand in slowest_first for _ in range(min(hand.compilers, most)))
        self._large = deque(hand for hand in slowest_first if hand.ahead)
        self._large_asked = False

    def next_large(self) -> Hand | None:
        """Whose large cases are next; None where there are none now. ``large_done`` once they are asked."""
        if self._large_asked or not self._large:
            return None
        self._large_asked = True
        return self._large.popleft()

    def large_done(self) -> None:
        """The device is free for those of the next one."""
        self._large_asked = False

    def wait_large(self, hand: Hand) -> None:
        """The hand's first worker has nothing else to do than its large cases."""
        self._large.append(hand)

    def next(self) -> tuple[Hand, int] | None:
        """A hand and which of its workers to be; None where nobody wants one more now."""
        while self._begin:
            hand = self._begin.popleft()
            if hand.left or (hand.large and not hand.workers and not hand.ahead):
                return self._filled(hand)
        wanting = [h for h in self._hands if h.left and h.workers < self._most and h.wants_help]
        longest = max(wanting, key=lambda hand: hand.left_s / max(hand.workers, 1), default=None)
        return self._filled(longest) if longest else None

    @property
    def over(self) -> bool:
        """Whether nobody will want anybody any more."""
        return not self._begin and not self._large and not any(hand.left for hand in self._hands)

    @staticmethod
    def _filled(hand: Hand) -> tuple[Hand, int]:
        hand.workers += 1
        return hand, hand.workers - 1 + hand.ahead


class _Round:
    """One pass over all hands by many threads, each of which asks one worker at a time."""

    def __init__(self, examination: Examination, tell: Tell, deadline: float, posts: Posts) -> None:
        self._examination = examination
        self._tell = tell
        self._deadline = deadline
        self._posts = posts
        self._dealing = threading.Lock()
        self._telling = threading.Lock()
        self._at: Counter[Kind] = Counter()
        self._again: defaultdict[str, list[Case]] = defaultdict(list)

    def work(self) -> None:
        """One thread: takes posts for as long as there may be one."""
        while time.monotonic() < self._deadline and not self._examination.ended:
            with self._dealing:
                large = self._posts.next_large()
                post = None if large else self._posts.next()
                over = self._posts.over
            if large:
                self._ask_large(large)
            elif post:
                self._fill(*post)
            elif over:
                return
            else:
                time.sleep(LOOK_EVERY_S)

    def _fill(self, hand: Hand, part: int) -> None:
        """Asks one worker what is left of a hand, then ends it, or leaves it to the hand's large cases."""
        own: set[Kind] = set()
        while taken := self._take(hand, own):
            kind, cases = taken
            own.add(kind)
            for case in cases:
                begin = time.monotonic()
                self._ask(hand.impl, case, part)
                with self._dealing:
                    hand.took(time.monotonic() - begin)
            with self._dealing:
                self._at -= Counter([kind])
        if part == 0 and hand.large:
            with self._dealing:
                self._posts.wait_large(hand)
        else:
            self._examination.close(hand.impl, part)

    def _take(self, hand: Hand, own: Collection[Kind]) -> tuple[Kind, list[Case]] | None:
        with self._dealing:
            taken = hand.take(own, self._at)
            self._at.update([taken[0]] if taken else [])
            return taken

    def _ask_large(self, hand: Hand) -> None:
        """Asks a hand's first worker its large cases, then ends it: one that ran out of memory may hold much of it."""
        while hand.large:
            self._ask(hand.impl, hand.large.popleft(), 0, SHARE_BESIDE_OTHERS)
        self._examination.close(hand.impl)
        with self._dealing:
            self._posts.large_done()

    @property
    def left_over(self) -> list[str]:
        """Whom ``ask_again`` asks."""
        return list(self._again)

    def ask_again(self) -> None:
        """Puts what ran out of memory beside others to its implementation alone."""
        for impl, cases in self._again.items():
            for case in cases:
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
            self._again[impl].append(case)
            return
        with self._telling:
            self._tell(finding)
