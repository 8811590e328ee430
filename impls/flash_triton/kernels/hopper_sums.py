"""dQ summed in memory straight from registers, in Gluon; `sums.py` says in which order its elements stand there.

In that order the four values that a thread holds of eight columns are 16 bytes of memory, those of a warp 512: one
instruction adds them, and neither shared memory nor a barrier is in between.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def add_in_order(sums, part):
    """Add (64, columns) fp32 of a wgmma accumulator to as many values from `sums` on."""
    COLS: gl.constexpr = part.shape[1]
    part = gl.reshape(part, [4, 2, 8, COLS // 8, 4, 2])
    part = gl.reshape(gl.permute(part, (3, 0, 2, 4, 1, 5)), [64 * COLS])
    gl.atomic_add(sums + gl.arange(0, 64 * COLS, layout=part.type.layout), part, sem="relaxed")
