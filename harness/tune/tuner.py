"""What a worker does for ``bench tune``: a solver that is told in which of its implementation's ways to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attnbench.harness.contract import Candidate
from attnbench.harness.measure.timing import Pace, warm_up
from attnbench.harness.problem import Problem
from attnbench.harness.run.calls import device_of, make_call
from attnbench.harness.run.channel import Message
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.solver import Solver

SAMPLES = 5
TURN_MS = 50.0


class Tuner(Solver):
    """Every request names plan and problem, so that a worker in the place of a lost one can answer it too."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, device)
        self._candidates: dict[str, Sequence[Candidate]] = {}
        self._own_paces: dict[tuple[str, int], Pace] = {}

    def do_candidates(self, plan: dict[str, Any], problem: str) -> Message:
        """What there is to choose from, or why the problem is not supported."""
        self._open(GroupPlan.from_json(plan))
        posed = self._problem(problem)
        assert self._implementation is not None, "candidates before hello"
        reasons = self._implementation.unsupported_reasons(posed, device_of(self._device))
        found = [] if reasons else self._among(posed)
        told = [{"label": one.label, "key": dict(one.key), "choice": dict(one.choice)} for one in found]
        return {"unsupported": reasons, "candidates": told}

    def do_compile_one(self, plan: dict[str, Any], problem: str, index: int) -> Message:
        """One call, for the code that it leaves in a cache on disk."""
        with self._using(plan, problem, index):
            posed = self._problem(problem)
            make_call(posed, self._prepared[problem], self._inputs(posed, slot=0))()
            self._synchronize()
        return self.do_release()

    def do_judge_one(self, plan: dict[str, Any], problem: str, index: int, oracle: str) -> Message:
        """``judge`` of the candidate of that number."""
        with self._using(plan, problem, index):
            return self.do_judge(problem, oracle)

    def do_turn_one(self, plan: dict[str, Any], problem: str, index: int, probes: list[str]) -> Message:
        """``turn`` of it, at its own pace; taken again with the longest hold where a shorter one did not do."""
        with self._using(plan, problem, index):
            self._set_pace(problem, index, len(probes))
            reply = self.do_turn(problem, probes, SAMPLES, TURN_MS, "cold", keep_memory=True)
            if not reply["held"] and self._paces[problem].hold_ms:
                reply = self.do_turn(problem, probes, SAMPLES, TURN_MS, "cold", keep_memory=True)
            self._own_paces[problem, index] = self._paces[problem]
            return reply

    def _set_pace(self, problem: str, index: int, slots: int) -> None:
        """The candidate's last pace, or that of its first calls: another's says nothing of how long it takes and how
        long the stream must be held for it, if it can be held at all."""
        subject = self._put_in_place(self._problem(problem))
        if self._warm_up(subject, slots, graph=False):
            return  # they were made just now
        if (problem, index) in self._own_paces:
            self._paces[problem] = self._own_paces[problem, index]
        else:
            self._paces[problem] = Pace.of(
                warm_up(self._before(subject, slots, graph=False).once, self._device)
            )

    @contextmanager
    def _using(self, plan: dict[str, Any], problem: str, index: int) -> Iterator[None]:
        self._open(GroupPlan.from_json(plan))
        if problem not in self._prepared:
            self.do_prepare(plan, problem)
        with self._among(self._problem(problem))[index].using():
            yield

    def _among(self, problem: Problem) -> Sequence[Candidate]:
        assert self._implementation is not None, "candidates before hello"
        if problem.key not in self._candidates:
            where = device_of(self._device)
            self._candidates[problem.key] = self._implementation.candidates(problem, where)
        return self._candidates[problem.key]
