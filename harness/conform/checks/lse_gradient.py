"""An lse that says it is differentiable has the right gradient, alone and beside out's."""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Declined, Posed
from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.problem import Problem

TOLERANCE = {
    torch.bfloat16: 2.0**-6,
    torch.float16: 2.0**-9,
    torch.float32: 2.0**-17,
    torch.float64: 2.0**-40,
}
"""Of the largest element: an lse gradient is a mean of keys or queries, and rounds as P does."""


def check(posed: Posed) -> None:
    if posed.prepared.attend_with_lse is None:
        raise Declined("returns no lse")
    inputs = posed.inputs()
    q, k, v = posed.leaves(inputs)
    _, lse = posed.prepared.attend_with_lse(q, k, v)
    if not lse.requires_grad:
        raise Declined("returns an lse that is not differentiable, and says so")
    # An empty row's lse is -inf and depends on nothing.
    weights = torch.where(lse.isfinite(), 1.0, 0.0).to(lse.dtype)
    gradients = torch.autograd.grad(lse, (q, k), weights, allow_unused=True)
    for name, got, want in zip(("dq", "dk"), gradients, _right(posed.problem, inputs), strict=True):
        allowed = TOLERANCE[q.dtype] * float(want.abs().max())
        error = float((got.double() - want).abs().max()) if got is not None else float(want.abs().max())
        if not error <= allowed:
            posed.fail(
                f"{name} of the lse's sum is off by {error:.3g}, {allowed:.3g} allowed",
                tensor=name,
                error=error,
            )


def _right(problem: Problem, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """d(sum of lse)/dq and /dk in fp64, dense: dlse = softmax of the row."""
    q, k = inputs.q.double(), inputs.k.double()
    group = problem.heads // problem.kv_heads
    shared = k.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, shared) * problem.softmax_scale
    rows = torch.arange(problem.seqlen_q, device=q.device)
    hidden = ~problem.mask.dense(rows, problem.heads, problem.seqlen_q, problem.seqlen_k)
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0) * problem.softmax_scale
    dq = torch.einsum("bhqk,bkhd->bqhd", p, shared)
    dk = torch.einsum("bhqk,bqhd->bkhd", p, q).unflatten(2, (problem.kv_heads, group)).sum(3)
    return dq, dk
