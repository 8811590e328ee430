"""What is timed: a prepared problem's calls, each on inputs of its own, and the memory that a sample will need.

Imports torch.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attnbench.harness.contract import Prepared
from attnbench.harness.measure.capture import replaying
from attnbench.harness.measure.memory import MIB, held_mib, reserve
from attnbench.harness.measure.timing import Call
from attnbench.harness.oracle.dropout import GeneratorState
from attnbench.harness.oracle.inputs import Inputs, make_inputs
from attnbench.harness.problem import Problem
from attnbench.harness.run.calls import make_call
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.slots import slot_seed
from attnbench.harness.run.symmetry import Renewed


def drawn_inputs(plan: GroupPlan, problem: Problem, slot: int, device: torch.device) -> Inputs:
    """Those of a slot as they are drawn; each call gives the same ones anew."""
    seed = slot_seed(plan, slot)
    return make_inputs(problem, seed, device, dout=problem.direction != "fwd", kind=plan.inputs)


@dataclass(frozen=True)
class Timed:
    """The call of one slot, and its inputs, which are other ones after each call."""

    call: Call
    renewed: Renewed

    def once(self) -> None:
        """One call that is no sample."""
        self.call()
        device = self.renewed.inputs.q.device
        if device.type == "cuda":  # a call may leave another stream current
            torch.cuda.set_stream(torch.cuda.default_stream(device))
        self.renewed.renew()


@dataclass
class Subject:
    """A prepared problem whose inputs are in place: one call for each slot that was needed so far. peak_mib: what a
    call was weighed at, None if it was not. held_mib: of torch's allocator, before any inputs were. states: of torch's
    generators before the last call whose dropout mask will be asked for.
    """

    plan: GroupPlan
    problem: Problem
    prepared: Prepared
    device: torch.device
    peak_mib: float | None
    held_mib: float
    warm: bool = False
    reserved: bool = False
    made: dict[int, Timed] = field(default_factory=dict)
    states: dict[int, GeneratorState] = field(default_factory=dict)

    def timed(self, slot: int, *, graph: bool) -> Timed:
        """The call on the inputs of ``slot``, made when it is first needed."""
        if slot not in self.made:
            inputs = drawn_inputs(self.plan, self.problem, slot, self.device)
            renewed = Renewed(self.problem, inputs, slot_seed(self.plan, slot))
            if self.problem.dropout_p:
                self.states[slot] = GeneratorState.now(self.device)
            make = partial(make_call, self.problem, self.prepared, inputs, again=True)
            self.made[slot] = Timed(replaying(make) if graph else make(), renewed)
        return self.made[slot]

    def noting_state(self, slot: int, call: Call) -> Call:
        """The same call, which notes the generators' state before it, where it draws a mask. A ``bwd`` call draws
        none: it uses that of the forward which was run when it was made."""
        if not self.problem.dropout_p or self.problem.direction == "bwd":
            return call

        def noting() -> Any:
            self.states[slot] = GeneratorState.now(self.device)
            return call()

        return noting

    def reserve(self) -> None:
        """Memory that the driver hands out during a sample would be in the sample: has it ready, once the inputs that
        are needed first are in place.

        It is what a call was weighed at, and of one call the results and the copy of them that are compared; less what
        a backward's sets have of it already, each having kept a forward's part.
        """
        if self.reserved or self.device.type != "cuda" or self.peak_mib is None:
            return
        self.reserved = True
        sets, results = len(self.made), 2 * self.problem.minimal_result_bytes / MIB
        inputs = self.problem.input_bytes / MIB
        due = (
            sets * (inputs + self.peak_mib)
            if self.problem.direction == "bwd"
            else sets * inputs + self.peak_mib
        )
        held = (held_mib(self.device) or 0.0) - self.held_mib
        with suppress(torch.OutOfMemoryError):  # the sample will find what there is
            reserve(max(min(self.peak_mib, due - held), 0.0) + results, self.device)
