"""Dropout in a CUDA graph: every replay draws a new mask, and its backward uses the one of its forward."""

from __future__ import annotations

import dataclasses

import torch

from attnbench.harness.conform.graph import Captured
from attnbench.harness.conform.posed import Declined, Posed
from attnbench.harness.oracle.dropout import recover
from attnbench.harness.oracle.judge import WrongAnswer


def check(posed: Posed) -> None:
    if posed.device.type != "cuda":
        raise Declined("there are no CUDA graphs on this device")
    given = posed.inputs()
    graph = Captured(posed, posed.inputs(), posed.dout(given) if given.dout is not None else None)
    tensors = (given.q, given.k, given.v)
    state = posed.state()
    first, second = graph.replay(*tensors), graph.replay(*tensors)
    if torch.equal(first["out"], second["out"]):
        posed.fail("two replays of a CUDA graph drop the same weights")
    state.restore()
    if not torch.equal(first["out"], graph.replay(*tensors)["out"]):
        posed.fail("two replays of a CUDA graph from one generator state differ")
    dropout = posed.implementation.dropout_effective(posed.problem.dropout_p)
    # A replay takes its tensors as values: no gradients are asked of those that the recovery makes.
    problem = dataclasses.replace(posed.problem, direction="fwd")
    try:
        kept = recover(problem, lambda *qkv: graph.replay(*qkv)["out"], state, dropout)
    except WrongAnswer as wrong:
        posed.fail(f"in replays of a CUDA graph: {wrong}")
    posed.hold(first, "in a replay of a CUDA graph, ", posed.oracle_under(kept))
