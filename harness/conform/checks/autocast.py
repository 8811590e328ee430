"""Under autocast, fp32 leaves give an out of 16-bit accuracy, and gradients in the leaves' own dtype.

The leaves hold values that the 16-bit dtype holds too, so the right answer is the problem's own.
"""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Declined, Posed


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    dtype = inputs.q.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast needs a 16-bit problem, and {posed.case.id} poses {posed.problem.dtype}")
    leaves = [x.float().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    try:
        with torch.autocast(posed.device.type, dtype=dtype):
            out = posed.prepared.attend(*leaves)
    # Libraries refuse a mixture of dtypes with any of these, xformers with an assertion or NotImplementedError; whoever
    # refuses has answered nothing wrongly, and what else is raised is an ERROR.
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        said = str(error).strip() or posed.fail("under autocast it raises without a word")
        raise Declined(f"does not take part in autocast: {said.splitlines()[0]}") from None
    if out.dtype not in (dtype, torch.float32):
        posed.fail(f"under autocast to {posed.problem.dtype} out is {out.dtype}")
    gradients = torch.autograd.grad(out, leaves, posed.dout(inputs).to(out.dtype))
    for name, gradient in zip("qkv", gradients, strict=True):
        if gradient.dtype != torch.float32:
            posed.fail(f"under autocast the gradient of an fp32 {name} is {gradient.dtype}")
    got = {"out": out} | {f"d{name}": g for name, g in zip("qkv", gradients, strict=True)}
    posed.hold({name: x.detach().to(dtype) for name, x in got.items()}, "under autocast, ")
