"""FlashAttention and FlashAttention-2, forward and backward, one tile of all heads at a time.

FlashAttention1: Dao et al. 2022 (arXiv 2205.14135), Algorithms 2 and 4: K/V blocks outside, Q blocks inside, O
rescaled and normalised at every step, row statistics m and l kept for the backward pass.
FlashAttention2: Dao 2023 (arXiv 2307.08691), Algorithms 1 and 2: Q blocks outside, an accumulator divided by l
once at the end, L = m + log l kept, delta = rowsum(dO * O) computed before the backward loop.

Operands of matrix products are in the problem's dtype, as they are on tensor cores; sums and statistics are in
fp32 (fp64 for fp64). Memory beyond inputs and results is one tile of scores and fp32 accumulators of Q's, or of one
K/V block's, size: linear in the sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnbench.harness.problem import Problem

BLOCK = {"cpu": 128, "cuda": 1024}
"""Tile edge. On a GPU every torch operation is a launch, so a tile is large enough to fill the device."""

SMALLEST_BLOCK = 64
"""Least tile edge under a block pattern, whose own blocks set the tile so that hidden ones can be skipped."""


@dataclass(frozen=True)
class Tiles:
    """How a problem is cut into (block_q x block_k) tiles, and what the mask leaves of each.

    visible, whole: numpy bool (tiles of Q, tiles of K): may the tile hold a visible pair, are all its pairs visible.
    first, last: the band of each row, int64 (seqlen_q,). blocks: the pattern (1 or heads, rows, columns) or None.
    """

    problem: Problem
    block_q: int
    block_k: int
    visible: np.ndarray
    whole: np.ndarray
    first: Tensor
    last: Tensor
    blocks: Tensor | None

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> Tiles:
        """Reads the mask's row bounds and block pattern; never a (seqlen_q, seqlen_k) array."""
        mask, rows, keys = problem.mask, problem.seqlen_q, problem.seqlen_k
        block_q = block_k = BLOCK[device.type]
        if mask.blocks:
            block_q, block_k = (
                -(-SMALLEST_BLOCK // b) * b for b in (mask.blocks.block_q, mask.blocks.block_k)
            )
        # One loop over tiles serves all heads: a tile is visited if any head sees it.
        by_head = mask.tiles(problem.heads, rows, keys, block_q, block_k)
        visible, whole = np.logical_or.reduce(by_head[0]), np.logical_and.reduce(by_head[1])
        blocks = None
        if mask.blocks:
            blocks = torch.tensor(mask.blocks.blocks(problem.heads, rows, keys), device=device)
        first, last = mask.row_bounds(rows, keys)
        bounds = [torch.from_numpy(bound).to(device) for bound in (first, last)]
        return cls(problem, block_q, block_k, visible, whole, bounds[0], bounds[1], blocks)

    def rows(self, i: int) -> slice:
        return slice(i * self.block_q, min((i + 1) * self.block_q, self.problem.seqlen_q))

    def keys(self, j: int) -> slice:
        return slice(j * self.block_k, min((j + 1) * self.block_k, self.problem.seqlen_k))

    def seen_by(self, i: int) -> list[int]:
        """Tiles of K that tile i of Q visits."""
        return np.flatnonzero(self.visible[i]).tolist()

    def seeing(self, j: int) -> list[int]:
        """Tiles of Q that visit tile j of K."""
        return np.flatnonzero(self.visible[:, j]).tolist()

    def hide(self, scores: Tensor, i: int, j: int) -> Tensor:
        """Sets hidden pairs of tile (i, j), scores (batch, kv_heads, group * rows, keys), to -inf in place."""
        if self.whole[i, j]:
            return scores
        rows, keys = self.rows(i), self.keys(j)
        columns = torch.arange(keys.start, keys.stop, device=scores.device)
        visible = ((columns >= self.first[rows, None]) & (columns < self.last[rows, None]))[None]
        if self.blocks is not None and (pattern := self.problem.mask.blocks):
            lines = torch.arange(rows.start, rows.stop, device=scores.device)
            visible = visible & self.blocks[:, lines // pattern.block_q][:, :, columns // pattern.block_k]
        scores.view(self.problem.batch, self.problem.heads, *visible.shape[1:]).masked_fill_(
            ~visible, float("-inf")
        )
        return scores


class Heads:
    """A BSHD tensor seen as (batch, kv_heads, group, seqlen, dim), read and written by blocks of its rows.

    A block is (batch, kv_heads, group * rows, dim): the query heads of a group are more rows for one K/V head, so
    that grouped K and V are never repeated.
    """

    def __init__(self, tensor: Tensor, kv_heads: int) -> None:
        self.view = tensor.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.view[..., rows, :].flatten(2, 3)

    def __setitem__(self, rows: slice, block: Tensor) -> None:
        target = self.view[..., rows, :]
        target.copy_(block.view(target.shape))

    def add(self, rows: slice, block: Tensor) -> None:
        target = self.view[..., rows, :]
        target.add_(block.view(target.shape))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (.., m, k) times b (.., k, n) of one dtype, accumulated and returned in fp32, or fp64 for fp64."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return out.unflatten(0, a.shape[:2])
    wide = accumulator_dtype(a)
    return a.to(wide) @ b.to(wide)


def accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def exp_minus(x: Tensor, maximum: Tensor) -> Tensor:
    """exp(x - maximum), and 0 rather than NaN where both are -inf: a row that has seen nothing yet."""
    return torch.exp(x - maximum.masked_fill(maximum == float("-inf"), 0))


def divide(x: Tensor, row_sum: Tensor) -> Tensor:
    """x / row_sum, and x (which is 0) where the row has seen nothing."""
    return x / row_sum.masked_fill(row_sum == 0, 1)


def scores(tiles: Tiles, q_block: Tensor, k_block: Tensor, i: int, j: int) -> Tensor:
    """S_ij = scale Q_i K_j^T with hidden pairs at -inf."""
    return tiles.hide(product(q_block, k_block.mT).mul_(tiles.problem.softmax_scale), i, j)


class NoSecondDerivative(torch.autograd.Function):
    """apply(count, *tensors) -> the last ``count`` tensors, depending on all of them; its backward raises."""

    @staticmethod
    def forward(_ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[-count:])

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> Any:
        raise RuntimeError("double backward is not implemented: these gradients cannot be differentiated")


def differentiable_once(
    backward: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Callable[[Any, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Makes dq, dk and dv raise when they are differentiated.

    torch's own once_differentiable returns constants where dO is one, and a gradient penalty is then silently
    ignored (pytorch #116350).
    """

    @wraps(backward)
    def wrapped(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found: tuple[Tensor, ...] = backward(ctx, dout, dlse)
        if torch.is_grad_enabled():  # only under create_graph
            found = NoSecondDerivative.apply(len(found), *ctx.saved_tensors[:3], dout, *found)
        return *found, None

    return wrapped


class FlashAttention1(torch.autograd.Function):
    """apply(q, k, v, tiles) -> out, lse; all BSHD, lse fp32 (batch, heads, seqlen_q) and not differentiable."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Algorithm 2 (without dropout): O, m and l of every row are carried through memory from block to block."""
        problem = tiles.problem
        wide = accumulator_dtype(q)
        out = q.new_zeros(problem.out_shape, dtype=wide)
        maximum = q.new_full((*problem.q_shape[:3], 1), float("-inf"), dtype=wide)
        row_sum = torch.zeros_like(maximum)
        q_rows, k_rows, v_rows, out_rows, m_rows, l_rows = (
            Heads(x, problem.kv_heads) for x in (q, k, v, out, maximum, row_sum)
        )
        for j in range(tiles.visible.shape[1]):
            k_block, v_block = k_rows[tiles.keys(j)], v_rows[tiles.keys(j)]
            for i in tiles.seeing(j):
                rows = tiles.rows(i)
                s = scores(tiles, q_rows[rows], k_block, i, j)
                m_tile = s.amax(dim=-1, keepdim=True)
                p = exp_minus(s, m_tile)
                m_new = torch.maximum(m_rows[rows], m_tile)
                # Line 11 and 12: both parts are brought to the new maximum, and O back from normalised to summed.
                kept, added = l_rows[rows] * exp_minus(m_rows[rows], m_new), exp_minus(m_tile, m_new)
                l_new = kept + added * p.sum(dim=-1, keepdim=True)
                out_rows[rows] = divide(
                    kept * out_rows[rows] + added * product(p.to(v.dtype), v_block), l_new
                )
                m_rows[rows], l_rows[rows] = m_new, l_new
        out = out.to(q.dtype)
        lse = by_row(maximum + row_sum.log())
        ctx.tiles = tiles
        ctx.save_for_backward(q, k, v, out, maximum, row_sum)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 4: P from m and l, and D_i = rowsum(dO_i * O_i) again for every block of K and V."""
        q, k, v, out, maximum, row_sum = ctx.saved_tensors
        tiles = ctx.tiles
        do_rows, out_rows, m_rows, l_rows = (
            Heads(x, tiles.problem.kv_heads) for x in (dout, out, maximum, row_sum)
        )

        def probabilities(s: Tensor, i: int) -> Tensor:
            return divide(exp_minus(s, m_rows[tiles.rows(i)]), l_rows[tiles.rows(i)])

        def delta(i: int) -> Tensor:
            return row_dot(do_rows[tiles.rows(i)], out_rows[tiles.rows(i)])

        return gradients(tiles, q, k, v, dout, probabilities, delta)


class FlashAttention2(torch.autograd.Function):
    """apply(q, k, v, tiles) -> out, lse; all BSHD, lse fp32 (batch, heads, seqlen_q) and not differentiable."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Algorithm 1: a block of Q keeps its accumulator, m and l to itself until it has seen every block of K."""
        problem = tiles.problem
        wide = accumulator_dtype(q)
        out = q.new_empty(problem.out_shape)
        logsumexp = q.new_empty((*problem.q_shape[:3], 1), dtype=wide)
        q_rows, k_rows, v_rows, out_rows, lse_rows = (
            Heads(x, problem.kv_heads) for x in (q, k, v, out, logsumexp)
        )
        for i in range(tiles.visible.shape[0]):
            q_block = q_rows[tiles.rows(i)]
            accumulator = q_block.new_zeros((*q_block.shape[:3], problem.head_dim_v), dtype=wide)
            maximum = q_block.new_full((*q_block.shape[:3], 1), float("-inf"), dtype=wide)
            row_sum = torch.zeros_like(maximum)
            for j in tiles.seen_by(i):
                s = scores(tiles, q_block, k_rows[tiles.keys(j)], i, j)
                m_new = torch.maximum(maximum, s.amax(dim=-1, keepdim=True))
                p = exp_minus(s, m_new)
                kept = exp_minus(maximum, m_new)
                row_sum = kept * row_sum + p.sum(dim=-1, keepdim=True)
                accumulator.mul_(kept).add_(product(p.to(v.dtype), v_rows[tiles.keys(j)]))
                maximum = m_new
            out_rows[tiles.rows(i)] = divide(accumulator, row_sum)
            lse_rows[tiles.rows(i)] = maximum + row_sum.log()
        lse = by_row(logsumexp)
        ctx.tiles = tiles
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 2: P from L alone, and delta of every row before the loop."""
        q, k, v, out, logsumexp = ctx.saved_tensors
        tiles = ctx.tiles
        do_rows, out_rows, lse_rows = (Heads(x, tiles.problem.kv_heads) for x in (dout, out, logsumexp))
        delta = [
            row_dot(do_rows[tiles.rows(i)], out_rows[tiles.rows(i)]) for i in range(tiles.visible.shape[0])
        ]

        def probabilities(s: Tensor, i: int) -> Tensor:
            return exp_minus(s, lse_rows[tiles.rows(i)])

        return gradients(tiles, q, k, v, dout, probabilities, delta.__getitem__)


def gradients(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    probabilities: Callable[[Tensor, int], Tensor],
    delta: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop that both backward passes share: dK_j and dV_j gathered over Q blocks, dQ summed over K blocks.

    probabilities(S_ij, i) recomputes P_ij. With dP = dO V^T and dS = P * (dP - delta): dV = P^T dO,
    dQ = scale dS K, dK = scale dS^T Q.
    """
    problem, scale = tiles.problem, tiles.problem.softmax_scale
    dq = q.new_zeros(problem.q_shape, dtype=accumulator_dtype(q))
    dk, dv = k.new_empty(problem.k_shape), v.new_empty(problem.v_shape)
    q_rows, k_rows, v_rows, do_rows, dq_rows, dk_rows, dv_rows = (
        Heads(x, problem.kv_heads) for x in (q, k, v, dout, dq, dk, dv)
    )
    for j in range(tiles.visible.shape[1]):
        keys = tiles.keys(j)
        k_block, v_block = k_rows[keys], v_rows[keys]
        dk_block, dv_block = (x.new_zeros(x.shape, dtype=dq.dtype) for x in (k_block, v_block))
        for i in tiles.seeing(j):
            q_block, do_block = q_rows[tiles.rows(i)], do_rows[tiles.rows(i)]
            p = probabilities(scores(tiles, q_block, k_block, i, j), i)
            dv_block += product(p.to(dout.dtype).mT, do_block)
            ds = p.mul_(product(do_block, v_block.mT).sub_(delta(i))).to(q.dtype)
            dk_block += product(ds.mT, q_block)
            dq_rows.add(tiles.rows(i), product(ds, k_block))
        dk_rows[keys], dv_rows[keys] = dk_block.mul_(scale), dv_block
    return dq.mul_(scale).to(q.dtype), dk, dv


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """rowsum(a * b) in the accumulator's dtype, last dimension kept."""
    wide = accumulator_dtype(a)
    return (a.to(wide) * b.to(wide)).sum(dim=-1, keepdim=True)


def by_row(statistic: Tensor) -> Tensor:
    """(batch, seqlen_q, heads, 1) to the contract's fp32 (batch, heads, seqlen_q)."""
    return statistic[..., 0].transpose(1, 2).to(torch.float32).contiguous()
