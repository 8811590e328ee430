"""Captured in a CUDA graph, forward and backward answer rightly to inputs that were not there at the capture."""

from __future__ import annotations

from attnbench.harness.conform.graph import Captured
from attnbench.harness.conform.posed import Declined, Posed


def check(posed: Posed) -> None:
    if posed.device.type != "cuda":
        raise Declined("there are no CUDA graphs on this device")
    wanted = posed.inputs()
    graph = Captured(posed, posed.inputs(seed=1), posed.dout(wanted) if wanted.dout is not None else None)
    for replay in range(3):
        others = posed.inputs(seed=2 + replay)
        graph.replay(others.q, others.k, others.v)
        posed.hold(graph.replay(wanted.q, wanted.k, wanted.v), "in a replay of a CUDA graph, ")
