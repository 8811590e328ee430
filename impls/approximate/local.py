"""Local attention: a query sees the keys within a window of it (Beltagy et al. 2020, Longformer, arXiv 2004.05150)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.problem import Problem
from attnbench.impls.approximate.base import Approximation, Attention

if TYPE_CHECKING:
    import torch

WINDOW = 128
"""Keys on each side; also the edge of the blocks it is computed in, three of which hold a query's window."""


def local_attention(problem: Problem, device: torch.device) -> Attention:
    import torch
    from torch.nn.functional import pad

    n, w = problem.seqlen_k, WINDOW
    blocks = -(-n // w)
    rows = torch.arange(blocks * w, device=device).view(blocks, w, 1)
    keys = torch.arange(-w, 2 * w, device=device) + w * torch.arange(blocks, device=device).view(blocks, 1, 1)
    seen = ((keys - rows).abs() <= w) & (keys >= 0) & (keys < n)
    if problem.mask.right == 0:
        seen &= keys <= rows
    hidden = ~(seen | (rows >= n))  # padded rows see something, so that no softmax is over nothing

    def around(x: torch.Tensor) -> torch.Tensor:
        """(b, h, n, d) to each block with its neighbours, (b, h, blocks, 3w, d)."""
        padded = pad(x, (0, 0, w, (blocks + 1) * w - n))
        return padded.unfold(2, 3 * w, w).transpose(-1, -2)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = pad(q, (0, 0, 0, blocks * w - n)).unflatten(2, (blocks, w))
        s = (q @ around(k).mT * problem.softmax_scale).masked_fill(hidden, float("-inf"))
        return (s.softmax(dim=-1) @ around(v)).flatten(2, 3)[:, :, :n]

    return attend


local = Approximation(
    "local", f"{WINDOW} keys on each side of a query, in blocks", local_attention, ("full", "causal")
)
