"""The dropout mask of `primitives.dropout_keep` in Gluon, for a tile in the layout of a wgmma accumulator.

Philox runs once for 16 elements on a grid a quarter the size of the tile each way, spread over one warpgroup; the
bits then cross shared memory once into the accumulator's layout, at a byte an element.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnbench.impls.flash_triton.kernels.primitives import PHILOX_ROUNDS


@gluon.jit
def dropout_keep(rng, plane, row, col, threshold, TRANSPOSED: gl.constexpr, SIZES: gl.constexpr, LAYOUT: gl.constexpr):
    """Bool tile of SIZES, queries by keys, or keys by queries if TRANSPOSED; row and col are multiples of 32."""
    GRID: gl.constexpr = gl.BlockedLayout([1, SIZES[1] // 32], [4, 8], [4, 1], [1, 0])
    first, second = (col, row) if TRANSPOSED else (row, col)
    zero = gl.zeros([SIZES[0] // 4, SIZES[1] // 4], gl.uint32, GRID)
    down = first // 4 + gl.arange(0, SIZES[0] // 4, layout=gl.SliceLayout(1, GRID))
    across = second // 4 + gl.arange(0, SIZES[1] // 4, layout=gl.SliceLayout(0, GRID))
    down = zero + down.to(gl.uint32)[:, None]
    across = zero + across.to(gl.uint32)[None, :]
    i, j = (across, down) if TRANSPOSED else (down, across)
    offset = zero + (gl.load(rng + 1) & 0xFFFFFFFF).to(gl.uint32)
    w0, w1, w2, w3 = tl.philox(gl.load(rng), i, j, zero + plane.to(gl.uint32), offset, PHILOX_ROUNDS)
    words = gl.join(gl.join(w0, w1), gl.join(w2, w3))  # trailing dims: key bit 4, query bit 4
    halves = gl.join(words, words >> 8)  # ..., key bit 3
    bits = gl.join(halves, halves >> 16) & 0xFF  # ..., query bit 3
    patches = gl.reshape(bits < threshold, [SIZES[0] // 32, 8, SIZES[1] // 32, 8, 2, 2, 2, 2])
    if TRANSPOSED:
        keep = gl.permute(patches, (0, 4, 6, 1, 2, 5, 7, 3))
    else:
        keep = gl.permute(patches, (0, 5, 7, 1, 2, 4, 6, 3))
    return gl.convert_layout(gl.reshape(keep, SIZES), LAYOUT)
