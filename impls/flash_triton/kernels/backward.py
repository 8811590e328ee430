"""Backward: delta, then dK and dV of a tile of keys, then dQ of a tile of queries.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 2. With P = exp(S - LSE), dP = dO V^T and
delta = rowsum(dO * O) - dLSE: dV = P^T dO, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.

`dkdv_kernel` and `dq_kernel` each recompute S and dP: seven products a tile pair, no atomics, and gradients that repeat
bit for bit. S^T and dP^T are computed transposed in `dkdv_kernel`, so that P^T and dS^T are left operands straight from
registers.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnbench.impls.flash_triton.kernels.primitives import (
    LOG2E,
    dropout_keep,
    list_entry,
    load_tile,
    program_order,
    store_tile,
    visible,
    visible_cols,
    visible_rows,
)


@triton.jit(do_not_specialize=["seqlen_q", "rows_padded"])
def delta_kernel(
    out, d_out, lse, d_lse, lse_log2, delta,  # out, d_out BSHD; the rest (batch, heads, rows)
    o_sb, o_ss, o_sh, do_sb, do_ss, do_sh, dl_sb, dl_sh, dl_ss,
    seqlen_q, rows_padded,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE, and LSE in base 2 with +inf where a row saw nothing or does not exist, so that
    exp2(S - LSE) is 0 there and the main kernels need no row mask."""
    tiles = rows_padded // BLOCK_M
    row0 = (tl.program_id(0) % tiles) * BLOCK_M
    plane = tl.program_id(0) // tiles
    batch = plane // HEADS
    head = plane % HEADS
    rows = row0 + tl.arange(0, BLOCK_M)
    inside = rows < seqlen_q
    o = load_tile(out, batch, head, row0, seqlen_q, o_sb, o_ss, o_sh, BLOCK_M, DV, BLOCK_DV, True, False)
    do = load_tile(d_out, batch, head, row0, seqlen_q, do_sb, do_ss, do_sh, BLOCK_M, DV, BLOCK_DV, True, False)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = plane.to(tl.int64) * seqlen_q + rows
    log = tl.load(lse + at, mask=inside, other=float("-inf"))
    if HAS_DLSE:
        dl_ptrs = d_lse + batch.to(tl.int64) * dl_sb + head.to(tl.int64) * dl_sh + rows.to(tl.int64) * dl_ss
        total -= tl.load(dl_ptrs, mask=inside, other=0.0)
    empty = log == float("-inf")
    at_padded = plane.to(tl.int64) * rows_padded + rows
    tl.store(lse_log2 + at_padded, tl.where(empty, float("inf"), log * LOG2E))
    tl.store(delta + at_padded, tl.where(empty, 0.0, total))


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "rows_padded", "shift", "left", "right", "threshold", "tiles",
                               "planes", "planes_per_wave", "mask_batch_rows", "mask_head_rows", "mask_width"])
def dkdv_kernel(
    q, k, v, d_out, lse_log2, delta, rng, partial_count, partial_list, full_count, full_list, dk, dv,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_ss, do_sh,
    dk_sb, dk_ss, dk_sh, dv_sb, dv_ss, dv_sh,
    seqlen_q, seqlen_k, rows_padded, shift, left, right, scale, scale_log2, threshold,
    mask_batch_rows, mask_head_rows, mask_width,
    tiles, planes, planes_per_wave,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EVEN_Q: tl.constexpr, DROPOUT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one (batch, key head), summed over the GROUP query heads that share it.

    The block lists, if any, are the transposed ones: for each key block the query blocks that see it.
    """
    tile, plane = program_order(tl.program_id(0), tiles, planes, planes_per_wave, False)
    batch = plane // (HEADS // GROUP)
    kv_head = plane % (HEADS // GROUP)
    col = tile * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k, batch, kv_head, col, seqlen_k, k_sb, k_ss, k_sh, BLOCK_N, D, BLOCK_D, True, False)
    v_tile = load_tile(v, batch, kv_head, col, seqlen_k, v_sb, v_ss, v_sh, BLOCK_N, DV, BLOCK_DV, True, False)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    last_col = tl.minimum(col + BLOCK_N, seqlen_k) - 1
    lo, hi, full_lo, full_hi = visible_rows(col, last_col, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT)
    # Rows past the end have LSE = +inf and need no mask; keys past the end have no gradient that is stored.
    local = tl.arange(0, BLOCK_M)

    for g in range(GROUP):
        head = kv_head * GROUP + g
        stats = (batch * HEADS + head).to(tl.int64) * rows_padded
        begin = lo // BLOCK_M
        end = tl.cdiv(hi, BLOCK_M)
        partial_steps = 0
        list_start = 0
        if MASK_M > 0:
            list_row = batch * mask_batch_rows + head * mask_head_rows + col // MASK_N
            partial_steps = tl.load(partial_count + list_row) * (MASK_M // BLOCK_M)
            begin = 0
            end = partial_steps + tl.load(full_count + list_row) * (MASK_M // BLOCK_M)
            list_start = list_row.to(tl.int64) * mask_width

        for step in tl.range(begin, end):
            if MASK_M > 0:
                block, sub, is_partial = list_entry(
                    step, partial_steps, partial_list, full_list, list_start, MASK_M // BLOCK_M
                )
                row = block * MASK_M + sub * BLOCK_M
                needs_mask = is_partial & ((row < full_lo) | (row + BLOCK_M > full_hi))
            else:
                row = step * BLOCK_M
                needs_mask = (row < full_lo) | (row + BLOCK_M > full_hi)
            q_tile = load_tile(q, batch, head, row, seqlen_q, q_sb, q_ss, q_sh, BLOCK_M, D, BLOCK_D, not EVEN_Q, TMA)
            do_tile = load_tile(d_out, batch, head, row, seqlen_q, do_sb, do_ss, do_sh, BLOCK_M, DV, BLOCK_DV,
                                not EVEN_Q, TMA)  # fmt: skip
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            p = tl.math.exp2(scores * scale_log2 - tl.load(lse_log2 + stats + row + local)[None, :])
            if HAS_LEFT or HAS_RIGHT:
                if needs_mask:
                    rows = row + local
                    seen = visible(rows[None, :], cols[:, None], seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
                    p = tl.where(seen, p, 0.0)
            d_p = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            p_kept = p
            if DROPOUT:
                plane_of_head = batch * HEADS + head
                keep = tl.trans(dropout_keep(rng, plane_of_head, row, col, threshold, BLOCK_M, BLOCK_N))
                p_kept = tl.where(keep, p, 0.0)
                d_p = tl.where(keep, d_p * (256.0 / threshold), 0.0)
            dv_tile = tl.dot(p_kept.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION)
            d_s = p * (d_p - tl.load(delta + stats + row + local)[None, :])
            d_s = d_s.to(q_tile.dtype)
            dk_tile = tl.dot(d_s, q_tile, dk_tile, input_precision=PRECISION)

    if DROPOUT:
        dv_tile = dv_tile * (256.0 / threshold)
    store_tile(dk, dk_tile * scale, batch, kv_head, col, seqlen_k, dk_sb, dk_ss, dk_sh, BLOCK_N, D, BLOCK_D)
    store_tile(dv, dv_tile, batch, kv_head, col, seqlen_k, dv_sb, dv_ss, dv_sh, BLOCK_N, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "rows_padded", "shift", "left", "right", "threshold", "tiles",
                               "planes", "planes_per_wave", "mask_batch_rows", "mask_head_rows", "mask_width"])
def dq_kernel(
    q, k, v, d_out, lse_log2, delta, rng, partial_count, partial_list, full_count, full_list, dq,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_ss, do_sh, dq_sb, dq_ss, dq_sh,
    seqlen_q, seqlen_k, rows_padded, shift, left, right, scale, scale_log2, threshold,
    mask_batch_rows, mask_head_rows, mask_width,
    tiles, planes, planes_per_wave,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EVEN_K: tl.constexpr, DROPOUT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, HEAVY_LAST: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M query rows of one (batch, head): the forward's walk over key tiles with dS in place of P."""
    tile, plane = program_order(tl.program_id(0), tiles, planes, planes_per_wave, HEAVY_LAST)
    batch = plane // HEADS
    head = plane % HEADS
    kv_head = head // GROUP
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, batch, head, row, seqlen_q, q_sb, q_ss, q_sh, BLOCK_M, D, BLOCK_D, True, False)
    do_tile = load_tile(d_out, batch, head, row, seqlen_q, do_sb, do_ss, do_sh, BLOCK_M, DV, BLOCK_DV, True, False)
    stats = plane.to(tl.int64) * rows_padded
    log = tl.load(lse_log2 + stats + rows)
    delta_rows = tl.load(delta + stats + rows)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    last_row = tl.minimum(row + BLOCK_M, seqlen_q) - 1
    lo, hi, full_lo, full_hi = visible_cols(row, last_row, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
    begin = lo // BLOCK_N
    end = tl.cdiv(hi, BLOCK_N)
    partial_steps = 0
    list_start = 0
    if MASK_M > 0:
        list_row = batch * mask_batch_rows + head * mask_head_rows + row // MASK_M
        partial_steps = tl.load(partial_count + list_row) * (MASK_N // BLOCK_N)
        begin = 0
        end = partial_steps + tl.load(full_count + list_row) * (MASK_N // BLOCK_N)
        list_start = list_row.to(tl.int64) * mask_width

    for step in tl.range(begin, end):
        if MASK_M > 0:
            block, sub, is_partial = list_entry(
                step, partial_steps, partial_list, full_list, list_start, MASK_N // BLOCK_N
            )
            col = block * MASK_N + sub * BLOCK_N
            needs_mask = (is_partial & ((col < full_lo) | (col + BLOCK_N > full_hi))) | (col + BLOCK_N > seqlen_k)
        else:
            col = step * BLOCK_N
            is_partial = True
            needs_mask = (col < full_lo) | (col + BLOCK_N > full_hi)
        k_tile = load_tile(k, batch, kv_head, col, seqlen_k, k_sb, k_ss, k_sh, BLOCK_N, D, BLOCK_D, not EVEN_K, TMA)
        v_tile = load_tile(v, batch, kv_head, col, seqlen_k, v_sb, v_ss, v_sh, BLOCK_N, DV, BLOCK_DV, not EVEN_K, TMA)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        d_p = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale_log2 - log[:, None])
        if HAS_LEFT or HAS_RIGHT or not EVEN_K:
            if needs_mask:
                cols = col + tl.arange(0, BLOCK_N)
                seen = visible(rows[:, None], cols[None, :], seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
                if MASK_M > 0:
                    seen = seen | ((not is_partial) & (cols < seqlen_k))[None, :]
                p = tl.where(seen, p, 0.0)
        if DROPOUT:
            keep = dropout_keep(rng, plane, row, col, threshold, BLOCK_M, BLOCK_N)
            d_p = tl.where(keep, d_p * (256.0 / threshold), 0.0)
        d_s = p * (d_p - delta_rows[:, None])
        dq_tile = tl.dot(d_s.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)

    store_tile(dq, dq_tile * scale, batch, head, row, seqlen_q, dq_sb, dq_ss, dq_sh, BLOCK_M, D, BLOCK_D)
