"""Sums of dQ in the order of a wgmma accumulator, and the pass that makes dQ of them.

A tile of 64 queries by columns stands as (column // 8, row // 16, row % 8, column % 8 // 2, row % 16 // 8, column % 2):
of eight columns, all warps of a warpgroup, all lanes of a warp, and the four values of a lane.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnbench.impls.flash_triton.kernels.primitives import store_tile

ROWS = tl.constexpr(64)
"""Queries of a tile: the M of one wgmma."""


@triton.jit(do_not_specialize=["seqlen_q", "row_tiles"])
def dq_from_sums_kernel(
    sums, dq, dq_sb, dq_ss, dq_sh, factor, seqlen_q, row_tiles,  # sums (batch, heads, row_tiles, ROWS * D), dq BSHD
    HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq = factor * sums, for one tile of queries."""
    plane = tl.program_id(0) // row_tiles
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.load(sums + tl.program_id(0).to(tl.int64) * (ROWS * D) + tl.arange(0, ROWS * D))
    tile = tl.permute(tl.reshape(tile, (D // 8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    store_tile(
        dq, tl.reshape(tile, (ROWS, D)) * factor, plane // HEADS, plane % HEADS, row_tile * ROWS, seqlen_q,
        dq_sb, dq_ss, dq_sh, ROWS, D, D,
    )  # fmt: skip
