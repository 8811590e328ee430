"""Runs one group on one device: prepare, oracle, judge, time; and turns every outcome into a cell with a status.

Order of work, and why:

1. all workers prepare at once, while the referee computes the oracle: compilation is the slow part, and it is
   not timed against anything;
2. one at a time, with the others' memory released, each one's memory is measured: an out-of-memory here is its own;
3. they are judged, as many side by side as fit, since most of a judgement is host work;
4. those whose memory can stay on the device put their inputs in place at once, which is host work too;
5. the cells judged right are timed in rounds of random order with the ceilings among them, so that all see the
   same card.
"""

from __future__ import annotations

import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnbench.harness.problem import Problem
from attnbench.harness.run.ahead import Ahead, FirstCall
from attnbench.harness.run.channel import Message
from attnbench.harness.run.crew import Crew, Failure, shuffled
from attnbench.harness.run.draft import Draft, describe
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import REFEREE
from attnbench.harness.run.record import Ceilings, Cell, Energy, Group, Memory, Status, judgement_from_json
from attnbench.harness.run.room import Room
from attnbench.harness.run.slots import is_long

# A turn takes as many samples as fit into this, at most those asked for and at least one.
TURN_MS = {"cuda": 20.0, "cpu": 100.0}
CEILING_SAMPLES = 2


@dataclass(frozen=True)
class Conditions:
    """What a group needs to know of the run. memory_mib: the device's, None on a CPU. mode: cold or hot, +graph.
    foreign: looks for other processes on the device (``ClockReader.foreign_processes``). scratch: a folder for what the
    oracle hands to the workers. ahead: what was prepared before the first group. order: of one round, from its members
    and a number that grows by one a round. ceilings: whether the referee samples them in each round. energy: whether
    joules are counted.
    """

    run: str
    rounds: int
    samples: int
    mode: str
    memory: bool
    memory_mib: float | None
    scratch: Path
    ahead: Ahead = field(default_factory=Ahead)
    foreign: Callable[[], list[str] | None] = lambda: None
    order: Callable[[list[str], int], list[str]] = shuffled
    ceilings: bool = True
    energy: bool = False


class GroupRun:
    """One group on one crew; ``execute`` returns its cells and the record that closes it."""

    def __init__(
        self, plan: GroupPlan, crew: Crew, conditions: Conditions, tell: Callable[[str], None]
    ) -> None:
        """tell: called with the name of each phase as it begins."""
        self.plan = plan
        self._tell = tell
        self._crew = crew
        self._conditions = conditions
        self._room = Room(plan, conditions.memory_mib, conditions.mode)
        self._drafts = [Draft(impl, problem) for impl in plan.impls for problem in plan.problems]
        self._phases: dict[str, float] = {}
        self._oracle = conditions.ahead.oracles.get(plan.group, {})
        self._asked_oracle = False
        self._foreign: set[str] | None = None
        self._ceilings: dict[str, Ceilings] = {}
        self._order: dict[str, list[list[str]]] = {}

    def execute(self) -> tuple[list[Cell], Group]:
        self._note_unsupported()
        with self._phase("start"):
            self._crew.start(list(dict.fromkeys(draft.impl for draft in self._living())))
        self._note_absences()
        with self._phase("prepare"):
            self._asked_oracle = bool(self._living()) and not self._oracle
            if self._asked_oracle:
                self._ask_oracle()
            for problem in self.plan.problems:
                self._prepare_all(problem)
        with self._phase("oracle"):
            self._await_oracle()
        with self._phase("judge"):
            self._crew.release([*self.plan.impls, REFEREE])
            for impl in self.plan.impls if self._conditions.memory else ():
                self._weigh_alone(impl)
            self._judge_all()
        for problem in self.plan.problems:
            with self._phase(f"time {problem.direction}"):
                self._time(problem)
        if self._conditions.energy:
            with self._phase("energy"):
                self._count_energy()
        shutil.rmtree(oracle_folder(self._conditions.scratch, self.plan))
        run, mode = self._conditions.run, self._conditions.mode
        return [draft.cell(self.plan, self._crew, run, mode) for draft in self._drafts], self._group()

    # ---- phases -------------------------------------------------------------------------------------------

    def _note_unsupported(self) -> None:
        """What was declared ahead: no worker is needed for it, nor does the loss of one change it."""
        for draft in self._drafts:
            if reasons := self._conditions.ahead.unsupported.get((draft.impl, draft.problem.key)):
                draft.failure = _unsupported(reasons)

    def _note_absences(self) -> None:
        absences = self._crew.absences(list(self.plan.impls))
        for draft in self._living():
            draft.failure = absences.get(draft.impl)

    def _prepare_all(self, problem: Problem) -> None:
        """Everyone at once. A failure here may be the neighbours' doing, who fill the memory and the cores: each that
        fails is tried again, once and alone, when it is weighed or judged.
        """
        drafts = {draft.impl: draft for draft in self._living(problem)}
        self._crew.start(list(drafts))  # those lost over another direction
        for name, absence in self._crew.absences(list(drafts)).items():
            drafts.pop(name).failure = absence
        arguments = {
            name: self._request(draft) | {"first_call": self._first_call_ahead(draft) is None}
            for name, draft in drafts.items()
        }
        for name, reply in self._crew.call_all("prepare", arguments):
            if not isinstance(reply, Failure):
                self._take_prepared(drafts[name], reply)

    def _ask_oracle(self) -> None:
        self._crew.start([REFEREE])
        folder = oracle_folder(self._conditions.scratch, self.plan)
        self._crew.ask(REFEREE, "oracle", plan=self.plan.to_json(), folder=str(folder))

    def _await_oracle(self) -> None:
        """Beside the preparations it may have run out of memory: asked again alone."""
        if not self._asked_oracle:
            return
        try:
            self._oracle = self._crew.answer(REFEREE)
        except Failure:
            self._crew.release(list(self.plan.impls))
            try:
                self._ask_oracle()
                self._oracle = self._crew.answer(REFEREE)
            except Failure as failure:
                why = f"not judged, so not timed: the oracle failed: {failure.reason}"
                for draft in self._living():
                    draft.failure = Failure(Status.ERROR, why, failure.evidence)

    def _weigh_alone(self, impl: str) -> None:
        """The memory of one implementation's calls, alone on the device; long calls are judged by the same answer."""
        for draft in self._alive([draft for draft in self._drafts if draft.impl == impl]):
            with self._failing(draft):
                if is_long(self.plan):
                    reply = self._ask(draft, "judge", oracle=self._oracle["judged"], weigh=True)
                    self._take_memory(draft, reply["memory"])
                    self._take_judgement(draft, reply["judgement"], "")
                else:
                    self._take_memory(draft, self._ask(draft, "weigh"))
        self._crew.release([impl])

    def _take_memory(self, draft: Draft, weighed: Message) -> None:
        draft.memory = Memory(**weighed, setup_mib=draft.setup_mib)

    def _judge_all(self) -> None:
        """Side by side as far as the memory goes. What fails so may be the neighbours' doing: tried again alone."""
        again: list[Draft] = []
        for side_by_side in self._room.batches(self._unjudged(), self._oracle.get("mib", 0.0)):
            for problem in self.plan.problems:
                drafts = {
                    draft.impl: draft for draft in self._unjudged(problem) if draft.impl in side_by_side
                }
                again += self._judge_together(drafts)
            self._crew.release(side_by_side)
        for draft in again:
            self._judge_together({draft.impl: draft})
            self._crew.release([draft.impl])

    def _judge_together(self, drafts: dict[str, Draft]) -> list[Draft]:
        """Judges one problem's drafts, and returns those that deserve another try alone."""
        for draft in drafts.values():
            with self._failing(draft):
                self._ensure_prepared(draft)
        asked = {draft.impl: draft for draft in self._alive(list(drafts.values()))}
        arguments = {
            name: {"problem": draft.problem.key, "oracle": self._oracle["judged"]}
            for name, draft in asked.items()
        }
        again = []
        for name, reply in self._crew.call_all("judge", arguments):
            if not isinstance(reply, Failure):
                self._take_judgement(asked[name], reply["judgement"], "")
            elif len(asked) > 1 and reply.status in (Status.OOM, Status.ERROR, Status.TIMEOUT):
                again.append(asked[name])
            else:
                asked[name].failure = reply
        return again

    @contextmanager
    def _failing(self, draft: Draft) -> Iterator[None]:
        """A failure of what is done here is the draft's."""
        try:
            yield
        except Failure as failure:
            draft.failure = failure

    def _ask(self, draft: Draft, operation: str, **arguments: Any) -> Message:
        """Asks about a draft, which another draft's loss of the worker may have left unprepared; raises Failure."""
        self._ensure_prepared(draft)
        reply = self._crew.call(draft.impl, operation, problem=draft.problem.key, **arguments)
        return {name: value for name, value in reply.items() if name != "ok"}

    def _time(self, problem: Problem) -> None:
        resident = self._room.resident(self._living(problem))
        self._place(problem, resident)
        ceilings = Ceilings([], [])
        orders: list[list[str]] = []
        self._look_for_others()
        for round_number in range(self._conditions.rounds):
            drafts = {draft.impl: draft for draft in self._living(problem)}
            if not drafts:
                break
            members = [*drafts, REFEREE] if self._conditions.ceilings else list(drafts)
            order = self._conditions.order(members, self.plan.seed + round_number)
            for name in order:
                if name == REFEREE:
                    self._sample_ceilings(problem, ceilings)
                else:
                    self._take_turn(drafts[name], resident=name in resident)
            orders.append(order)
            self._look_for_others()
        if orders:
            self._ceilings[problem.direction], self._order[problem.direction] = ceilings, orders
        self._crew.release([draft.impl for draft in self._living(problem)])

    def _place(self, problem: Problem, resident: set[str]) -> None:
        """All who stay put their inputs in place at once: left to their first turns they would do it one by one. What
        fails here may be the neighbours' doing, and is tried again in its turn, save by who died of it.
        """
        if self._conditions.memory_mib is None or "graph" in self._conditions.mode:
            return
        drafts = {
            draft.impl: draft
            for draft in self._living(problem)
            if draft.impl in resident and draft.prepared_by == self._crew.pid(draft.impl)
        }
        arguments = {
            name: {"problem": problem.key, "probes": self._probes(draft)} for name, draft in drafts.items()
        }
        for name, reply in self._crew.call_all("place", arguments):
            if (
                isinstance(reply, Failure)
                and self._crew.pid(name) is None
                and reply.status is not Status.TIMEOUT
            ):
                drafts[name].failure = reply

    def _count_energy(self) -> None:
        """One at a time and alone, after all timing: seconds of load warm the card."""
        for draft in self._living():
            try:
                reply = self._ask(draft, "energy", probes=self._probes(draft), mode=self._conditions.mode)
                draft.energy = Energy(**reply["energy"]) if reply["energy"] else None
            except Failure as failure:  # its time was taken before, and stays
                draft.no_energy = f"{failure.status}: {failure.reason}"

    def _look_for_others(self) -> None:
        """Between rounds, so that one that comes and goes is likely to be seen."""
        seen = self._conditions.foreign()
        if seen is not None:
            self._foreign = (self._foreign or set()) | set(seen)

    def _take_turn(self, draft: Draft, *, resident: bool) -> None:
        with self._failing(draft):
            reply = self._ask(
                draft,
                "turn",
                probes=self._probes(draft),
                samples=self._conditions.samples,
                turn_ms=TURN_MS[self._crew.device.partition(":")[0]],
                mode=self._conditions.mode,
                keep_memory=resident,
            )
            draft.turns.append(reply)
            if reply["judgement"]:
                self._take_judgement(draft, reply["judgement"], "a timed call: ")
        if (
            draft.failure
            and draft.failure.status is Status.INCORRECT
            and draft.judgement
            and draft.judgement.ok
        ):
            draft.judgement = None  # the one in full passed; this answer has no form to judge

    def _sample_ceilings(self, problem: Problem, ceilings: Ceilings) -> None:
        try:
            reply = self._crew.call(REFEREE, "ceilings", dtype=problem.dtype, samples=CEILING_SAMPLES)
        except Failure:
            self._crew.start([REFEREE])
            reply = {"gemm_tflops": [], "copy_gbs": []}  # a round without its ceiling stays a round
        ceilings.gemm_tflops.append(reply["gemm_tflops"])
        ceilings.copy_gbs.append(reply["copy_gbs"])

    # ---- pieces -------------------------------------------------------------------------------------------

    def _alive(self, drafts: list[Draft]) -> Iterator[Draft]:
        """Those not failed by the time their turn comes."""
        return (draft for draft in drafts if draft.alive)

    def _living(self, problem: Problem | None = None) -> list[Draft]:
        return [d for d in self._drafts if d.alive and (problem is None or d.problem == problem)]

    def _unjudged(self, problem: Problem | None = None) -> list[Draft]:
        return [draft for draft in self._living(problem) if draft.judgement is None]

    def _probes(self, draft: Draft) -> list[str]:
        """The oracle's answers to the sets of inputs that the draft's timed calls rotate through."""
        probes: list[str] = self._oracle["probes"]
        return probes[: self._room.slots(draft)]

    def _first_call_ahead(self, draft: Draft) -> FirstCall | None:
        """The one that the worker that is there now has made, if it has."""
        made = self._conditions.ahead.first_calls.get((draft.impl, draft.problem.key))
        return made if made and made.pid == self._crew.pid(draft.impl) else None

    def _request(self, draft: Draft) -> Message:
        return {"plan": self.plan.to_json(), "problem": draft.problem.key}

    def _ensure_prepared(self, draft: Draft) -> None:
        """Prepares again when the worker is another one than prepared it; raises Failure."""
        self._crew.start([draft.impl])
        if absence := self._crew.absences([draft.impl]).get(draft.impl):
            raise absence
        if draft.prepared_by != self._crew.pid(draft.impl):
            self._take_prepared(draft, self._crew.call(draft.impl, "prepare", **self._request(draft)))
            if draft.failure:
                raise draft.failure

    def _take_prepared(self, draft: Draft, reply: Message | Failure) -> None:
        if isinstance(reply, Failure):
            draft.failure = reply
        elif reply["unsupported"]:
            draft.failure = _unsupported(reply["unsupported"])
        else:
            draft.prepared_by = self._crew.pid(draft.impl)
            here = reply["prepare_ms"], reply["first_call_ms"]
            ahead = self._conditions.ahead.prepared.get((draft.impl, draft.problem.key))
            made = self._first_call_ahead(draft)
            if draft.prepare_ms is None:  # a second preparation finds the first one's caches
                draft.prepare_ms, draft.first_call_ms = ahead or here
                draft.setup_mib = made.setup_mib if made else reply.get("setup_mib")

    def _take_judgement(self, draft: Draft, data: dict[str, Any], prefix: str) -> None:
        judgement = judgement_from_json(data)
        approximate = self._crew.approximate.get(draft.impl, False)
        right = judgement.finite if approximate else judgement.ok
        if draft.judgement is None or not right:
            draft.judgement = judgement
        if not right:
            draft.failure = Failure(Status.INCORRECT, prefix + describe(judgement))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._tell(name)
        begin = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - begin

    # ---- records ------------------------------------------------------------------------------------------

    def _group(self) -> Group:
        return Group(
            run=self._conditions.run,
            suite=self.plan.suite,
            case=self.plan.case,
            why=self.plan.why,
            group=self.plan.group,
            device=self._crew.device,
            cells=self.plan.cells,
            seed=self.plan.seed,
            oracle_ms=self._oracle.get("ms"),
            ceilings=self._ceilings,
            order=self._order,
            phases=self._phases,
            foreign=None if self._foreign is None else sorted(self._foreign),
        )


def _unsupported(reasons: list[str]) -> Failure:
    return Failure(Status.UNSUPPORTED, "; ".join(reasons))


def oracle_folder(scratch: Path, plan: GroupPlan) -> Path:
    """Where the referee leaves the group's oracle; there once this returns, gone with the group."""
    folder = scratch / f"{zlib.crc32(plan.group.encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
