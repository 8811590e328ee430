"""What the answer is (fp64), and what the same computation loses in the problem's own dtype (eager).

Both walk the score matrix in blocks of (kv heads, query rows of their group, keys) with the textbook
formulas, S = scale Q K^T, P = softmax(S), O = P V, delta = rowsum(dO O), dS = P (dO V^T - delta), and no
autograd. The query heads of one kv head are stacked as rows, so K and V are never expanded and dK, dV sum
over the group in the product itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from attnbench.harness.oracle.inputs import Inputs, torch_dtype
from attnbench.harness.problem import Problem

SCORE_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
"""Size limit of one block of scores; a backward holds two of them."""
_EXACT_ROWS = 512
"""Rows in one fp64 block: few enough that keys which a causal block cannot see are skipped, not masked."""
LEAST_ROWS = 16
_EDGE = 64


# ---- which rows are judged --------------------------------------------------------------------------------


def judged_rows(problem: Problem, max_pairs: int) -> torch.Tensor:
    """Query rows to judge in every head: all of them, or a sample of the most that keep within ``max_pairs``.

    Sorted int64 on the CPU. The sample has max(16, max_pairs / (batch heads seqlen_k)) rows: the first, the
    last, those around the first and the last row that sees a key, then half of the rest at multiples of 64
    (every common tile height divides into them) -1, 0, +1 spread over the sequence, and random ones, the same
    in every process.
    """
    per_row = problem.batch * problem.heads * problem.seqlen_k
    return _sample(problem, max(LEAST_ROWS, max_pairs // per_row) if per_row else problem.seqlen_q)


def probe_rows(problem: Problem, count: int = 32) -> torch.Tensor:
    """A sample of ``count`` rows drawn as ``judged_rows`` draws, cheap enough to check timed calls with."""
    return _sample(problem, count)


def _sample(problem: Problem, count: int) -> torch.Tensor:
    seqlen = problem.seqlen_q
    if count >= seqlen:
        return torch.arange(seqlen)
    first, last = problem.mask.row_bounds(seqlen, problem.seqlen_k)
    seeing = np.flatnonzero(last > first)
    wanted = [0, seqlen - 1]
    for row in seeing[[0, -1]].tolist() if len(seeing) else []:
        wanted += [row, row - 1, row + 1]
    edges = (seqlen - 1) // _EDGE
    centres = np.unique(np.linspace(1, edges, min(edges, count // 6)).astype(np.int64)) * _EDGE
    for centre in centres.tolist():
        wanted += [centre, centre - 1, centre + 1]
    wanted += np.random.default_rng(0).permutation(seqlen)[:count].tolist()
    unique = dict.fromkeys(row for row in wanted if 0 <= row < seqlen)
    return torch.tensor(sorted(list(unique)[:count]), dtype=torch.int64)


# ---- the answers ------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """rows (R,); out (B, R, H, Dv); lse (B, H, R) natural log, -inf for an empty row (None from ``eager``).

    With a backward dq (B, R, H, D), dk (B, Sk, Hk, D), dv (B, Sk, Hk, Dv), for dout zero outside ``rows``.
    """

    rows: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """The dropout mask of one call. keep: bool (B, H, R, Sk) of the judged rows. scale: of the weights kept."""

    keep: torch.Tensor
    scale: float

    def factors(
        self, b: int, heads: slice, rows: slice, keys: slice, group: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """What P is multiplied by in one block, (n, G r, keys); exact but for the scale's rounding to ``dtype``."""
        return (
            self.keep[b, heads, rows, keys].unflatten(0, (-1, group)).flatten(1, 2).to(dtype).mul_(self.scale)
        )


def reference(
    problem: Problem, inputs: Inputs, rows: torch.Tensor, *, backward: bool, kept: Kept | None = None
) -> Answer:
    """The answer in fp64. A row with nothing to attend to has out 0, lse -inf and gradients 0.

    kept: the mask that a problem with dropout is answered under. ValueError for one without it, and for a backward
    without dout.
    """
    return _solve(problem, inputs, rows, backward, _Exact(problem.softmax_scale), kept)


def eager(
    problem: Problem, inputs: Inputs, rows: torch.Tensor, *, backward: bool, kept: Kept | None = None,
    of_softmax: bool = False,
) -> Answer:  # fmt: skip
    """Materialised attention in the problem's dtype, every intermediate rounded to it: the yardstick of
    error.

    Its backward is the one every flash kernel shares: P again from the scores and the fp32 lse, delta from
    the rounded out. Where softmax saturates or scores are large both lose far more than autograd's softmax
    backward, and are no fault of a kernel. of_softmax: that other backward, P dP - P rowsum(P dP), as torch's CUDA
    kernel rounds it. Raises as ``reference`` does, and RuntimeError if float32 matmuls are below full precision.
    """
    if torch.get_float32_matmul_precision() != "highest":
        raise RuntimeError("the error budget of fp32 needs torch.set_float32_matmul_precision('highest')")
    formulation = _EagerOfSoftmax if of_softmax else _Eager
    arithmetic = formulation(problem.softmax_scale, torch_dtype(problem.dtype))
    return _solve(problem, inputs, rows, backward, arithmetic, kept)


class _Arithmetic(Protocol):
    """One block. Shapes: q, dout (n, G r, .), k, v (n, keys, .), hidden None or bool, to broadcast (n, G, r,
    keys), factors None or what dropout multiplies P by, (n, G r, keys).

    forward keeps what backward needs of the block; backward returns (dq, dk, dv) of it.
    """

    dtype: torch.dtype
    accumulator: torch.dtype
    element_bytes: int
    max_rows: int
    gives_lse: bool

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None,
        factors: torch.Tensor | None, group: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...  # fmt: skip

    def backward(self, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class _Exact:
    dtype = accumulator = torch.float64
    element_bytes = 8
    max_rows = _EXACT_ROWS
    gives_lse = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None,
        factors: torch.Tensor | None, group: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        self.q, self.k, self.v = q * self.scale, k, v
        scores = self.q @ k.mT
        _hide(scores, hidden, group)
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0)
        # P stays unnormalised; 1 / rowsum goes into the narrow out and dO instead of one more pass over P.
        self.p = scores.sub_(top).exp_()
        total = self.p.sum(-1, keepdim=True)
        self.inverse = torch.where(total > 0, 1 / total, 0)
        self.factors = factors
        self.out = (_dropped(self.p, factors) @ v).mul_(self.inverse)
        return self.out, (top + total.log()).squeeze(-1)

    def backward(self, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dout = dout * self.inverse
        delta = (dout * self.out).sum(-1, keepdim=True)
        dv = _dropped(self.p, self.factors).mT @ dout
        ds = _dropped(dout @ self.v.mT, self.factors).sub_(delta).mul_(self.p)
        return (ds @ self.k).mul_(self.scale), ds.mT @ self.q, dv


class _Eager:
    max_rows = 1 << 62
    gives_lse = False

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        self.scale, self.dtype = scale, dtype
        self.accumulator = torch.promote_types(dtype, torch.float32)
        self.element_bytes = self.accumulator.itemsize

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None,
        factors: torch.Tensor | None, group: int,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        self.q, self.k, self.v = q, k, v
        self.scores = (q @ k.mT).mul_(self.scale)
        if self.dtype == torch.float16 and not self.scores.isfinite().all():
            # Overflowed before it was scaled: no yardstick at all. Scaled in the accumulator, it is the best fp16 can.
            self.scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=self.scale)
        _hide(self.scores, hidden, group)
        p = torch.softmax(self.scores, -1)
        if hidden is not None:
            _hide(p, hidden.all(-1, keepdim=True), group, 0.0)
        self.factors, self.p = factors, p
        self.out = _dropped(p, factors) @ v
        return self.out, None

    def backward(self, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = self.scores.to(self.accumulator)
        lse = wide.logsumexp(-1, keepdim=True)
        p = wide.sub_(lse.masked_fill_(lse == -torch.inf, 0)).exp_().to(self.dtype)
        delta = (dout.to(self.accumulator) * self.out).sum(-1, keepdim=True)
        dp = _dropped(dout @ self.v.mT, self.factors).to(self.accumulator)
        ds = dp.sub_(delta).mul_(p).to(self.dtype).mul_(self.scale)
        return ds @ self.k, ds.mT @ self.q, _dropped(p, self.factors).mT @ dout


class _EagerOfSoftmax(_Eager):
    """P dP is rounded before P rowsum(P dP) is taken off it.

    Where a row's P are all equal, so are the errors of that difference in all elements of one binade, and dQ and dK
    add them up instead of averaging them: 4 times the other formulation's error in the mean, on an H200 as computed
    here.
    """

    def backward(self, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        product = self.p * _dropped(dout @ self.v.mT, self.factors)
        total = product.sum(-1, keepdim=True, dtype=self.accumulator)
        ds = product.to(self.accumulator).sub_(self.p * total).to(self.dtype)
        dq, dk = (ds @ self.k).mul_(self.scale), (ds.mT @ self.q).mul_(self.scale)
        return dq, dk, _dropped(self.p, self.factors).mT @ dout


def _hide(scores: torch.Tensor, hidden: torch.Tensor | None, group: int, value: float = -torch.inf) -> None:
    if hidden is not None:
        scores.unflatten(1, (group, -1)).masked_fill_(hidden, value)


def _dropped(x: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """P or dP after dropout, in x's dtype."""
    return x if factors is None else (x * factors).to(x.dtype)


# ---- the walk ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Some judged rows (positions in ``rows``) and the span of keys they can see; masked if not all see all
    of it."""

    rows: slice
    keys: slice
    masked: bool


@torch.no_grad()
def _solve(
    problem: Problem, inputs: Inputs, rows: torch.Tensor, backward: bool, arithmetic: _Arithmetic,
    kept: Kept | None,
) -> Answer:  # fmt: skip
    if problem.dropout_p and kept is None:
        raise ValueError("dropout has no answer without a mask; recover the implementation's own")
    if backward and inputs.dout is None:
        raise ValueError("a backward needs inputs made with dout")
    device, narrow, wide = inputs.q.device, arithmetic.dtype, arithmetic.accumulator
    batch, count, heads = problem.batch, len(rows), problem.heads
    group = heads // problem.kv_heads
    at = rows.to(device)
    answer = Answer(
        rows,
        torch.zeros((batch, count, heads, problem.head_dim_v), dtype=narrow, device=device),
        torch.full((batch, heads, count), -torch.inf, dtype=wide, device=device)
        if arithmetic.gives_lse
        else None,
    )
    if backward:
        answer.dq = torch.zeros((batch, count, heads, problem.head_dim), dtype=narrow, device=device)
        answer.dk = torch.zeros(problem.k_shape, dtype=narrow, device=device)
        answer.dv = torch.zeros(problem.v_shape, dtype=narrow, device=device)
    head_step, blocks = _plan(problem, rows, arithmetic, SCORE_BYTES[device.type])
    for b, start in itertools.product(range(batch), range(0, problem.kv_heads, head_step)):
        kv_heads = slice(start, min(start + head_step, problem.kv_heads))
        q_heads = slice(kv_heads.start * group, kv_heads.stop * group)
        k = inputs.k[b, :, kv_heads].transpose(0, 1).to(narrow).contiguous()
        v = inputs.v[b, :, kv_heads].transpose(0, 1).to(narrow).contiguous()
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for block in blocks:
            chosen = at[block.rows]
            q = _stack(inputs.q[b, :, q_heads].index_select(0, chosen).to(narrow), group)
            hidden = _hidden(problem, chosen, block, kv_heads) if block.masked else None
            factors = None
            if kept is not None:
                factors = kept.factors(b, q_heads, block.rows, block.keys, group, wide)
            out, lse = arithmetic.forward(q, k[:, block.keys], v[:, block.keys], hidden, factors, group)
            answer.out[b, block.rows, q_heads] = _unstack(out, group)
            if answer.lse is not None and lse is not None:
                answer.lse[b, q_heads, block.rows] = lse.unflatten(1, (group, -1)).flatten(0, 1)
            if answer.dq is not None and inputs.dout is not None:
                dout = inputs.dout[b, :, q_heads].index_select(0, chosen).to(narrow)
                block_dq, block_dk, block_dv = arithmetic.backward(_stack(dout, group))
                answer.dq[b, block.rows, q_heads] = _unstack(block_dq, group)
                dk[:, block.keys] += block_dk
                dv[:, block.keys] += block_dv
        if answer.dk is not None and answer.dv is not None:
            answer.dk[b, :, kv_heads] = dk.transpose(0, 1).to(narrow)
            answer.dv[b, :, kv_heads] = dv.transpose(0, 1).to(narrow)
    return answer


def _plan(
    problem: Problem, rows: torch.Tensor, arithmetic: _Arithmetic, limit: int
) -> tuple[int, list[_Block]]:
    """kv heads at a time and blocks of rows whose scores keep within ``limit`` bytes; rows with no key left
    out."""
    elements = limit // arithmetic.element_bytes
    width = max(1, problem.heads // problem.kv_heads * problem.seqlen_k)
    row_step = max(1, min(len(rows), arithmetic.max_rows, elements // width))
    head_step = max(1, min(problem.kv_heads, elements // (width * row_step)))
    first, last = problem.mask.row_bounds(problem.seqlen_q, problem.seqlen_k)
    blocks = []
    for start in range(0, len(rows), row_step):
        at = rows[start : start + row_step].numpy()
        low, high = first[at], last[at]
        if (high > low).any():
            keys = slice(int(low[high > low].min()), int(high[high > low].max()))
            masked = bool(problem.mask.blocks) or low.max() > keys.start or high.min() < keys.stop
            blocks.append(_Block(slice(start, start + len(at)), keys, bool(masked)))
    return head_step, blocks


def _hidden(problem: Problem, rows: torch.Tensor, block: _Block, kv_heads: slice) -> torch.Tensor:
    """Keys of the block that ``rows`` do not see, bool (1 or n, 1 or G, r, keys)."""
    visible = problem.mask.dense(rows, problem.heads, problem.seqlen_q, problem.seqlen_k)[:, :, block.keys]
    if visible.shape[0] == 1:
        return ~visible[None]
    return ~visible.unflatten(0, (problem.kv_heads, -1))[kv_heads]


def _stack(x: torch.Tensor, group: int) -> torch.Tensor:
    """(r, n G, D) to (n, G r, D): a kv head's query heads one under another."""
    return x.unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)


def _unstack(x: torch.Tensor, group: int) -> torch.Tensor:
    """(n, G r, D) to (r, n G, D)."""
    return x.unflatten(1, (group, -1)).permute(2, 0, 1, 3).flatten(1, 2)
