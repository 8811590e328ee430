"""What one call of a problem is, and the answers that calls give. Imports torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from attnbench.harness.contract import Device, Prepared
from attnbench.harness.measure.memory import Peak, peak_of
from attnbench.harness.measure.timing import Call
from attnbench.harness.oracle.inputs import Inputs, judging_dout
from attnbench.harness.oracle.judge import Oracle
from attnbench.harness.problem import Problem
from attnbench.harness.run.memory_state import poison
from attnbench.harness.run.record import Status
from attnbench.harness.run.worker import Refusal


def device_of(device: torch.device) -> Device:
    """The contract's Device for torch's, with what CUDA says of it."""
    if device.type != "cuda":
        return Device(device.type)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Device("cuda", device.index or 0, name, capability)


def make_call(problem: Problem, prepared: Prepared, inputs: Inputs, *, again: bool = False) -> Call:
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


def named(problem: Problem, results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Names a timed call's results. dK and dV depend on every row of dO, and the probes hold a few: not compared."""
    names = {"fwd": ("out",), "bwd": ("dq",), "fwd_bwd": ("out", "dq")}[problem.direction]
    return dict(zip(names, results, strict=False))


def answer_of(
    problem: Problem, prepared: Prepared, inputs: Inputs, oracle: Oracle
) -> dict[str, torch.Tensor]:
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


def weighed_answer(
    problem: Problem, prepared: Prepared, inputs: Inputs, oracle: Oracle, device: torch.device
) -> tuple[dict[str, torch.Tensor], Peak]:
    """The tensors to be judged, out of the very call that was weighed; the lse by its companion."""
    if problem.direction != "fwd":
        inputs = dataclasses.replace(inputs, dout=judging_dout(inputs, oracle.rows))
    call = make_call(problem, prepared, inputs)
    peak = peak_of(call, device, before=lambda: poison(problem, device))
    answer = dict(zip(("out", "dq", "dk", "dv"), peak.result, strict=False))
    answer["out"] = _tensor(answer["out"])
    if problem.direction == "fwd" and prepared.attend_with_lse is not None:
        with torch.no_grad():
            answer["lse"] = prepared.attend_with_lse(inputs.q, inputs.k, inputs.v)[1]
    return answer, peak


def _tensor(out: object) -> torch.Tensor:
    """``out`` if it is a plain tensor: a subclass may work its elements out only when they are asked for."""
    if type(out) is not torch.Tensor:
        kind = (
            f"a {type(out).__name__}"
            if not isinstance(out, torch.Tensor)
            else f"the subclass {type(out).__name__}"
        )
        raise Refusal(Status.INCORRECT, f"attend returned {kind}, not a plain Tensor")
    return out


def copied(results: tuple[object, ...]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(_tensor(result).clone() for result in results)


def refuse_unfinished(results: tuple[torch.Tensor, ...], seen: tuple[torch.Tensor, ...]) -> None:
    """Refuses results that are not what they were when their sample ended."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for now, then in zip(results, seen, strict=True):
        kind = bits.get(now.element_size(), now.dtype)
        if not torch.equal(now.detach().view(kind), then.view(kind)):
            why = "left to another stream, thread or call, or written over by a later one"
            raise Refusal(
                Status.INCORRECT, f"a timed call: its results were not there when its sample ended: {why}"
            )
