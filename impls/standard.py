"""Standard attention: the score matrix is materialised, in the problem's own dtype.

S = scale Q K^T, P = dropout(softmax(S)), O = P V (Dao et al. 2022, Algorithm 0). S and P are rounded to the problem's
dtype; torch's softmax of a 16-bit tensor computes in fp32 and rounds its result. Memory is quadratic: S, P, and
for a mask other than ``full`` one bool (1 or heads, seqlen_q, seqlen_k) built while preparing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.contract import Capabilities, Device, Implementation, Modelled, Prepared
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.harness.problem import DTYPES, Problem
from attnbench.harness.two_level import TwoLevelMemory

if TYPE_CHECKING:
    import torch


class Standard(Implementation):
    """Plain torch on any device: every mask, any head dim, every dtype."""

    name = "standard"
    contract = 1
    summary = "materialised softmax attention in the problem's dtype"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_multiple=1,
        max_head_dim=65536,
        head_dim_v_differs=True,
        dropout=True,
        repeats=("fwd", "bwd"),
        min_seqlen=0,
    )

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        import torch

        batch, heads, kv_heads = problem.batch, problem.heads, problem.kv_heads
        rows, keys = problem.seqlen_q, problem.seqlen_k
        folded = (batch * kv_heads, heads // kv_heads * rows)
        hidden, empty = _hidden_and_empty(problem, torch.device(str(device)))

        def fold(x: torch.Tensor) -> torch.Tensor:
            """BSHD to (batch * kv_heads, rows, dim): query heads that share a K/V head become more rows of it."""
            per_kv_head = x.shape[1] * x.shape[2] // kv_heads
            return x.transpose(1, 2).reshape(batch * kv_heads, per_kv_head, x.shape[3])

        def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            # alpha scales the fp32 accumulator: S is rounded once, and fp16 does not overflow before it is scaled.
            zero = q.new_zeros(1, 1, 1)
            s = torch.baddbmm(zero, fold(q), fold(k).mT, beta=0, alpha=problem.softmax_scale)
            s = s.view(batch, heads, rows, keys)
            return s if hidden is None else s.masked_fill_(hidden, float("-inf"))

        def dropped(p: torch.Tensor) -> torch.Tensor:
            if not problem.dropout_p:
                return p
            # Not torch's dropout: it rounds the scale of what is kept to P's dtype.
            drop = torch.empty_like(p, dtype=torch.bool).bernoulli_(problem.dropout_p)
            return p.masked_fill(drop, 0) * (1 / (1 - problem.dropout_p))

        def output(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            p = dropped(s.softmax(dim=-1)).view(*folded, keys)
            out = torch.bmm(p, fold(v)).view(batch, heads, rows, problem.head_dim_v)
            return (out if empty is None else out.masked_fill(empty, 0)).transpose(1, 2)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return output(scores(q, k), v)

        def attend_with_lse(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            s = scores(q, k)
            lse = s.detach().float().logsumexp(dim=-1)
            lse = lse if empty is None else lse.masked_fill(empty[..., 0], float("-inf"))
            return output(s, v), lse

        # Scores rounded to 16 bits have lost their lse: off by up to |s|/256, which the oracle rightly refuses.
        return Prepared(attend, attend_with_lse if problem.dtype in ("fp32", "fp64") else None)

    def modelled(self, problem: Problem, memory: TwoLevelMemory) -> Modelled | None:
        if problem.dropout_p:
            return None
        from attnbench.impls.algorithms import closed_forms
        from attnbench.impls.algorithms.standard_attention import StandardAttention

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return StandardAttention.apply(q, k, v, problem, memory)[0]

        stays, _ = memory.block_rows(max(problem.head_dim, problem.head_dim_v))
        forward, backward = closed_forms.standard_forward, closed_forms.standard_backward
        return Modelled(attend, forward(problem, stays), backward(problem, stays))


def _hidden_and_empty(
    problem: Problem, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Hidden pairs (1 or heads, seqlen_q, seqlen_k) and rows that see nothing (1 or heads, seqlen_q, 1), or None.

    A row that sees nothing hides nothing either: its softmax stays finite, and zeroing its output row makes
    its gradients zero too, where a softmax over nothing but -inf would spread NaN into dK and dV.
    """
    import torch

    mask = problem.mask
    if mask.kind == "full":
        return None, None
    every_row = torch.arange(problem.seqlen_q, device=device)
    visible = mask.dense(every_row, problem.heads, problem.seqlen_q, problem.seqlen_k)
    empty = ~visible.any(dim=-1, keepdim=True)
    hidden = ~visible & ~empty
    return hidden, empty if bool(empty.any()) else None
