"""A right attention by another route than the oracle's, with switches that make it wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.problem import Problem


@pytest.fixture(scope="session")
def flashlike() -> Callable[..., dict[str, torch.Tensor]]:
    return attend


def attend(
    problem: Problem,
    inputs: Inputs,
    dout: torch.Tensor | None = None,
    *,
    tile: int = 64,
    scale: float | None = None,
    keys: int | None = None,
    shift: int = 0,
    swap_kv_heads: bool = False,
) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv of a problem as fused kernels compute them: online softmax over key tiles, fp32
    accumulation, P and dS rounded to the problem's dtype.

    The rest plant errors: another ``scale``, only the first ``keys`` keys, a mask moved ``shift`` keys to the right,
    and dk given to the next kv head.
    """
    dtype = inputs.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scale = problem.softmax_scale if scale is None else scale
    group = problem.heads // problem.kv_heads
    q, k, v, dout = (
        x.transpose(1, 2).to(wide)
        for x in (inputs.q, inputs.k, inputs.v, inputs.dout if dout is None else dout)
    )
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = torch.arange(problem.seqlen_q)
    visible = problem.mask.dense(rows + shift, problem.heads, problem.seqlen_q, problem.seqlen_k)
    visible = visible.clone()
    if keys is not None:
        visible[..., keys:] = False
    tiles = [slice(start, start + tile) for start in range(0, problem.seqlen_k, tile)]

    top = torch.full((*q.shape[:3], 1), -torch.inf, dtype=wide)
    total = torch.zeros_like(top)
    acc = torch.zeros((*q.shape[:3], v.shape[3]), dtype=wide)
    for at in tiles:
        scores = (q @ k[:, :, at].mT * scale).masked_fill(~visible[..., at], -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe = torch.where(new_top == -torch.inf, 0, new_top)
        p, shrink = (scores - safe).exp(), (top - safe).exp()
        total = total * shrink + p.sum(-1, keepdim=True)
        acc = acc * shrink + p.to(dtype).to(wide) @ v[:, :, at]
        top = new_top
    out = torch.where(total > 0, acc / total, 0).to(dtype)
    lse = torch.where(total > 0, top + total.log(), -torch.inf)

    delta = (out.to(wide) * dout).sum(-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at in tiles:
        p = (q @ k[:, :, at].mT * scale - lse).exp()
        p = torch.where(visible[..., at] & (total > 0), p, 0)
        dv[:, :, at] = p.to(dtype).to(wide).mT @ dout
        ds = (p * (dout @ v[:, :, at].mT - delta)).to(dtype).to(wide)
        dq += ds @ k[:, :, at] * scale
        dk[:, :, at] = ds.mT @ q * scale
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    if swap_kv_heads:
        dk = dk.roll(1, 1)
    found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return {name: x.to(dtype).transpose(1, 2) for name, x in found.items()} | {"lse": lse.squeeze(-1).float()}
