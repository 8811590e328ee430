"""Examines: a case put to an implementation, which has a process of its own; what came of it, as a finding.

This process imports no torch. One thread asks one worker at a time; the referee answers each question once, into a
file that all workers read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from attnbench.harness.conform.candidate import Candidate, NotStarted
from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import CHECKS
from attnbench.harness.conform.second_opinion import SecondOpinions
from attnbench.harness.conform.suite import widest
from attnbench.harness.conform.verdict import NOT_ASKED, UPSET, Finding, Verdict
from attnbench.harness.run.channel import Message
from attnbench.harness.run.errors import Exit, RunError
from attnbench.harness.run.lock import device_lock
from attnbench.harness.run.process import REFEREE, WorkerLost

# Named, not imported: these modules import torch.
EXAMINER = "attnbench.harness.conform.examiner:Examiner"
ARBITER = "attnbench.harness.conform.referee:Referee"
TIME_LIMIT_S = 120.0
LEAST_S = 1e-3
"""A time limit in the place of none left, which would be no limit."""
YIELD_S = 1e-3
"""For a lock to go to who waits for it, and not to who had it."""


class OracleFailed(Exception):
    """A question that the referee could not answer; one line."""


class Examination:
    """Examines on one device. Use as a context: the workers end with it.

    cases: all that may be asked, so that one oracle serves them. time_limit_s: of one case. ended: whether ``kill`` was
    called: what is said of a worker since then is no finding.
    """

    def __init__(self, device: str, cases: Iterable[Case], *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self.device = device
        self.facts: Message = {}
        self._time_limit_s = time_limit_s
        self._asks_most = widest(cases)
        self._answers: dict[tuple[str, bool], str | OracleFailed] = {}
        self._candidates: dict[tuple[str, int], Candidate] = {}
        self._opinions: dict[str, SecondOpinions] = {}
        self._lock = threading.Lock()
        self.ended = False
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

    def examine(
        self,
        impl: str,
        case: Case,
        part: int = 0,
        *,
        limit_s: float = math.inf,
        memory_share: float = 1.0,
    ) -> Finding:
        """One case, one implementation. part: which of several workers of the implementation is asked.

        limit_s: where it is shorter than the examination's own. memory_share: of the device's memory, what it may take.
        """
        candidate = self._candidate(impl, part)
        reply = self._ask(candidate, case, limit_s, memory_share)
        version = candidate.about.get("version", "unknown")
        known = {f.name for f in dataclasses.fields(Finding)}
        fields = {name: value for name, value in reply.items() if name in known}
        return Finding(case=case.id, impl=impl, impl_version=version, device=self.device, **fields)

    def _ask(self, candidate: Candidate, case: Case, limit_s: float, memory_share: float) -> Message:
        try:
            about = candidate.hello()
            if about["unavailable"]:
                return {"verdict": Verdict.UNAVAILABLE, "reason": about["unavailable"]}
            oracle = self._answer(case) if CHECKS[case.check].oracle else ""
            request = {"case": case.to_json(), "oracle": oracle, "memory_share": memory_share}
            reply = self._examined(candidate, request, limit_s)
        except WorkerLost as lost:
            facts = NOT_ASKED if isinstance(lost, NotStarted) else {}
            return {
                "verdict": Verdict(lost.status), "reason": lost.reason, "evidence": lost.evidence, "facts": facts,
            }  # fmt: skip
        except OracleFailed as error:
            return {"verdict": Verdict.ERROR, "reason": f"not judged: {error}", "facts": NOT_ASKED}
        if not reply["ok"]:
            return {"verdict": Verdict(reply["status"])} | reply
        return reply | {"verdict": Verdict(reply["verdict"])}

    def _examined(self, candidate: Candidate, request: Message, limit_s: float) -> Message:
        """The worker's answer; of what an upset one raises, a fresh one's, with what was said first among its facts."""
        upset, begin = candidate.upset, time.monotonic()
        reply = candidate.ask("examine", limit_s=min(limit_s, self._time_limit_s), **request)
        opinions = self._opinions.setdefault(candidate.role, SecondOpinions())
        if not upset:
            opinions.heard(reply)
        if not upset or not opinions.wanted(reply):
            return reply
        candidate.close()
        left_s = max(limit_s - (time.monotonic() - begin), LEAST_S)
        fresh = candidate.ask("examine", limit_s=min(left_s, self._time_limit_s), **request)
        opinions.heard(fresh, instead_of=reply)
        if not fresh["ok"] and fresh["reason"] == reply["reason"]:
            return fresh
        return fresh | {"facts": fresh.get("facts", {}) | {UPSET: f"{reply['status']}: {reply['reason']}"}}

    def answer_ahead(self, cases: Iterable[Case], over: Callable[[], bool]) -> None:
        """Has the referee answer what the cases ask, in their order, before a worker waits for it; until ``over``."""
        for case in cases:
            if over() or self.ended:
                return
            if CHECKS[case.check].oracle:
                with suppress(OracleFailed):  # told to who asks
                    self._answer(case)
                time.sleep(YIELD_S)

    def _answer(self, case: Case) -> str:
        """File of the right answer, made by the referee when first asked for; empty where there is none to be had."""
        if case.problem.dropout_p:
            return ""
        most = self._asks_most.get(case.question, case)
        key = (case.question, most.problem.direction != "fwd")
        if key not in self._answers:
            with self._lock:
                if key not in self._answers:  # while this thread waited, another may have asked
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

    # ---- its end ------------------------------------------------------------------------------------------

    def close(self, impl: str, part: int = 0) -> None:
        """Ends one worker; the next case starts it again."""
        self._candidate(impl, part).close()

    def kill(self) -> None:
        """Ends every worker; the threads that wait for them get an error, and no other is started."""
        self.ended = True
        for candidate in [*self._candidates.values(), self._referee]:
            candidate.kill()

    def _candidate(self, impl: str, part: int = 0) -> Candidate:
        if self.ended:
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
