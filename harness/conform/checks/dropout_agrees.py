"""Out and gradients under dropout, against the oracle under the very mask that the forward drew.

A backward that draws another mask than its forward, or indexes it by other tiles, is wrong here; that <dO, O> equals
<dV, V> would hold for dV alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from attnbench.harness.conform.posed import Posed, Tensors
from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.run.memory_state import poison

Attend = Callable[..., torch.Tensor]


def check(posed: Posed) -> None:
    state = posed.state()
    oracle = posed.oracle_under(posed.kept(state))
    inputs = posed.inputs()
    state.restore()
    how = posed.option("checkpoint")
    got = posed.answer(inputs) if how == "none" else _checkpointed(posed, inputs, how)
    posed.hold(got, "under its own mask, ", oracle)


def _checkpointed(posed: Posed, inputs: Inputs, how: str) -> Tensors:
    """A training step whose forward is run again in the backward, from the generator state of the first time."""
    attend: Attend = partial(checkpoint, posed.prepared.attend, use_reentrant=how == "reentrant")
    leaves = posed.leaves(inputs)
    poison(posed.problem, posed.device)
    out = attend(*leaves)
    torch.rand(3, device=posed.device)  # what a model draws between this layer's forward and its backward
    out.backward(posed.dout(inputs))
    gradients = {f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}
    if missing := [name for name, gradient in gradients.items() if gradient is None]:
        posed.fail(f"under checkpointing {missing[0]} is not computed")
    return {"out": out.detach()} | {n: g for n, g in gradients.items() if g is not None}
