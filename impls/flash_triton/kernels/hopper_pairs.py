"""Tiles of 16-bit pairs: two neighbours of a row in one 32-bit register, across a loop.

A 16-bit tile that is carried from one loop into another is carried element by element, and unpacked and packed again in
every step; a tile of pairs is not.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def pack_pairs(x, dtype: gl.constexpr):
    """(rows, columns) fp32 rounded to dtype, as (rows, columns / 2) pairs, the first of a pair in the low half."""
    first, second = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    ROUND: gl.constexpr = "f16x2" if dtype == gl.float16 else "bf16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + ROUND + ".f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def unpack_pairs(pairs, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Pairs as a (rows, columns) tile of dtype in LAYOUT, an operand of a product."""
    first, second = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.uint16, gl.uint16), is_pure=True, pack=1
    )
    x = gl.reshape(gl.join(first, second), [pairs.shape[0], 2 * pairs.shape[1]])
    return gl.convert_layout(x.to(dtype, bitcast=True), LAYOUT)
