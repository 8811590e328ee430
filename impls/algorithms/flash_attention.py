"""FlashAttention and FlashAttention-2, forward and backward, one tile of all heads at a time.

FlashAttention1: Dao et al. 2022 (arXiv 2205.14135), Algorithms 2 and 4: K/V blocks outside, Q blocks inside, O
rescaled and normalised at every step, row statistics m and l kept for the backward pass.
FlashAttention2: Dao 2023 (arXiv 2307.08691), Algorithms 1 and 2: Q blocks outside, an accumulator divided by l
once at the end, L = m + log l kept, D = rowsum(dO * O) computed before the backward loop.

Operands of matrix products are in the problem's dtype, as they are on tensor cores; sums and statistics are in
fp32 (fp64 for fp64). Memory beyond inputs and results is one tile of scores and fp32 accumulators of Q's, or of one
K/V block's, size: linear in the sequence length. Every function loads a block once where it needs it, and writes back
what it changed: ``closed_forms`` counts these accesses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnbench.impls.algorithms.once import differentiable_once
from attnbench.impls.algorithms.online_softmax import (
    Rows,
    Weigh,
    absorb,
    accumulator_dtype,
    divide,
    merge,
    nothing_seen,
    of_tile,
    probabilities,
    row_delta,
    score_gradient,
)
from attnbench.impls.algorithms.tile_dropout import TileDropout
from attnbench.impls.algorithms.tiles import Tiles, by_row, product

Statistics = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Tile i of Q and its block of dO to the rows' lse and delta."""


class FlashAttention1(torch.autograd.Function):
    """apply(q, k, v, tiles, backward tiles) -> out BSHD, and lse, fp32 (batch, heads, seqlen_q), a constant."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, backward_tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 2: O, m and l of every row are carried through memory from block to block."""
        wide = accumulator_dtype(q)
        dropout = TileDropout.draw(tiles.problem.dropout_p)
        out = q.new_zeros(tiles.problem.out_shape, dtype=wide)
        maximum = q.new_full((*tiles.problem.q_shape[:3], 1), float("-inf"), dtype=wide)
        row_sum = torch.zeros_like(maximum)
        q_rows, k_rows, v_rows = (tiles.heads(x) for x in (q, k, v))
        out_rows, m_rows, l_rows = (tiles.heads(x, written=True) for x in (out, maximum, row_sum))
        for j in range(tiles.visible.shape[1]):
            k_block, v_block = k_rows[tiles.keys(j)], v_rows[tiles.keys(j)]
            for i in tiles.seeing(j):
                at = tiles.rows(i)
                s = scores(tiles, q_rows[at], k_block, i, j)
                l_before = l_rows[at]
                before = Rows(
                    m_rows[at], l_before, l_before * out_rows[at]
                )  # O back from normalised to summed
                after = merge(before, of_tile(s, by(v_block, dropout, i, j)))
                out_rows[at], m_rows[at], l_rows[at] = divide(after.o, after.l), after.m, after.l
        out = out.to(q.dtype)
        ctx.tiles, ctx.dropout = backward_tiles, dropout
        ctx.save_for_backward(q, k, v, out, maximum, row_sum)
        lse = by_row(maximum + row_sum.log())
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 4: L from m and l, and D_i = rowsum(dO_i * O_i), again for every block of K and V."""
        q, k, v, out, maximum, row_sum = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        out_rows, m_rows, l_rows = (tiles.heads(x) for x in (out, maximum, row_sum))

        def statistics(i: int, do_block: Tensor) -> tuple[Tensor, Tensor]:
            at = tiles.rows(i)
            return m_rows[at] + l_rows[at].log(), row_delta(do_block, out_rows[at])

        return gradients(tiles, q, k, v, dout, statistics, ctx.dropout)


class FlashAttention2(torch.autograd.Function):
    """apply(q, k, v, tiles, backward tiles) -> out BSHD, and lse, fp32 (batch, heads, seqlen_q), a constant."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, backward_tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 1: a block of Q keeps its accumulator, m and l to itself until it has seen every block of K."""
        wide = accumulator_dtype(q)
        dropout = TileDropout.draw(tiles.problem.dropout_p)
        out = q.new_empty(tiles.problem.out_shape)
        logsumexp = q.new_empty((*tiles.problem.q_shape[:3], 1), dtype=wide)
        q_rows, k_rows, v_rows, out_rows, lse_rows = (tiles.heads(x) for x in (q, k, v, out, logsumexp))
        for i in range(tiles.visible.shape[0]):
            q_block = q_rows[tiles.rows(i)]
            rows = nothing_seen(q_block, tiles.problem.head_dim_v, wide)
            for j in tiles.seen_by(i):
                s = scores(tiles, q_block, k_rows[tiles.keys(j)], i, j)
                rows = absorb(rows, s, by(v_rows[tiles.keys(j)], dropout, i, j))
            out_rows[tiles.rows(i)], lse_rows[tiles.rows(i)] = rows.finish()
        ctx.tiles, ctx.dropout = backward_tiles, dropout
        ctx.save_for_backward(q, k, v, out, logsumexp)
        lse = by_row(logsumexp)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Algorithm 2: P from L alone, and D of every row before the loop."""
        q, k, v, out, logsumexp = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        delta = torch.empty_like(logsumexp)
        do_rows, out_rows, lse_rows, delta_rows = (tiles.heads(x) for x in (dout, out, logsumexp, delta))
        for i in range(tiles.visible.shape[0]):
            at = tiles.rows(i)
            delta_rows[at] = row_delta(do_rows[at], out_rows[at])

        def statistics(i: int, _do_block: Tensor) -> tuple[Tensor, Tensor]:
            return lse_rows[tiles.rows(i)], delta_rows[tiles.rows(i)]

        return gradients(tiles, q, k, v, dout, statistics, ctx.dropout)


def gradients(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    statistics: Statistics,
    dropout: TileDropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop that both backward passes share: dK_j and dV_j gathered over Q blocks, dQ summed over K blocks.

    With P recomputed from the rows' lse, dP = dO V^T and dS = P * (dP - D): dV = P^T dO, dQ = scale dS K,
    dK = scale dS^T Q. With dropout dV takes the P that was kept, and dP passes through the same mask.
    """
    scale = tiles.problem.softmax_scale
    dq = q.new_zeros(tiles.problem.q_shape, dtype=accumulator_dtype(q))
    dk, dv = k.new_empty(tiles.problem.k_shape), v.new_empty(tiles.problem.v_shape)
    q_rows, k_rows, v_rows, do_rows, dk_rows, dv_rows = (tiles.heads(x) for x in (q, k, v, dout, dk, dv))
    dq_rows = tiles.heads(dq, written=True)
    for j in range(tiles.visible.shape[1]):
        keys = tiles.keys(j)
        k_block, v_block = k_rows[keys], v_rows[keys]
        dk_block, dv_block = (x.new_zeros(x.shape, dtype=dq.dtype) for x in (k_block, v_block))
        for i in tiles.seeing(j):
            q_block, do_block = q_rows[tiles.rows(i)], do_rows[tiles.rows(i)]
            lse, delta = statistics(i, do_block)
            p = probabilities(scores(tiles, q_block, k_block, i, j), lse)
            dv_block += product(dropout(p, i, j).to(dout.dtype).mT, do_block)
            ds = score_gradient(p, dropout(product(do_block, v_block.mT), i, j), delta).to(q.dtype)
            dk_block += product(ds.mT, q_block)
            dq_rows.add(tiles.rows(i), product(ds, k_block).mul_(scale))
        dk_rows[keys], dv_rows[keys] = dk_block.mul_(scale), dv_block
    return dq.to(q.dtype), dk, dv


def scores(tiles: Tiles, q_block: Tensor, k_block: Tensor, i: int, j: int) -> Tensor:
    """S_ij = scale Q_i K_j^T with hidden pairs at -inf."""
    return tiles.hide(product(q_block, k_block.mT).mul_(tiles.problem.softmax_scale), i, j)


def by(v_block: Tensor, dropout: TileDropout, i: int, j: int) -> Weigh:
    """P to P V_j, with P of tile (i, j) after dropout and rounded to V's dtype."""
    return lambda p: product(dropout(p, i, j).to(v_block.dtype), v_block)
