"""One implementation in its own process: prepares, answers, is judged, is measured. Imports torch; see worker.py."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

from attnbench.harness import registry
from attnbench.harness.contract import Device, Implementation, Prepared
from attnbench.harness.measure.clocks import ClockReader
from attnbench.harness.measure.memory import MIB, peak_of
from attnbench.harness.measure.timing import FIRST_HOLD_MS, CacheFlush, Call, capture, take_turn, warm_up
from attnbench.harness.oracle.inputs import Inputs, judging_dout, make_inputs, torch_dtype
from attnbench.harness.oracle.judge import Oracle, WrongAnswer, judge
from attnbench.harness.problem import Problem
from attnbench.harness.run.channel import Message
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Judgement, Status, to_plain
from attnbench.harness.run.slots import slot_seed
from attnbench.harness.run.worker import Refusal

# A longer call has brought back caches and clocks long before it is done.
LONGEST_REWARMED_MS = 5.0
PREPARE_SLOT = 99  # inputs of the first call, thrown away: never those that are judged or timed


@dataclass
class Subject:
    """A prepared problem with its inputs in place, ready to be called: one call per slot of inputs."""

    problem: Problem
    calls: list[Call]


@dataclass(frozen=True)
class Pace:
    """How long a call took last, and how long the stream must be held to queue a turn of them; both in ms."""

    call_ms: float
    hold_ms: float


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
        self._probes: list[Oracle] = []
        self._judged_by: Oracle | None = None
        self._subject: Subject | None = None
        self._paces: dict[str, Pace] = {}
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
            "unavailable": why,
            "compile_processes": self._implementation.compile_processes,
        }

    def _where(self) -> Device:
        if self._device.type != "cuda":
            return Device(self._device.type)
        name = torch.cuda.get_device_name(self._device)
        capability = torch.cuda.get_device_capability(self._device)
        return Device("cuda", self._device.index or 0, name, capability)

    # ---- per group ----------------------------------------------------------------------------------------

    def do_prepare(self, plan: dict[str, Any], problem: str) -> Message:
        """Sets up for one problem of the group and makes the first call, on inputs of its own."""
        self._open(GroupPlan.from_json(plan))
        posed = self._problem(problem)
        assert self._implementation is not None, "prepare before hello"
        reasons = self._implementation.unsupported_reasons(posed, self._where())
        if reasons:
            return {"unsupported": reasons}
        inputs = self._inputs(posed, PREPARE_SLOT)
        self._synchronize()
        begin = time.perf_counter()
        prepared = self._implementation.prepare(posed, self._where())
        self._synchronize()
        prepare_ms = (time.perf_counter() - begin) * 1e3
        call = _call(posed, prepared, inputs)
        begin = time.perf_counter()
        call()
        self._synchronize()
        first_call_ms = (time.perf_counter() - begin) * 1e3
        del call, inputs
        self.do_release()
        self._prepared[problem] = prepared
        return {"unsupported": [], "prepare_ms": prepare_ms, "first_call_ms": first_call_ms}

    def do_weigh(self, problem: str) -> Message:
        """The memory of one call, alone on the device; MiB beyond the inputs."""
        posed = self._problem(problem)
        peak = peak_of(_call(posed, self._prepared[problem], self._inputs(posed, slot=0)), self._device)
        minimum = posed.minimal_result_bytes / MIB
        return {"peak_mib": peak.peak_mib, "driver_mib": peak.driver_mib, "minimum_mib": minimum}

    def do_preload(self, oracle: str) -> Message:
        """Puts the oracle's answer on the device, until the next release."""
        if self._judged_by is None:
            self._judged_by = Oracle.load(oracle, self._device)
        return {}

    def do_judge(self, problem: str, oracle: str) -> Message:
        """Judges the answer, made in memory that held NaN, and looks whether the inputs are as they were."""
        posed, prepared = self._problem(problem), self._prepared[problem]
        self.do_preload(oracle)
        assert self._judged_by is not None
        inputs = self._inputs(posed, slot=0)
        before = _checksums(inputs)
        _poison(posed, self._device)
        answer = _answer(posed, prepared, inputs, self._judged_by)
        self._synchronize()
        changed = [name for name, bits in _checksums(inputs).items() if bits != before[name]]
        if changed:
            raise Refusal(Status.INCORRECT, f"writes into its inputs ({', '.join(changed)})")
        return {"judgement": to_plain(_judged(self._judged_by, answer))}

    def do_turn(
        self, problem: str, probes: list[str], samples: int, turn_ms: float, mode: str, keep_memory: bool
    ) -> Message:
        """Samples for one round, and the judgement of one of the timed calls' own outputs, chosen at random."""
        posed = self._problem(problem)
        warmup_calls = 0
        if self._subject is None or self._subject.problem != posed:
            warmup_calls = self._make_subject(posed, probes, graph="graph" in mode)
        assert self._subject is not None
        calls, pace = self._subject.calls, self._paces[problem]
        count = max(1, min(samples, int(turn_ms / max(pace.call_ms, 1e-3))))
        slots = [(self._calls_made + i) % len(calls) for i in range(count)]
        self._calls_made += count
        keep = self._random.randrange(count)
        turn = take_turn(
            [calls[slot] for slot in slots],
            device=self._device,
            keep=keep,
            flush=None if "hot" in mode else self._flush,
            clocks=self._clocks,
            hold_ms=pace.hold_ms,
            rewarm=pace.call_ms <= LONGEST_REWARMED_MS,
        )
        self._paces[problem] = Pace(sorted(turn.ms)[len(turn.ms) // 2], turn.next_hold_ms)
        judgement = _judged(self._probes[slots[keep]], _named(posed, turn.kept))
        reply = {
            "ms": turn.ms,
            "host_us": sorted(turn.host_us)[len(turn.host_us) // 2] if turn.host_us else None,
            "held": turn.held,
            "discarded": turn.discarded,
            "clocks": dataclasses.asdict(turn.clocks),
            "warmup_calls": warmup_calls,
            "judgement": to_plain(judgement),
        }
        del turn, calls
        if not keep_memory:
            self.do_release()
        return reply

    def do_release(self) -> Message:
        """Gives back all device memory but what the implementation itself holds."""
        self._subject = None
        self._judged_by = None
        self._probes = []
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    # ---- pieces -------------------------------------------------------------------------------------------

    def _open(self, plan: GroupPlan) -> None:
        if self._plan != plan:
            self._plan = plan
            self._prepared = {}
            self._paces = {}
            self._random = random.Random(plan.seed)
            self.do_release()

    def _problem(self, key: str) -> Problem:
        assert self._plan is not None, "no group is open"
        return next(p for p in self._plan.problems if p.key == key)

    def _inputs(self, problem: Problem, slot: int) -> Inputs:
        assert self._plan is not None, "no group is open"
        return make_inputs(
            problem,
            slot_seed(self._plan, slot),
            self._device,
            dout=problem.direction != "fwd",
            kind=self._plan.inputs,
        )

    def _make_subject(self, problem: Problem, probes: list[str], graph: bool) -> int:
        """Puts inputs and calls in place, warms up, and returns how many calls that took."""
        self.do_release()
        prepared = self._prepared[problem.key]
        self._probes = [Oracle.load(path, self._device) for path in probes]
        calls = [
            _call(problem, prepared, self._inputs(problem, slot), again=True)
            for slot in range(len(self._probes))
        ]
        if graph:
            calls = [capture(call) for call in calls]
        self._subject = Subject(problem, calls)
        if problem.key in self._paces:  # back from a release between turns: warm already, but for its memory
            calls[0]()
            self._synchronize()
            return 1
        made, call_ms = warm_up(calls[0], self._device)
        self._paces[problem.key] = Pace(call_ms, FIRST_HOLD_MS)
        return made

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _call(problem: Problem, prepared: Prepared, inputs: Inputs, *, again: bool = False) -> Call:
    """What one call of the problem's direction is. Results: out; (dq, dk, dv); or both in a row.

    again: the call will be made many times. A ``bwd`` call then runs the forward once, here, and keeps its graph;
    otherwise the forward is part of the call (first call and memory, which a training step pays for both passes).
    """
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    if problem.direction == "fwd":

        def forward() -> Any:
            with torch.no_grad():
                return (prepared.attend(q, k, v),)

        return forward
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v))
    if problem.direction == "bwd" and again:
        out = prepared.attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def both() -> Any:
        result = prepared.attend(*leaves)
        return (result.detach(), *torch.autograd.grad(result, leaves, dout))

    return both


def _named(problem: Problem, results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Names a timed call's results. dK and dV depend on every row of dO, and the probes hold a few: not compared."""
    names = {"fwd": ("out",), "bwd": ("dq",), "fwd_bwd": ("out", "dq")}[problem.direction]
    return dict(zip(names, results, strict=False))


def _answer(problem: Problem, prepared: Prepared, inputs: Inputs, oracle: Oracle) -> dict[str, torch.Tensor]:
    """The tensors to be judged, made by the very function that is timed; the lse by its companion."""
    if problem.direction == "fwd":
        with torch.no_grad():
            answer = {"out": _tensor(prepared.attend(inputs.q, inputs.k, inputs.v))}
            if prepared.attend_with_lse is not None:
                answer["lse"] = prepared.attend_with_lse(inputs.q, inputs.k, inputs.v)[1]
        return answer
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    out = _tensor(prepared.attend(*leaves))
    # Timing runs the backward again and again over one graph, so it is a repeated backward that is judged.
    dout = judging_dout(inputs, oracle.rows)
    torch.autograd.grad(out, leaves, dout, retain_graph=True)
    grads = torch.autograd.grad(out, leaves, dout)
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _tensor(out: object) -> torch.Tensor:
    if not isinstance(out, torch.Tensor):
        raise Refusal(Status.INCORRECT, f"attend returned a {type(out).__name__}, not a Tensor")
    return out


def _judged(oracle: Oracle, answer: dict[str, torch.Tensor]) -> Judgement:
    try:
        return judge(oracle, answer)
    except WrongAnswer as wrong:
        raise Refusal(Status.INCORRECT, str(wrong)) from None


def _checksums(inputs: Inputs) -> dict[str, int]:
    """A sum of each tensor's bits: cheap, and no write that matters leaves it as it was."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = {name: getattr(inputs, name) for name in ("q", "k", "v", "dout")}
    return {
        name: int(tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in tensors.items()
        if tensor is not None
    }


def _poison(problem: Problem, device: torch.device) -> None:
    """Leaves NaN in the memory that the next allocations are likely to be given, so that what is not written shows."""
    dtype = torch_dtype(problem.dtype)
    shapes = [problem.out_shape] if problem.direction == "fwd" else [
        problem.out_shape, problem.q_shape, problem.k_shape, problem.v_shape
    ]  # fmt: skip
    held = [torch.full((math.prod(shape),), math.nan, dtype=dtype, device=device) for shape in shapes]
    held.append(torch.full((problem.batch * problem.heads * problem.seqlen_q,), math.nan, device=device))
    del held
