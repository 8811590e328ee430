"""Softmax and attention piece by piece: the equations that FlashAttention is made of, a few lines each.

MG18: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
RS21: Rabe and Staats, Self-attention does not need O(n^2) memory (arXiv 2112.05682).
FA1, FA2: Dao et al. 2022 (arXiv 2205.14135); Dao 2023 (arXiv 2307.08691).

Scores are (..., rows, keys). What is known of each row is (..., rows, 1): m, the maximum so far, and l, the sum of
exp(score - m). A row that has seen nothing has m = -inf and l = 0, and its softmax is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Weigh = Callable[[Tensor], Tensor]
"""P (..., rows, keys) to P V (..., rows, dim)."""


# ---- softmax: from what overflows to what is streamed ----------------------------------------------------------


def naive_softmax(x: Tensor) -> Tensor:
    """exp(x_i) / sum_j exp(x_j), MG18 Algorithm 1. Infinite once a score passes 88.72 in fp32 (11.09 in fp16)."""
    e = torch.exp(x)
    return e / e.sum(dim=-1, keepdim=True)


def safe_softmax(x: Tensor) -> Tensor:
    """exp(x_i - m) / sum_j exp(x_j - m), MG18 Algorithm 2. Reads x three times: for m, for the sum, for the result."""
    m = x.amax(dim=-1, keepdim=True)
    l = exp_minus(x, m).sum(dim=-1, keepdim=True)
    return divide(exp_minus(x, m), l)


def online_softmax(x: Tensor) -> Tensor:
    """MG18 Algorithm 3. Reads x twice: m and l come out of one pass over its columns."""
    m, l = normaliser(x.split(1, dim=-1))
    return divide(exp_minus(x, m), l)


def normaliser(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """m and l of rows given piece by piece, at least one: l' = l exp(m - m') + sum exp(x - m') (MG18 Algorithm 3,
    lines 4 and 5)."""
    pieces = iter(pieces)
    first = next(pieces)
    m = first.amax(dim=-1, keepdim=True)
    l = exp_minus(first, m).sum(dim=-1, keepdim=True)
    for x in pieces:
        m, kept, p = raise_maximum(m, x)
        l = kept * l + p.sum(dim=-1, keepdim=True)
    return m, l


def raise_maximum(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum with the scores x seen too: m' = max(m, max x), exp(m - m') for what was summed, exp(x - m')."""
    m_new = torch.maximum(m, x.amax(dim=-1, keepdim=True))
    return m_new, exp_minus(m, m_new), exp_minus(x, m_new)


# ---- attention: the same recurrence with O beside l ------------------------------------------------------------


class Rows(NamedTuple):
    """What is known of a block of query rows after some of the keys: m, l, and o = sum exp(score - m) v, undivided."""

    m: Tensor
    l: Tensor
    o: Tensor

    def finish(self) -> tuple[Tensor, Tensor]:
        """out = o / l and lse = m + log l (FA2 Algorithm 1, lines 12 and 13); 0 and -inf for a row without keys."""
        return divide(self.o, self.l), self.m + self.l.log()


def nothing_seen(q_block: Tensor, dim: int, dtype: torch.dtype) -> Rows:
    """Rows before their first key: m = -inf, l = 0, o = 0 of ``dim`` columns."""
    m = q_block.new_full((*q_block.shape[:-1], 1), float("-inf"), dtype=dtype)
    return Rows(m, torch.zeros_like(m), q_block.new_zeros((*q_block.shape[:-1], dim), dtype=dtype))


def of_tile(s: Tensor, weigh: Weigh) -> Rows:
    """Rows that have seen one tile of scores and nothing else (FA1 Algorithm 1, line 10)."""
    m = s.amax(dim=-1, keepdim=True)
    p = exp_minus(s, m)
    return Rows(m, p.sum(dim=-1, keepdim=True), weigh(p))


def merge(a: Rows, b: Rows) -> Rows:
    """The same rows after the keys of both (FA1 Algorithm 1, lines 11 and 12; MG18 section 3.1 for m and l).
    Associative and commutative: tiles may be taken in any order, or apart and then together, as split-k does."""
    m = torch.maximum(a.m, b.m)
    keep_a, keep_b = exp_minus(a.m, m), exp_minus(b.m, m)
    return Rows(m, keep_a * a.l + keep_b * b.l, keep_a * a.o + keep_b * b.o)


def absorb(rows: Rows, s: Tensor, weigh: Weigh) -> Rows:
    """merge(rows, of_tile(s)) with one exp a score (FA2 Algorithm 1, lines 9 and 10). Writes over ``rows.o``."""
    m, kept, p = raise_maximum(rows.m, s)
    return Rows(m, kept * rows.l + p.sum(dim=-1, keepdim=True), rows.o.mul_(kept).add_(weigh(p)))


def streamed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in one pass over the keys, one at a time, holding no row of scores (RS21 section 2).

    q (..., rows, d), k (..., keys, d), v (..., keys, dv) to out (..., rows, dv) and lse (..., rows, 1).
    """
    rows = nothing_seen(q, v.shape[-1], q.dtype)
    for k_j, v_j in zip(k.split(1, dim=-2), v.split(1, dim=-2), strict=True):
        rows = absorb(rows, q @ k_j.mT * scale, partial(torch.matmul, other=v_j))
    return rows.finish()


# ---- backward: P again from the scores and one number a row -----------------------------------------------------


def probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """P = exp(S - L): recomputed, never stored (FA2 Algorithm 2, line 11)."""
    return exp_minus(s, lse)


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """D = rowsum(dO * O), which is rowsum(P * dP) without P (FA1 appendix B.2)."""
    wide = accumulator_dtype(dout)
    return (dout.to(wide) * out.to(wide)).sum(dim=-1, keepdim=True)


def score_gradient(p: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
    """dS = P * (dP - D), the softmax's Jacobian applied row by row (FA2 Algorithm 2, line 14). Writes over both."""
    return p.mul_(dp.sub_(delta))


# ---- the two places where a row that sees nothing would make NaN -------------------------------------------------


def exp_minus(x: Tensor, maximum: Tensor) -> Tensor:
    """exp(x - maximum), and 0 rather than NaN where both are -inf: a row that has seen nothing yet."""
    return torch.exp(x - maximum.masked_fill(maximum == float("-inf"), 0))


def divide(x: Tensor, row_sum: Tensor) -> Tensor:
    """x / row_sum, and x (which is 0) where the row has seen nothing."""
    return x / row_sum.masked_fill(row_sum == 0, 1)


def accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
