"""Gradients of gradients are right, or raise; silently wrong ones train a gradient penalty on nothing."""

from __future__ import annotations

import torch

from attnbench.harness.conform.posed import Posed
from attnbench.harness.problem import Problem

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of the largest element, with all of a dense computation's roundings: what is wrong is wrong by its own size."""


def check(posed: Posed) -> None:
    inputs = posed.inputs()
    for depends in (False, True):
        leaves = posed.leaves(inputs)
        dout = posed.dout(inputs).detach().clone().requires_grad_(depends)
        try:
            out = posed.prepared.attend(*leaves)
            first = torch.autograd.grad(out, leaves, dout, create_graph=True)
            penalty = torch.stack([(g.float() ** 2).sum() for g in first]).sum()
            if not penalty.requires_grad:
                posed.fail(
                    "gradients taken with create_graph depend on nothing: a penalty on them is ignored"
                )
            second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        except RuntimeError as error:
            if not str(error).strip():
                posed.fail("a double backward raises without a word")
            continue
        for name, got, want in zip("qkv", second, _right(posed.problem, leaves, dout), strict=True):
            off = float((got.double() - want).abs().max()) if got is not None else float("inf")
            allowed = TOLERANCE[leaves[0].dtype] * float(want.abs().max())
            if not off <= allowed:
                posed.fail(
                    f"the second derivative in {name} is silently wrong by {off:.3g}, {allowed:.3g} allowed"
                    + (" (it is not computed at all)" if got is None else ""),
                    tensor=name,
                )


def _right(
    problem: Problem, leaves: tuple[torch.Tensor, ...], dout: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """d(|dq|^2 + |dk|^2 + |dv|^2) / d(q, k, v) in fp64, by autograd through dense attention."""
    q, k, v = (x.detach().double().requires_grad_() for x in leaves)
    group = problem.heads // problem.kv_heads
    rows = torch.arange(problem.seqlen_q, device=q.device)
    visible = problem.mask.dense(rows, problem.heads, problem.seqlen_q, problem.seqlen_k)
    empty = ~visible.any(-1, keepdim=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) * problem.softmax_scale
    p = scores.masked_fill(~visible & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(group, 2))
    first = torch.autograd.grad(out, (q, k, v), dout.detach().double(), create_graph=True)
    return torch.autograd.grad(torch.stack([(g**2).sum() for g in first]).sum(), (q, k, v))
