"""Under torch.compile the answer is the eager one: what the compiler was told of shapes and strides is true."""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    attend = posed.prepared.attend  # set up before the compiler looks on
    torch.compiler.reset()

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """With something to fuse on both sides, so that the compiler depends on the call's strides."""
        return attend(q * 1, k * 1, v * 1).transpose(1, 2).mul(1).transpose(1, 2)

    call = torch.compile(layer, backend=posed.option("backend"))
    try:
        if posed.problem.direction == "fwd":
            with torch.no_grad():
                posed.hold({"out": call(inputs.q, inputs.k, inputs.v)}, "under torch.compile, ")
            return
        leaves = posed.leaves(inputs)
        out = call(*leaves)
        gradients = torch.autograd.grad(out, leaves, posed.dout(inputs))
        got = {"out": out.detach()} | {f"d{name}": g for name, g in zip("qkv", gradients, strict=True)}
        posed.hold(got, "under torch.compile, ")
    finally:
        torch.compiler.reset()
