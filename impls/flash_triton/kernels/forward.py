"""Forward: out and LSE of a tile of query rows, and the merge of split key ranges.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691), Algorithm 1; split keys: Flash-Decoding, merged by LSE.
One program owns BLOCK_M query rows of one (batch, head) and walks the key tiles that some of its rows see. Tiles that
every row sees skip the mask; which ones do is decided by two scalar compares, so the steady loop has one body and its
load pipeline is never drained between masked and unmasked tiles.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnbench.impls.flash_triton.kernels.primitives import (
    dropout_keep,
    list_entry,
    load_tile,
    log_sum_exp,
    online_softmax_update,
    program_order,
    visible,
    visible_cols,
)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "shift", "left", "right", "threshold", "tiles", "planes",
                               "planes_per_wave", "mask_batch_rows", "mask_head_rows", "mask_width"])
def forward_kernel(
    q, k, v, out, lse, rng, partial_count, partial_list, full_count, full_list,  # inputs and outputs
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, o_ss, o_sh, o_split,  # strides in elements
    seqlen_q, seqlen_k, shift, left, right, scale_log2, threshold,  # problem
    mask_batch_rows, mask_head_rows, mask_width,  # where a (batch, head) starts in the block lists
    tiles, planes, planes_per_wave,  # schedule
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EVEN_K: tl.constexpr, DROPOUT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, PACK: tl.constexpr, SPLITS: tl.constexpr, HEAVY_LAST: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, i, h] = softmax(scale q k^T) v and its LSE.

    PACK puts the GROUP query heads of a key head into one tile, row = GROUP * query + head, so that decode
    reads K and V once. SPLITS > 1 gives each program a share of the keys; out and lse then have a leading
    split dimension. MASK_M > 0 walks block lists instead of the band's range.
    """
    tile, plane = program_order(tl.program_id(0), tiles, planes, planes_per_wave, HEAVY_LAST)
    local = tl.arange(0, BLOCK_M)
    packed_rows = tile * BLOCK_M + local
    if PACK:
        batch = plane // (HEADS // GROUP)
        kv_head = plane % (HEADS // GROUP)
        rows = packed_rows // GROUP
        heads = kv_head * GROUP + packed_rows % GROUP
        first_row = tile * BLOCK_M // GROUP
        last_row = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    else:
        batch = plane // HEADS
        head = plane % HEADS
        kv_head = head // GROUP
        rows = packed_rows
        heads = head + tl.zeros((BLOCK_M,), tl.int32)
        first_row = tile * BLOCK_M
        last_row = tl.minimum(first_row + BLOCK_M, seqlen_q) - 1

    d = tl.arange(0, BLOCK_D)
    in_q = rows < seqlen_q
    q_rows = rows.to(tl.int64) * q_ss + heads.to(tl.int64) * q_sh
    q_ptrs = q + batch.to(tl.int64) * q_sb + q_rows[:, None] + d[None, :]
    q_tile = tl.load(q_ptrs, mask=in_q[:, None] & (d < D)[None, :], other=0.0)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)

    # The steps of this program: tiles of the band's range, or entries of the two block lists.
    lo, hi, full_lo, full_hi = visible_cols(first_row, last_row, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
    begin = lo // BLOCK_N
    end = tl.cdiv(hi, BLOCK_N)
    partial_steps = 0
    list_start = 0
    if MASK_M > 0:
        list_row = batch * mask_batch_rows + (plane % HEADS) * mask_head_rows + first_row // MASK_M
        partial_steps = tl.load(partial_count + list_row) * (MASK_N // BLOCK_N)
        begin = 0
        end = partial_steps + tl.load(full_count + list_row) * (MASK_N // BLOCK_N)
        list_start = list_row.to(tl.int64) * mask_width
    if SPLITS > 1:
        share = tl.cdiv(end - begin, SPLITS)
        begin = begin + tl.program_id(1) * share
        end = tl.minimum(begin + share, end)

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
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if HAS_LEFT or HAS_RIGHT or not EVEN_K:
            if needs_mask:
                cols = col + tl.arange(0, BLOCK_N)
                seen = visible(rows[:, None], cols[None, :], seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
                if MASK_M > 0:
                    # A full block is outside the band rule.
                    seen = seen | ((not is_partial) & (cols < seqlen_k))[None, :]
                scores = tl.where(seen, scores, float("-inf"))
        p, row_max, row_sum, rescale = online_softmax_update(scores, row_max, row_sum, scale_log2)
        if DROPOUT:
            keep = dropout_keep(rng, plane, tile * BLOCK_M, col, threshold, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        acc = acc * rescale[:, None]
        v_tile = load_tile(v, batch, kv_head, col, seqlen_k, v_sb, v_ss, v_sh, BLOCK_N, DV, BLOCK_DV, not EVEN_K, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    final = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    if DROPOUT:
        final = final * (256.0 / threshold)
    acc = acc * final[:, None]

    dv = tl.arange(0, BLOCK_DV)
    # A split's results go to its own slice of the two workspaces.
    split = tl.program_id(1).to(tl.int64)
    o_rows = rows.to(tl.int64) * o_ss + heads.to(tl.int64) * o_sh
    o_ptrs = out + split * o_split + batch.to(tl.int64) * o_sb + o_rows[:, None] + dv[None, :]
    tl.store(o_ptrs, acc.to(out.dtype.element_ty), mask=in_q[:, None] & (dv < DV)[None, :])
    lse_planes = (split * (planes * GROUP if PACK else planes) + batch * HEADS).to(tl.int64) + heads
    tl.store(lse + lse_planes * seqlen_q + rows, log_sum_exp(row_max, row_sum), mask=in_q)


@triton.jit(do_not_specialize=["seqlen_q", "splits", "lse_split"])
def merge_kernel(
    parts, lse_parts, out, lse,
    o_sb, o_ss, o_sh, o_split, lse_split, seqlen_q, splits,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row: out = sum_s exp(lse_s - lse) out_s with lse = log sum_s exp(lse_s)."""
    row = tl.program_id(0) % seqlen_q
    plane = tl.program_id(0) // seqlen_q
    s = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_DV)
    in_s = s < splits
    lse_at = plane.to(tl.int64) * seqlen_q + row
    logs = tl.load(lse_parts + s.to(tl.int64) * lse_split + lse_at, mask=in_s, other=float("-inf"))
    top = tl.max(logs, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(logs - origin)
    total = tl.sum(weights, 0)
    at = (plane // HEADS).to(tl.int64) * o_sb + row.to(tl.int64) * o_ss + (plane % HEADS).to(tl.int64) * o_sh
    tile = tl.load(
        parts + at + s.to(tl.int64)[:, None] * o_split + dv[None, :],
        mask=in_s[:, None] & (dv < DV)[None, :], other=0.0,
    )  # fmt: skip
    merged = tl.sum(tile * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + at + dv, merged.to(out.dtype.element_ty), mask=dv < DV)
    tl.store(lse + lse_at, tl.where(total == 0.0, float("-inf"), origin + tl.log(tl.where(total == 0.0, 1.0, total))))
