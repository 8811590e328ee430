"""Under torch.utils.checkpoint, both kinds, gradients are what they are without it."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from attnbench.harness.conform.posed import Posed


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    for reentrant in (False, True):
        leaves = posed.leaves(inputs)
        out = checkpoint(posed.prepared.attend, *leaves, use_reentrant=reentrant)
        assert isinstance(out, torch.Tensor)
        posed.answer(
            posed.inputs(seed=1)
        )  # another layer's call, between this one's forward and its backward
        out.backward(posed.dout(inputs))
        got = {"out": out.detach()}
        for name, leaf in zip("qkv", leaves, strict=True):
            got[f"d{name}"] = leaf.grad if leaf.grad is not None else posed.fail(f"d{name} is not computed")
        posed.hold(got, f"under {'reentrant' if reentrant else 'non-reentrant'} checkpointing, ")
