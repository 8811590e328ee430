"""Small device helpers that carry the meaning of attention; every kernel of this package is built from them.

Positions are absolute: `row` is a query index, `col` a key index of the same sequence, never a tile index.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def program_order(pid, tiles, planes, planes_per_wave, HEAVY_LAST: tl.constexpr):
    """(tile, plane) of a program: planes go wave by wave so that a wave's operands stay in L2, tiles
    outermost within it.

    HEAVY_LAST reverses the tiles, so that under a causal mask the longest rows start first and the short
    ones fill the tail.
    """
    wave = pid // (tiles * planes_per_wave)
    first_plane = wave * planes_per_wave
    planes_here = tl.minimum(planes - first_plane, planes_per_wave)
    within = pid - wave * tiles * planes_per_wave
    tile = within // planes_here
    plane = first_plane + within % planes_here
    if HEAVY_LAST:
        tile = tiles - 1 - tile
    return tile, plane


@triton.jit
def load_tile(src, batch, head, row, rows, stride_b, stride_s, stride_h, ROWS: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr, TMA: tl.constexpr):
    """(ROWS, BLOCK_D) tile of a BSHD tensor from `row` on, zero outside its `rows` x D; src is a descriptor
    if TMA."""
    if TMA:
        tile = src.load([batch, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        local = tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)
        # The scalar part moves with the loop; the tensor part does not and is hoisted out of it.
        start = src + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_s
        ptrs = start + (local.to(tl.int64)[:, None] * stride_s + d[None, :])
        inside = row + local < rows
        if CHECK_ROWS and D != BLOCK_D:
            tile = tl.load(ptrs, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        elif CHECK_ROWS:
            tile = tl.load(ptrs, mask=inside[:, None], other=0.0)
        elif D != BLOCK_D:
            tile = tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(dst, tile, batch, head, row, rows, stride_b, stride_s, stride_h, ROWS: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Write the part of a (ROWS, BLOCK_D) tile that lies inside `rows` x D of a BSHD tensor."""
    local = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    start = dst + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_s
    ptrs = start + (local.to(tl.int64)[:, None] * stride_s + d[None, :])
    tl.store(ptrs, tile.to(dst.dtype.element_ty), mask=(row + local < rows)[:, None] & (d < D)[None, :])


@triton.jit
def visible(rows, cols, cols_total, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The band rule row + shift - left <= col <= row + shift + right, and col inside the sequence; broadcasts."""
    # Two bounds in one: a comparison less for each element.
    seen = cols <= tl.minimum(rows + shift + right, cols_total - 1) if HAS_RIGHT else cols < cols_total
    if HAS_LEFT:
        seen = seen & (cols >= rows + shift - left)
    return seen


@triton.jit
def empty_from_0(lo, hi):
    """(lo, hi), or (0, 0) if that range is empty: rounded to tiles it may still be one, past the end of the operands,
    and garbage times a masked 0 is NaN."""
    return tl.where(lo < hi, lo, 0), tl.where(lo < hi, hi, 0)


@triton.jit
def visible_cols(first_row, last_row, cols_total, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """(lo, hi, full_lo, full_hi): columns some row of the range sees, and columns that every row of it sees; lo and hi
    are 0 where no column is seen."""
    lo = 0
    hi = cols_total
    full_lo = 0
    full_hi = cols_total
    if HAS_RIGHT:
        hi = tl.minimum(hi, last_row + shift + right + 1)
        full_hi = tl.minimum(full_hi, first_row + shift + right + 1)
    if HAS_LEFT:
        lo = tl.maximum(lo, first_row + shift - left)
        full_lo = tl.maximum(full_lo, last_row + shift - left)
    lo, hi = empty_from_0(lo, hi)
    return lo, hi, full_lo, full_hi


@triton.jit
def visible_rows(first_col, last_col, rows_total, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """(lo, hi, full_lo, full_hi): rows that see some column of the range, and rows that see every column of it; lo and
    hi are 0 where no row sees any."""
    lo = 0
    hi = rows_total
    full_lo = 0
    full_hi = rows_total
    if HAS_RIGHT:
        lo = tl.maximum(lo, first_col - shift - right)
        full_lo = tl.maximum(full_lo, last_col - shift - right)
    if HAS_LEFT:
        hi = tl.minimum(hi, last_col - shift + left + 1)
        full_hi = tl.minimum(full_hi, first_col - shift + left + 1)
    lo, hi = empty_from_0(lo, hi)
    return lo, hi, full_lo, full_hi


@triton.jit
def online_softmax_update(scores, row_max, row_sum, scale_log2):
    """One step of the online softmax in base 2 (FlashAttention-2, Alg. 1 lines 8-10): p, max, sum, rescale
    of the past.

    A row that has seen nothing keeps max -inf; measuring it from 0 instead makes its p and rescale 0, not NaN.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(scores * scale_log2 - origin[:, None])
    rescale = tl.math.exp2(row_max - origin)
    return p, new_max, row_sum * rescale + tl.sum(p, 1), rescale


@triton.jit
def log_sum_exp(row_max, row_sum):
    """Natural-log LSE from the base-2 running max and sum; -inf for a row that saw nothing."""
    empty = row_sum == 0.0
    lse = (row_max + tl.math.log2(tl.where(empty, 1.0, row_sum))) * LN2
    return tl.where(empty, float("-inf"), lse)


@triton.jit
def list_entry(step, partial_count, partial, full, row_start, SUBTILES: tl.constexpr):
    """Block-sparse walk: (block, subtile, is_partial) of a step; the partial list comes first, then the full one."""
    is_partial = step < partial_count
    within = tl.where(is_partial, step, step - partial_count)
    at = row_start + within // SUBTILES
    # One of the two loads is masked off; both lists are small and stay in L1.
    block = tl.load(partial + at, mask=is_partial, other=0) + tl.load(full + at, mask=step >= partial_count, other=0)
    return block, within % SUBTILES, is_partial


@triton.jit
def dropout_keep(rng, plane, row, col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) bool, true where an element survives dropout; row and col must be multiples of 32.

    The contract is `attnbench.impls.flash_api.dropout_keep_mask`: one Philox call yields the 16 bytes of rows
    i, i+8, i+16, i+24 by cols j, j+8, j+16, j+24 of a 32 x 32 patch.
    """
    seed = tl.load(rng)
    zero = tl.zeros((ROWS // 4, COLS // 4), tl.uint32)
    i = zero + (row // 4 + tl.arange(0, ROWS // 4)).to(tl.uint32)[:, None]
    j = zero + (col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    plane_word = zero + plane.to(tl.uint32)
    offset_word = zero + (tl.load(rng + 1) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, i, j, plane_word, offset_word, PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # trailing dims: col bit 4, row bit 4
    halves = tl.join(words, words >> 8)  # ..., col bit 3
    bits = tl.join(halves, halves >> 16) & 0xFF  # ..., row bit 3
    keep = bits < threshold
    keep = tl.reshape(keep, (ROWS // 32, 8, COLS // 32, 8, 2, 2, 2, 2))
    keep = tl.permute(keep, (0, 5, 7, 1, 2, 4, 6, 3))
    return tl.reshape(keep, (ROWS, COLS))
