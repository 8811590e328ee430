"""How many elements each algorithm moves between slow and fast memory: leading and lower terms, no approximation.

Written from the algorithms' loops, for what ``two_level.TwoLevelMemory`` counts while they run. N and K are seqlen_q
and seqlen_k, d and e head_dim and head_dim_v, M the fast memory's size; Bc = ceil(M / 4d) rows stay, T = ceil(K / Bc).
With the full mask a K/V block is met by all N rows, T times over: visits = T N. Each function returns what one pass
moves over all batches and heads.
"""

from __future__ import annotations

import numpy as np

from attnbench.harness.problem import Problem
from attnbench.harness.two_level import Accesses


def visits(problem: Problem, block: tuple[int, int]) -> tuple[int, int]:
    """Rows of Q met by blocks of K, summed over the blocks; and keys met by blocks of Q. block: rows of Q, of K."""
    rows, keys = problem.seqlen_q, problem.seqlen_k
    if problem.mask.kind == "full":
        return -(-keys // block[1]) * rows, -(-rows // block[0]) * keys
    tiles = np.logical_or.reduce(problem.mask.tiles(problem.heads, rows, keys, *block)[0])
    in_q, in_k = (
        np.diff(np.append(np.arange(0, n, size), n)) for n, size in ((rows, block[0]), (keys, block[1]))
    )
    return int((tiles * in_q[:, None]).sum()), int((tiles * in_k).sum())


def flash_attention_1_forward(problem: Problem, block: tuple[int, int]) -> Accesses:
    """reads K(d + e) + visits (d + e + 2); writes N(e + 2), to begin with, + visits (e + 2). Theta(N^2 d^2 / M)."""
    n, k, d, e = _sizes(problem)
    rows = problem.heads * visits(problem, block)[0]
    return _over_batch(problem, k * (d + e) + rows * (d + e + 2), (n + rows) * (e + 2))


def flash_attention_1_backward(problem: Problem, block: tuple[int, int]) -> Accesses:
    """reads K(d + e) + visits (2d + 2e + 2), Q, dQ, O, dO, m and l; writes Nd + visits d + K(d + e)."""
    n, k, d, e = _sizes(problem)
    rows = problem.heads * visits(problem, block)[0]
    return _over_batch(problem, k * (d + e) + rows * (2 * d + 2 * e + 2), (n + rows) * d + k * (d + e))


def flash_attention_2_forward(problem: Problem, block: tuple[int, int]) -> Accesses:
    """reads Nd + visits (d + e), now of keys by blocks of Q; writes N(e + 1)."""
    n, _, d, e = _sizes(problem)
    keys = problem.kv_heads * visits(problem, block)[1]
    return _over_batch(problem, n * d + keys * (d + e), n * (e + 1))


def flash_attention_2_backward(problem: Problem, block: tuple[int, int]) -> Accesses:
    """Before the loop reads 2Ne, writes N. Then reads K(d + e) + visits (2d + e + 2), Q, dQ, dO, L and D; writes
    Nd + visits d + K(d + e)."""
    n, k, d, e = _sizes(problem)
    rows = problem.heads * visits(problem, block)[0]
    reads = 2 * n * e + k * (d + e) + rows * (2 * d + e + 2)
    return _over_batch(problem, reads, n + (n + rows) * d + k * (d + e))


def standard_forward(problem: Problem, stays: int) -> Accesses:
    """reads Kd + TNd (S = QK^T) + 2NK (softmax) + NK + ceil(N/Bc) Ke (O = PV); writes 2NK + Ne. Theta(Nd + N^2)
    while d^2 is at most about M."""
    n, k, d, e = _sizes(problem)
    of_keys, of_rows = -(-problem.seqlen_k // stays), -(-problem.seqlen_q // stays)
    pairs = n * problem.seqlen_k
    return _over_batch(problem, k * d + of_keys * n * d + 3 * pairs + of_rows * k * e, 2 * pairs + n * e)


def standard_backward(problem: Problem, stays: int) -> Accesses:
    """reads NK + TNe (dV), Ke + TNe (dP), 4NK (dS), NK + ceil(N/Bc) Kd (dQ), NK + TNd (dK); writes 2NK (dP, dS), and
    dQ, dK, dV."""
    n, k, d, e = _sizes(problem)
    of_keys, of_rows = -(-problem.seqlen_k // stays), -(-problem.seqlen_q // stays)
    pairs = n * problem.seqlen_k
    reads = 7 * pairs + k * e + of_keys * n * (2 * e + d) + of_rows * k * d
    return _over_batch(problem, reads, 2 * pairs + n * d + k * (d + e))


def _sizes(problem: Problem) -> tuple[int, int, int, int]:
    """Rows of all query heads, rows of all key heads, head_dim, head_dim_v."""
    rows, keys = problem.heads * problem.seqlen_q, problem.kv_heads * problem.seqlen_k
    return rows, keys, problem.head_dim, problem.head_dim_v


def _over_batch(problem: Problem, reads: int, writes: int) -> Accesses:
    return Accesses(problem.batch * reads, problem.batch * writes)
