"""The gradient of one input is right where the other two need none."""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed
from attnbench.harness.run.memory_state import poison


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    for name in ("q", "k", "v"):
        tensors = {n: getattr(inputs, n) for n in ("q", "k", "v")}
        tensors[name] = tensors[name].detach().requires_grad_()
        poison(posed.problem, posed.device)
        out = posed.prepared.attend(tensors["q"], tensors["k"], tensors["v"])
        if not out.requires_grad:
            posed.fail(f"out does not depend on {name}, the one input that needs a gradient")
        (gradient,) = torch.autograd.grad(out, tensors[name], posed.dout(inputs))
        posed.hold({"out": out.detach(), f"d{name}": gradient}, f"with {name} alone needing a gradient, ")
