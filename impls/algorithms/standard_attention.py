"""Standard attention as the FlashAttention paper counts it: each step a pass over matrices in slow memory.

Dao et al. 2022 (arXiv 2205.14135), Algorithms 0 and 3: S, P, dP and dS are whole matrices that are written and read
back. Products keep one block of rows in fast memory and stream the other operand past it; softmax and its gradient
read their rows twice, since a row need not fit. Posed only on a modelled memory: on a device, ``impls/standard.py``
leaves these loops to the libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from attnbench.harness.problem import Problem
from attnbench.harness.two_level import TwoLevelMemory
from attnbench.impls.algorithms.once import differentiable_once
from attnbench.impls.algorithms.online_softmax import normaliser, probabilities, score_gradient
from attnbench.impls.algorithms.tiles import Heads, by_row


class StandardAttention(torch.autograd.Function):
    """apply(q, k, v, problem, memory) -> out, lse; BSHD, lse fp32 (batch, heads, seqlen_q), not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, memory: TwoLevelMemory
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 0: S = scale Q K^T, P = softmax(S), O = P V."""
        steps = Steps(problem, memory)
        pairs = (*problem.q_shape[:3], problem.seqlen_k)
        s, p, out = q.new_empty(pairs), q.new_empty(pairs), q.new_empty(problem.out_shape)
        q_rows, k_rows, v_rows, s_rows, p_rows, out_rows = (steps.heads(x) for x in (q, k, v, s, p, out))
        steps.outer_product(q_rows, k_rows, s_rows, problem.softmax_scale, hide=True)
        logsumexp = q.new_empty((*problem.q_shape[:3], 1))
        lse_rows = Heads(logsumexp, problem.kv_heads)  # kept for the contract; no part of the algorithm
        for rows in steps.query_blocks():
            m, l = normaliser(s_rows[rows, keys] for keys in steps.key_blocks())
            lse_rows[rows] = lse = m + l.log()
            for keys in steps.key_blocks():
                p_rows[rows, keys] = probabilities(s_rows[rows, keys], lse)
        steps.inner_product(p_rows, v_rows, out_rows)
        ctx.steps = steps
        ctx.save_for_backward(q, k, v, p)
        lse = by_row(logsumexp)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 3: dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)), dQ = dS K, dK = dS^T Q."""
        steps: Steps = ctx.steps
        q, k, v, p = ctx.saved_tensors
        scale = steps.problem.softmax_scale
        dp, dq, dk, dv = (torch.empty_like(x) for x in (p, q, k, v))
        q_rows, k_rows, v_rows, p_rows, do_rows = (steps.heads(x) for x in (q, k, v, p, dout))
        dp_rows, dq_rows, dk_rows, dv_rows = (steps.heads(x) for x in (dp, dq, dk, dv))
        steps.inner_product_transposed(p_rows, do_rows, dv_rows)
        steps.outer_product(do_rows, v_rows, dp_rows)
        for rows in steps.query_blocks():
            delta = total(
                (p_rows[rows, keys] * dp_rows[rows, keys]).sum(-1, keepdim=True)
                for keys in steps.key_blocks()
            )
            for keys in steps.key_blocks():
                dp_rows[rows, keys] = score_gradient(
                    p_rows[rows, keys].clone(), dp_rows[rows, keys].clone(), delta
                )
        steps.inner_product(dp_rows, k_rows, dq_rows, scale)
        steps.inner_product_transposed(dp_rows, q_rows, dk_rows, scale)
        return dq, dk, dv


class Steps:
    """The passes, in blocks that fast memory holds: ``stays`` rows of one operand, ``streams`` of the other."""

    def __init__(self, problem: Problem, memory: TwoLevelMemory) -> None:
        self.problem = problem
        self.memory = memory
        self.stays, self.streams = memory.block_rows(max(problem.head_dim, problem.head_dim_v))

    def heads(self, tensor: Tensor) -> Heads:
        return Heads(tensor, self.problem.kv_heads, self.memory)

    def query_blocks(self, *, stay: bool = False) -> Iterator[slice]:
        return pieces(self.problem.seqlen_q, self.stays if stay else self.streams)

    def key_blocks(self, *, stay: bool = True) -> Iterator[slice]:
        return pieces(self.problem.seqlen_k, self.stays if stay else self.streams)

    def outer_product(
        self, a: Heads, b: Heads, result: Heads, scale: float = 1, *, hide: bool = False
    ) -> None:
        """result (rows, keys) = scale a b^T: a block of b stays, a streams past it."""
        for keys in self.key_blocks():
            b_block = b[keys]
            for rows in self.query_blocks():
                tile = a[rows] @ b_block.mT * scale
                result[rows, keys] = self._hide(tile, rows, keys) if hide else tile

    def inner_product(self, s: Heads, b: Heads, result: Heads, scale: float = 1) -> None:
        """result (rows, dim) = scale s b, summed over keys: a block of the result stays, s and b stream past it."""
        for rows in self.query_blocks(stay=True):
            result[rows] = total(s[rows, keys] @ b[keys] for keys in self.key_blocks(stay=False)) * scale

    def inner_product_transposed(self, s: Heads, a: Heads, result: Heads, scale: float = 1) -> None:
        """result (keys, dim) = scale s^T a, summed over rows."""
        for keys in self.key_blocks():
            result[keys] = total(s[rows, keys].mT @ a[rows] for rows in self.query_blocks()) * scale

    def _hide(self, tile: Tensor, rows: slice, keys: slice) -> Tensor:
        problem = self.problem
        lines = torch.arange(rows.start, rows.stop, device=tile.device)
        visible = problem.mask.dense(lines, problem.heads, problem.seqlen_q, problem.seqlen_k)[..., keys]
        return (
            tile.view(problem.batch, problem.heads, *visible.shape[1:])
            .masked_fill(~visible, float("-inf"))
            .view(tile.shape)
        )


def pieces(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(add, terms)
