"""One implementation in its own process: prepares, answers, is judged, is measured. Imports torch; see worker.py."""

from __future__ import annotations

import dataclasses
import math
import random
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from attnbench.harness import registry
from attnbench.harness.contract import Device, Implementation, Prepared
from attnbench.harness.measure.capture import CaptureFailed
from attnbench.harness.measure.clocks import ClockReader
from attnbench.harness.measure.energy import energy_of
from attnbench.harness.measure.memory import MIB, Peak, held_mib, peak_of
from attnbench.harness.measure.timing import (
    LONGEST_HOLD_MS,
    Around,
    CacheFlush,
    Call,
    Pace,
    Turn,
    Warm,
    take_turn,
    warm_up,
)
from attnbench.harness.oracle.dropout import GeneratorState
from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.oracle.judge import Oracle, WrongAnswer, judge
from attnbench.harness.problem import Problem
from attnbench.harness.run.calls import (
    answer_of,
    copied,
    device_of,
    make_call,
    named,
    refuse_unfinished,
    weighed_answer,
)
from attnbench.harness.run.channel import Message
from attnbench.harness.run.dropped import is_cheap_to_probe, judged_oracle, probe_oracle
from attnbench.harness.run.memory_state import checksums, poison
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Judgement, Status, to_plain
from attnbench.harness.run.slots import FEW, MANY, is_long, slot_seed
from attnbench.harness.run.source import source_hash
from attnbench.harness.run.subject import Subject, Timed, drawn_inputs
from attnbench.harness.run.symmetry import Symmetry
from attnbench.harness.run.worker import Refusal

# A longer call has brought back caches and clocks long before it is done.
LONGEST_REWARMED_MS = 5.0
# One that took so long when it was weighed is not called to warm up: as with a longer one, that would cost as much as a
# sample, of which it has one a round.
LONGEST_WARMED_MS = 60.0
# Most samples behind one hold of the stream. The driver queues some thousand launches, and a flush, a call and the
# change of its inputs are 20 to 40: beyond, the host would wait for the stream that it holds. A multiple of any number
# of slots: the call that comes before a hold's first sample is of another slot than that, in each hold.
HELD_AT_ONCE = 3 * MANY * FEW
PREPARE_SLOT = 99  # inputs of the first call, thrown away: never those that are judged or timed


@dataclass(frozen=True)
class Seen:
    """A timed call's results as they stood when its sample ended, and how its inputs differed from the drawn ones."""

    results: tuple[torch.Tensor, ...]
    symmetry: Symmetry


class Solver:
    """Operations are the ``do_`` methods; each takes JSON values and returns a JSON object."""

    def __init__(self, name: str, device: str) -> None:
        self._name = name
        self._device = torch.device(device)
        self._implementation: Implementation | None = None
        self._clocks: ClockReader | None = None
        self._flush: CacheFlush | None = None
        self._plan: GroupPlan | None = None
        self._prepared: dict[str, Prepared] = {}
        self._probes: dict[str, Oracle] = {}
        self._dropped: dict[str, Oracle] = {}
        self._probed: set[str] = set()
        self._judged_by: Oracle | None = None
        self._subject: Subject | None = None
        self._paces: dict[str, Pace] = {}
        self._peaks: dict[str, float] = {}
        self._weighings: dict[str, Warm] = {}
        self._random = random.Random(0)
        self._calls_made = 0

    # ---- once ---------------------------------------------------------------------------------------------

    def do_hello(self) -> Message:
        """Loads the plugin. Answers its version, and why it is unavailable here, if it is."""
        try:
            self._implementation = registry.load(self._name)
        except registry.PluginError as error:
            return {"version": "unknown", "unavailable": str(error)}
        found = self._implementation.unavailable(self._where())
        why = found.line if found else ""
        if not why and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            self._clocks = ClockReader(str(torch.cuda.get_device_properties(self._device).uuid))
            self._flush = CacheFlush(self._device)
        return {
            "version": self._implementation.version(),
            "source": source_hash(self._name, self._implementation.package),
            "unavailable": why,
            "compile_processes": self._implementation.compile_processes,
            "approximate": self._implementation.approximate,
        }

    def do_declare(self, problems: list[dict[str, Any]]) -> Message:
        """Why it refuses those of the problems that it declares unsupported, by their keys."""
        assert self._implementation is not None, "declare before hello"
        posed = [Problem.from_json(problem) for problem in problems]
        reasons = {p.key: self._implementation.unsupported_reasons(p, self._where()) for p in posed}
        return {"unsupported": {key: found for key, found in reasons.items() if found}}

    def _where(self) -> Device:
        return device_of(self._device)

    # ---- per group ----------------------------------------------------------------------------------------

    def do_prepare(self, plan: dict[str, Any], problem: str, first_call: bool = True) -> Message:
        """Sets up for one problem of the group and makes the first call, on inputs of its own. first_call: False where
        this process has made it before, ahead of the groups; the times and memory are then of the set-up alone.
        """
        self._open(GroupPlan.from_json(plan))
        posed = self._problem(problem)
        assert self._implementation is not None, "prepare before hello"
        reasons = self._implementation.unsupported_reasons(posed, self._where())
        if reasons:
            return {"unsupported": reasons}
        inputs = self._inputs(posed, PREPARE_SLOT) if first_call else None
        self._synchronize()
        held_before = held_mib(self._device)
        begin = time.perf_counter()
        prepared = self._implementation.prepare(posed, self._where())
        self._synchronize()
        prepare_ms = (time.perf_counter() - begin) * 1e3
        first_call_ms = self._first_call(posed, prepared, inputs) if inputs else 0.0
        held_after = held_mib(self._device)
        setup_mib = None if held_before is None or held_after is None else held_after - held_before
        del inputs
        self.do_release()
        self._prepared[problem] = prepared
        return {
            "unsupported": [], "prepare_ms": prepare_ms, "first_call_ms": first_call_ms, "setup_mib": setup_mib,
        }  # fmt: skip

    def _first_call(self, problem: Problem, prepared: Prepared, inputs: Inputs) -> float:
        """How long it took, in ms."""
        begin = time.perf_counter()
        make_call(problem, prepared, inputs)()
        self._synchronize()
        first_call_ms = (time.perf_counter() - begin) * 1e3
        if (
            problem.direction == "fwd"
            and prepared.attend_with_lse is not None
            and not is_long(self._plan_open)
        ):
            # May be compiled apart, which would otherwise wait until it is judged.
            with torch.no_grad():
                prepared.attend_with_lse(inputs.q, inputs.k, inputs.v)
            self._synchronize()
        return first_call_ms

    def do_weigh(self, problem: str) -> Message:
        """The memory of one call, alone on the device; MiB beyond the inputs."""
        posed = self._problem(problem)
        call = make_call(posed, self._prepared[problem], self._inputs(posed, slot=0))

        def once() -> None:
            self._weighings[problem] = warm_up(call, self._device, budget_ms=0.0)

        return self._weighed(posed, peak_of(once, self._device))

    def _weighed(self, problem: Problem, peak: Peak) -> Message:
        if peak.peak_mib is not None:
            self._peaks[problem.key] = peak.peak_mib
        minimum = problem.minimal_result_bytes / MIB
        return {"peak_mib": peak.peak_mib, "driver_mib": peak.driver_mib, "minimum_mib": minimum}

    def do_judge(self, problem: str, oracle: str, weigh: bool = False) -> Message:
        """Judges the answer, made in memory that held NaN, and looks whether the inputs are as they were.

        weigh: judge the answer of a single call and weigh that, alone on the device, instead of the answer of calls as
        timing makes them, a backward repeated.
        """
        posed, prepared = self._problem(problem), self._prepared[problem]
        inputs = self._inputs(posed, slot=0)
        if posed.dropout_p:  # leaves the generators where its mask begins
            self._judged_by = self._under_its_mask(posed, inputs)
        elif self._judged_by is None:  # until the next release: the directions of a group share it
            self._judged_by = Oracle.load(oracle, self._device)
        before = checksums(inputs)
        memory: Message = {}
        if weigh:
            answer, peak = weighed_answer(posed, prepared, inputs, self._judged_by, self._device)
            memory = {"memory": self._weighed(posed, peak)}
        else:
            poison(posed, self._device)
            answer = answer_of(posed, prepared, inputs, self._judged_by)
        self._synchronize()
        changed = [name for name, bits in checksums(inputs).items() if bits != before[name]]
        if changed:
            raise Refusal(Status.INCORRECT, f"writes into its inputs ({', '.join(changed)})")
        return memory | {"judgement": to_plain(_judged(self._judged_by, answer))}

    def do_place(self, problem: str, probes: list[str]) -> Message:
        """Puts in place what the turns need that keep their memory: host work that need not wait for the first of them.

        Not for CUDA graphs, which are for one worker at a time to record.
        """
        with self._giving_back():
            self._place(self._problem(problem), probes)
        self._synchronize()
        return {}

    def _place(self, problem: Problem, probes: list[str]) -> None:
        subject = self._put_in_place(problem)
        for slot, path in enumerate(probes):
            subject.timed(slot, graph=False)
            if not problem.dropout_p:
                self._drawn_probe(path)
        subject.reserve()

    def do_turn(
        self, problem: str, probes: list[str], samples: int, turn_ms: float, mode: str, keep_memory: bool
    ) -> Message:
        """Samples for one round, and the judgement of one of the timed calls' own outputs, chosen at random.

        A turn that raises gives its memory back: the next implementation's must not run out of it.
        """
        with self._giving_back():
            reply = self._turn(problem, probes, samples, turn_ms, mode)
        if not keep_memory:
            self.do_release()
        return reply

    @contextmanager
    def _giving_back(self) -> Iterator[None]:
        """Gives the memory back when what is called here raises: the frames of what was called no longer hold it, that
        of the caller may."""
        try:
            yield
        except CaptureFailed:  # nothing of torch's allocator may be touched any more
            raise
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the results
            self.do_release()
            raise

    def _turn(self, problem: str, probes: list[str], samples: int, turn_ms: float, mode: str) -> Message:
        posed = self._problem(problem)
        subject = self._put_in_place(posed)
        warmup_calls = self._warm_up(subject, len(probes), graph="graph" in mode)
        turn, slot = self._take_turn(subject, len(probes), samples, turn_ms, mode)
        seen: Seen = turn.seen
        if "graph" not in mode:  # a replay writes over the results of the one before it
            refuse_unfinished(turn.kept, seen.results)
        probe = self._probe(subject, probes[slot], slot, seen.symmetry)
        judgement = _judged(probe, named(posed, seen.results)) if probe else None
        return {
            "ms": turn.ms,
            "host_us": sorted(turn.host_us)[len(turn.host_us) // 2] if turn.host_us else None,
            "held": turn.held,
            "discarded": turn.discarded,
            "clocks": dataclasses.asdict(turn.clocks),
            "warmup_calls": warmup_calls,
            "inputs": len(probes),
            "renewed": True,
            "judgement": to_plain(judgement),
        }

    def _take_turn(
        self, subject: Subject, slots: int, samples: int, turn_ms: float, mode: str
    ) -> tuple[Turn, int]:
        """A turn of the subject's calls, and the slot of the one whose results are kept."""
        graph, pace = "graph" in mode, self._paces[subject.problem.key]
        count = max(1, min(samples, int(turn_ms / max(pace.call_ms, 1e-3))))
        taken = [(self._calls_made + i) % slots for i in range(count)]
        timed = [subject.timed(slot, graph=graph) for slot in taken]
        before = self._before(subject, slots, graph=graph) if pace.call_ms <= LONGEST_REWARMED_MS else None
        subject.reserve()
        holds = math.ceil(count / HELD_AT_ONCE)
        for one, changes in Counter([*timed, *([before] * holds if before else [])]).items():
            one.renewed.draw(changes)
        self._calls_made += count
        keep = self._random.randrange(count)
        calls = [one.call for one in timed]
        calls[keep] = subject.noting_state(taken[keep], calls[keep])
        turn = take_turn(
            calls,
            device=self._device,
            keep=keep,
            around=Around(
                rewarm=before.once if before else None,
                flush=None if "hot" in mode else self._flush,
                renew=[one.renewed.renew for one in timed],
                look=lambda results: Seen(copied(results), timed[keep].renewed.symmetry),
            ),
            clocks=self._clocks,
            hold_ms=pace.hold_for(min(count, HELD_AT_ONCE) + bool(before)),
            at_once=HELD_AT_ONCE,
        )
        self._paces[subject.problem.key] = Pace(sorted(turn.ms)[len(turn.ms) // 2], turn.next_hold_ms)
        return turn, taken[keep]

    def do_energy(self, problem: str, probes: list[str], mode: str) -> Message:
        """Energy of calls in a row, alone on the device; none where it is not counted.

        The inputs are marked as changed before each call, and not changed: that would cost energy of its own.
        """
        posed, graph = self._problem(problem), "graph" in mode
        subject = self._put_in_place(posed)
        self._warm_up(subject, len(probes), graph=graph)
        calls = [_marking(posed, subject.timed(slot, graph=graph)) for slot in range(len(probes))]
        found = energy_of(calls, self._paces[problem].call_ms, self._device, self._clocks)
        del calls, subject
        self.do_release()
        return {"energy": to_plain(found)}

    def do_release(self) -> Message:
        """Gives back all device memory but what the implementation itself holds, and the probes, which are small."""
        self._subject = None
        self._judged_by = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    # ---- pieces -------------------------------------------------------------------------------------------

    def _open(self, plan: GroupPlan) -> None:
        if self._plan != plan:
            self._plan = plan
            self._prepared = {}
            self._paces = {}
            self._peaks = {}
            self._weighings = {}
            self._probes = {}
            self._dropped = {}
            self._probed = set()
            self._random = random.Random(plan.seed)
            self.do_release()

    @property
    def _plan_open(self) -> GroupPlan:
        assert self._plan is not None, "no group is open"
        return self._plan

    def _problem(self, key: str) -> Problem:
        return next(p for p in self._plan_open.problems if p.key == key)

    def _inputs(self, problem: Problem, slot: int) -> Inputs:
        return drawn_inputs(self._plan_open, problem, slot, self._device)

    def _put_in_place(self, problem: Problem) -> Subject:
        """Makes ``problem`` the subject, if it is not."""
        if self._subject is None or self._subject.problem != problem:
            self.do_release()
            self._subject = Subject(
                self._plan_open, problem, self._prepared[problem.key], self._device, self._peaks.get(problem.key),
                held_mib(self._device) or 0.0,
            )  # fmt: skip
        return self._subject

    def _warm_up(self, subject: Subject, slots: int, *, graph: bool) -> int:
        """Has the subject's first call warm, if it is not; returns how many calls that took."""
        if subject.warm:
            return 0
        subject.warm = True
        key = subject.problem.key
        if self._device.type == "cuda" and subject.peak_mib is not None:
            if key in self._paces:  # back from a release between turns
                return 0
            if is_long(self._plan_open):
                # A judged call is behind it, and caches and clocks come back early in the first sample.
                self._paces[key] = Pace(math.inf, LONGEST_HOLD_MS)
                return 0
        weighing = self._weighings.get(key)
        if weighing and weighing.call_ms >= LONGEST_WARMED_MS:
            self._paces[key] = Pace.of(weighing)
            return 0
        before = self._before(subject, slots, graph=graph)
        subject.reserve()
        warm = warm_up(before.once, self._device)
        self._paces[key] = Pace.of(warm)
        return warm.calls

    def _before(self, subject: Subject, slots: int, *, graph: bool) -> Timed:
        """What may be called ahead of the next sample: another slot than that sample's, where there is another."""
        return subject.timed((self._calls_made - 1) % slots, graph=graph)

    def _probe(self, subject: Subject, path: str, slot: int, symmetry: Symmetry) -> Oracle | None:
        """What a timed call is compared with: the slot's own, changed as its inputs were; with dropout, of the mask
        that the call drew.
        """
        if subject.problem.dropout_p:
            return self._probe_its_mask(subject, slot, symmetry)
        return symmetry.expected(self._drawn_probe(path))

    def _drawn_probe(self, path: str) -> Oracle:
        """Of a slot's inputs as they were drawn."""
        if path not in self._probes:
            self._probes[path] = Oracle.load(path, self._device)
        return self._probes[path]

    # ---- dropout ------------------------------------------------------------------------------------------

    def _under_its_mask(self, problem: Problem, inputs: Inputs) -> Oracle:
        seed = slot_seed(self._plan_open, 0)
        state = GeneratorState.at(seed, self._device)
        assert self._implementation is not None, "judge before hello"
        with _answering():
            oracle = judged_oracle(
                problem, self._implementation, self._prepared[problem.key], inputs, seed, state
            )
        self._dropped[problem.key] = dataclasses.replace(oracle, tensors={})
        return oracle

    def _probe_its_mask(self, subject: Subject, slot: int, symmetry: Symmetry) -> Oracle | None:
        """None where that takes too long, but for the first call that is asked for."""
        problem, state = subject.problem, subject.states[slot]
        judged, again = self._dropped[problem.key], problem.key in self._probed
        if again and not is_cheap_to_probe(problem, self._paces[problem.key].call_ms):
            return None
        self._probed.add(problem.key)
        assert self._implementation is not None, "turn before hello"
        inputs, seed = self._inputs(problem, slot), slot_seed(self._plan_open, slot)
        symmetry.change(inputs)
        with _answering():
            probe = probe_oracle(problem, self._implementation, subject.prepared, inputs, seed, state)
        return probe.with_budgets_of(judged)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _marking(problem: Problem, timed: Timed) -> Call:
    """The call with its inputs marked as written to, for whoever remembers results by version."""
    inputs = timed.renewed.inputs
    operands = (inputs.dout,) if problem.direction == "bwd" else (inputs.q, inputs.k, inputs.v, inputs.dout)
    written = [tensor for tensor in operands if tensor is not None]

    def marked() -> Any:
        torch.autograd.graph.increment_version(written)
        return timed.call()

    return marked


@contextmanager
def _answering() -> Iterator[None]:
    """An answer that has not even the form of one is INCORRECT."""
    try:
        yield
    except WrongAnswer as wrong:
        raise Refusal(Status.INCORRECT, str(wrong)) from None


def _judged(oracle: Oracle, answer: dict[str, torch.Tensor]) -> Judgement:
    with _answering():
        return judge(oracle, answer)
