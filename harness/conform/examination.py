"""A conformance run: every case to every implementation, each in a process of its own; what came of it, as findings.

This process imports no torch. One thread asks one worker at a time; the referee answers each question once, into a
file that all workers read.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from attnbench.harness.conform.candidate import Candidate
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import CHECKS
from attnbench.harness.conform.suite import sharing, widest
from attnbench.harness.conform.verdict import Finding, Verdict
from attnbench.harness.run.channel import Message
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.lock import device_lock
from attnbench.harness.run.process import REFEREE, WorkerLost
from attnbench.harness.run.waiting import wait_for_all

# Named, not imported: these modules import torch.
EXAMINER = "attnbench.harness.conform.examiner:Examiner"
ARBITER = "attnbench.harness.conform.referee:Referee"
TIME_LIMIT_S = 120.0

Tell = Callable[[Finding], None]


class OracleFailed(Exception):
    """A question that the referee could not answer; one line."""


class Examination:
    """Examines on one device. Use as a context: the workers end with it.

    cases: all that may be asked, so that one oracle serves them. time_limit_s: of one case.
    """

    def __init__(self, device: str, cases: Iterable[Case], *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self.device = device
        self.facts: Message = {}
        self._time_limit_s = time_limit_s
        self._asks_most = widest(cases)
        self._answers: dict[tuple[str, bool], str | OracleFailed] = {}
        self._candidates: dict[tuple[str, int], Candidate] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="attnbench-conform-"))
        self._scratch = Path(folder)
        self._referee = self._stack.enter_context(closing(self._make(REFEREE, ARBITER)))
        try:
            self.facts = {name: value for name, value in self._referee.hello().items() if name != "ok"}
        except WorkerLost as lost:
            raise RunError(f"cannot work on {self.device}: {lost.reason}", Exit.MACHINE) from None
        if uuid := self.facts.get("uuid"):
            self._stack.enter_context(device_lock(str(uuid)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for candidate in self._candidates.values():
            candidate.close()
        self._stack.close()

    # ---- one case -----------------------------------------------------------------------------------------

    def about(self, impl: str) -> Message:
        """version, unavailable (why, or empty) and compile_processes of an implementation; starts its worker."""
        try:
            return self._candidate(impl).hello()
        except WorkerLost:
            return {}

    def examine(self, impl: str, case: Case, part: int = 0) -> Finding:
        """One case, one implementation. part: which of several workers of the implementation is asked."""
        candidate = self._candidate(impl, part)
        reply = self._ask(candidate, case)
        version = candidate.about.get("version", "unknown")
        known = {f.name for f in dataclasses.fields(Finding)}
        fields = {name: value for name, value in reply.items() if name in known}
        return Finding(case=case.id, impl=impl, impl_version=version, device=self.device, **fields)

    def _ask(self, candidate: Candidate, case: Case) -> Message:
        try:
            about = candidate.hello()
            if not about["ok"]:
                return {"verdict": Verdict(about["status"])} | about
            if about["unavailable"]:
                return {"verdict": Verdict.UNAVAILABLE, "reason": about["unavailable"]}
            oracle = self._answer(case) if CHECKS[case.check].oracle else ""
            reply = candidate.ask("examine", case=case.to_json(), oracle=oracle)
        except WorkerLost as lost:
            return {"verdict": Verdict(lost.status), "reason": lost.reason, "evidence": lost.evidence}
        except OracleFailed as error:
            return {"verdict": Verdict.ERROR, "reason": f"not judged: {error}"}
        if not reply["ok"]:
            return {"verdict": Verdict(reply["status"])} | reply
        return reply | {"verdict": Verdict(reply["verdict"])}

    def _answer(self, case: Case) -> str:
        """File of the right answer, made by the referee when first asked for; empty where there is none to be had."""
        if case.problem.dropout_p:
            return ""
        most = self._asks_most.get(case.question, case)
        key = (case.question, most.problem.direction != "fwd")
        with self._lock:
            if key not in self._answers:
                self._answers[key] = self._solve(most)
        answer = self._answers[key]
        if isinstance(answer, OracleFailed):
            raise answer
        return answer

    def _solve(self, case: Case) -> str | OracleFailed:
        path = str(self._scratch / f"oracle-{len(self._answers)}.pt")
        try:
            reply = self._referee.ask("solve", case=case.to_json(), path=path)
        except WorkerLost as lost:
            return OracleFailed(f"the oracle failed: {lost.reason}")
        return path if reply["ok"] else OracleFailed(f"the oracle failed: {reply['reason']}")

    def forgive(self, impl: str) -> None:
        """Lets an implementation whose workers were lost too often be asked again."""
        self._candidate(impl).forgive()

    def script(self, impl: str, case: Case, reason: str, found_as: str) -> str:
        """Source of a script that shows the failing case without the harness; RunError where there is none."""
        candidate = self._candidate(impl)
        candidate.forgive()
        try:
            reply = candidate.ask("script", case=case.to_json(), reason=reason, found_as=found_as)
        except WorkerLost as lost:
            raise RunError(f"no script: {lost.reason}") from None
        if not reply["ok"]:
            raise RunError(f"no script: {reply['reason']}")
        return str(reply["source"])

    # ---- all of them --------------------------------------------------------------------------------------

    def run(self, impls: Sequence[str], cases: Sequence[Case], jobs: int, tell: Tell) -> list[Finding]:
        """Every case to every implementation, ``jobs`` workers side by side; cases that need the device to themselves
        last, one at a time. tell is called with each finding, one call at a time.
        """
        together = sharing(case for case in cases if not case.alone)
        alone = sharing(case for case in cases if case.alone)
        findings: list[Finding] = []
        telling = threading.Lock()

        def work(impl: str, mine: Sequence[Case], part: int = 0) -> None:
            for case in mine:
                finding = self.examine(impl, case, part)
                with telling:
                    findings.append(finding)
                    tell(finding)
            self._candidate(impl, part).close()

        with ThreadPoolExecutor(max(1, jobs)) as pool:
            try:
                tasks = self._tasks(impls, together, jobs, pool)
                wait_for_all([pool.submit(work, *task) for task in tasks])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._kill()
                raise
        for impl in impls if alone else ():
            work(impl, alone)
        return findings

    def _tasks(
        self, impls: Sequence[str], cases: Sequence[Case], jobs: int, pool: ThreadPoolExecutor
    ) -> list[tuple[str, list[Case], int]]:
        """Who is asked what by which worker: a slow compiler's cases are dealt to several, and begin first."""
        tasks = []
        abouts = [pool.submit(self.about, impl) for impl in impls]
        wait_for_all(abouts)
        for impl, about in zip(impls, abouts, strict=True):
            parts = max(1, min(about.result().get("compile_processes", 1), jobs // 2))
            deal: list[list[Case]] = [[] for _ in range(parts)]
            for case in cases:
                deal[zlib.crc32(case.question.encode()) % parts].append(case)
            tasks += [(parts, impl, hand, part) for part, hand in enumerate(deal)]
        tasks.sort(key=lambda task: -task[0])
        return [(impl, hand, part) for _, impl, hand, part in tasks]

    def _kill(self) -> None:
        """Ends every worker; the threads that wait for them get an error, and no other is started."""
        self._ended = True
        for candidate in [*self._candidates.values(), self._referee]:
            candidate.kill()

    def _candidate(self, impl: str, part: int = 0) -> Candidate:
        if self._ended:
            raise RunError("the examination was ended", Exit.INTERRUPTED)
        if (impl, part) not in self._candidates:
            self._candidates[impl, part] = self._make(impl, EXAMINER)
        return self._candidates[impl, part]

    def _make(self, role: str, serves: str) -> Candidate:
        return Candidate(role, serves, self.device, self._scratch, self._time_limit_s)


def jobs_for(device: str) -> int:
    """How many workers are asked side by side: one a core where they compute on it, more where they wait for a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device == "cpu" else 2 * cores
