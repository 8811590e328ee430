"""Linformer: keys and values are first summed up into a fixed number of rows (Wang et al. 2020, arXiv 2006.04768).

The paper learns the two projections, or pools, which it reports to do as well; untrained, pooling is the one that means
something, so it is used here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.problem import Problem
from attnbench.impls.approximate.base import Approximation, Attention

if TYPE_CHECKING:
    import torch

RANK = 256


def linformer_attention(problem: Problem, device: torch.device) -> Attention:
    import torch

    rank = min(RANK, problem.seqlen_k)
    # Every key belongs to one of ``rank`` spans, as equal as they come; a row of E averages one span.
    span = torch.arange(problem.seqlen_k, device=device) * rank // problem.seqlen_k
    sizes = torch.bincount(span, minlength=rank).view(-1, 1)

    def pooled(x: torch.Tensor) -> torch.Tensor:
        summed = x.new_zeros(*x.shape[:2], rank, x.shape[3]).index_add(2, span, x)
        return summed / sizes.to(x.dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = q @ pooled(k).mT * problem.softmax_scale
        return s.softmax(dim=-1) @ pooled(v)

    return attend


linformer = Approximation(
    "linformer", f"keys and values pooled to {RANK} rows", linformer_attention, ("full",)
)
