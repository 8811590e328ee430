"""A graph that is kept gives the same gradients again, calls between a forward and its backward change nothing, and an
input that was written over since the forward is refused.

Workspaces, statistics or inputs that live with the function rather than with the graph fail one of the three.
"""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed


def check(posed: Posed) -> None:
    inputs, others = posed.inputs(), posed.inputs(seed=1)
    dout = posed.dout(inputs)
    leaves = posed.leaves(inputs)
    out = posed.prepared.attend(*leaves)
    posed.answer(others)
    for when in ("after another call, ", "a second time over a kept graph, "):
        gradients = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        posed.hold({f"d{name}": g for name, g in zip("qkv", gradients, strict=True)}, when)
    for written, name in enumerate("qkv"):
        fresh = posed.inputs()
        leaves = posed.leaves(fresh)
        out = posed.prepared.attend(*leaves)
        with torch.no_grad():
            leaves[written].mul_(2)
        try:
            gradients = torch.autograd.grad(out, leaves, dout)
        except RuntimeError:
            continue
        got = {f"d{n}": g for n, g in zip("qkv", gradients, strict=True)}
        posed.hold(got, f"with {name} written over between forward and backward, and nothing raised, ")
