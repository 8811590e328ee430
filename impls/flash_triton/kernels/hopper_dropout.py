"""Dropout in Gluon, for a tile in the layout of a wgmma accumulator: the mask of `primitives.dropout_keep`.

A lane of an accumulator owns rows i and i + 8 of the sixteen of its warp, so half of the 16 bytes of each Philox call
that covers them; the same lane of another warp owns the other half. Where shared memory has room, the producer makes
each call once and leaves its words where the two lanes read them: `leave_words`, `left_words`. Where it has none, both
lanes make the call: `drop_words`. A word is compared whole, its four bytes side by side: the highest bit of each then
says whether its element is dropped, and PRMT spreads that bit into a mask.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnbench.impls.flash_triton.kernels.primitives import PHILOX_ROUNDS

ROWS = gl.constexpr(64)
"""Rows of a tile: the M of one wgmma."""


@gluon.constexpr_function
def words_layout(columns):
    """(32, columns) words or calls of a 64-row tile, each with the lane whose elements it decides.

    Rows are the tile's without bit 3; columns too lack bit 3, those of calls also bit 4.
    """
    registers = [[0, 1], *([0, 8 * 2**i] for i in range((columns // 8).bit_length() - 1))]
    return gl.DistributedLinearLayout(
        registers, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, columns]
    )


@gluon.jit
def wide_product(a, b):
    """(high, low) words of a 32-bit product, by one IMAD.WIDE: asked for apart, the high word is a slow IMAD.HI."""
    return gl.inline_asm_elementwise(
        "{ .reg .b64 both; mul.wide.u32 both, $2, $3; mov.b64 {$1, $0}, both; }",
        "=r,=r,r,r",
        [a, b],
        dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def philox(seed, c0, c1, c2, c3):
    """The four words of Philox4x32 for a counter, as `tl.philox` gives them."""
    k0 = (seed & 0xFFFFFFFF).to(gl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(gl.uint32)
    for _ in gl.static_range(PHILOX_ROUNDS):
        high_a, low_a = wide_product(c0, 0xD2511F53)
        high_b, low_b = wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@gluon.jit
def high_bits(words, threshold):
    """Words whose bytes have the high bit where they are at least the threshold, so where their element is dropped.

    Tested in the 7 low bits of a byte, by a sum that cannot carry out: for a threshold up to 128 if the sum or the byte
    has the high bit, above if both have. The majority with a third word of ones or zeros is both.
    """
    sums = (words & 0x7F7F7F7F) + (-threshold & 0x7F).to(gl.uint32) * 0x01010101
    either = gl.where(threshold <= 128, -1, 0).to(gl.uint32)
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xE8;", "=r,r,r,r", [sums, words, either], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def random_state(rng):
    """(key, counter word) of all calls of Philox, from int64 (seed, offset) in memory: to be read once, since a load is
    not moved over a barrier."""
    return gl.load(rng), (gl.load(rng + 1) & 0xFFFFFFFF).to(gl.uint32)


@gluon.jit
def call_words(state, plane, down, across, TRANSPOSED: gl.constexpr, LAYOUT: gl.constexpr):
    """The four words of every call of a tile, whose counters run down and across it."""
    seed, offset = state
    zero = gl.zeros([down.shape[0], across.shape[0]], gl.uint32, LAYOUT)
    down = zero + down.to(gl.uint32)[:, None]
    across = zero + across.to(gl.uint32)[None, :]
    i, j = (across, down) if TRANSPOSED else (down, across)
    return philox(seed, i, j, zero + plane.to(gl.uint32), zero + offset)


@gluon.jit
def drop_words(state, plane, row, col, threshold, TRANSPOSED: gl.constexpr, COLS: gl.constexpr):
    """Who is dropped of 64 queries by COLS keys, or of 64 keys by COLS queries if TRANSPOSED: the high bits of bytes.

    row and col are multiples of 32.
    """
    CALLS: gl.constexpr = words_layout(COLS // 4)
    first, second = (col, row) if TRANSPOSED else (row, col)
    down = gl.arange(0, 32, layout=gl.SliceLayout(1, CALLS))
    upper = (down // 8 % 2)[:, None] == 0  # bit 4 of the tile's row
    across = second // 4 + gl.arange(0, COLS // 4, layout=gl.SliceLayout(0, CALLS))
    w0, w1, w2, w3 = call_words(state, plane, first // 4 + down // 16 * 8 + down % 8, across, TRANSPOSED, CALLS)
    # Word 2 a + b is for bit 4 of the query a and of the key b. The tile's row has one of them, the column the other.
    words = gl.join(gl.where(upper, w0, w1 if TRANSPOSED else w2), gl.where(upper, w2 if TRANSPOSED else w1, w3))
    words = gl.permute(gl.reshape(words, [32, COLS // 32, 8, 2]), (0, 1, 3, 2))
    words = gl.convert_layout(gl.reshape(words, [32, COLS // 2]), words_layout(COLS // 2), assert_trivial=True)
    return high_bits(words, threshold)


@gluon.constexpr_function
def shared_calls_layout(columns):
    """(16, columns) calls of a 64-row tile over four warps, none made twice but where 8 columns are too few for them.

    Lanes are those of `words_layout`, so that the words of a call go where its lane or the same lane of another warp
    reads them.
    """
    registers = [[0, 1], *([0, 8 * 2**i] for i in range((columns // 16).bit_length() - 1))]
    other_half = [0, columns // 2 if columns > 8 else 0]
    return gl.DistributedLinearLayout(
        registers, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], other_half], [], [16, columns]
    )


@gluon.constexpr_function
def shared_words_layout(columns):
    """Words as they stand in shared memory, (columns // 16, 32, 4, 4), each with the lane whose elements it decides."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], *([2**i, 0, 0, 0] for i in range((columns // 16).bit_length() - 1))]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[0, 8, 0, 0], [0, 16, 0, 0]], [], [columns // 16, 32, 4, 4]
    )


@gluon.jit
def word_buffers(TILES: gl.constexpr, COLS: gl.constexpr):
    """Shared memory for the words of some tiles of 64 rows."""
    IN_ORDER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    return gl.allocate_shared_memory(gl.uint32, [TILES, COLS // 32, 32, 4, 4], IN_ORDER)


@gluon.jit
def leave_words(memory, state, plane, row, col, threshold, TRANSPOSED: gl.constexpr):
    """The words of `drop_words`, by four warps into one of `word_buffers`."""
    COLS: gl.constexpr = 32 * memory.shape[0]
    CALLS: gl.constexpr = shared_calls_layout(COLS // 4)
    first, second = (col, row) if TRANSPOSED else (row, col)
    down = first // 4 + gl.arange(0, 16, layout=gl.SliceLayout(1, CALLS))
    across = second // 4 + gl.arange(0, COLS // 4, layout=gl.SliceLayout(0, CALLS))
    w0, w1, w2, w3 = call_words(state, plane, down, across, TRANSPOSED, CALLS)
    # Trailing dims: bit 4 of the tile's column and of its row.
    words = gl.join(gl.join(w0, w2), gl.join(w1, w3)) if TRANSPOSED else gl.join(gl.join(w0, w1), gl.join(w2, w3))
    words = gl.permute(gl.reshape(words, [2, 8, COLS // 32, 4, 2, 2, 2]), (2, 0, 6, 1, 3, 5, 4))
    memory.store(high_bits(gl.reshape(words, [COLS // 32, 32, 4, 4]), threshold))


@gluon.jit
def left_words(memory):
    """What `leave_words` left, as `drop_words` gives it."""
    COLS: gl.constexpr = 32 * memory.shape[0]
    words = memory.load(shared_words_layout(COLS // 2))
    words = gl.permute(gl.reshape(words, [COLS // 32, 32, 4, 2, 2]), (1, 0, 3, 2, 4))
    return gl.convert_layout(gl.reshape(words, [32, COLS // 2]), words_layout(COLS // 2), assert_trivial=True)


@gluon.jit
def unfold(x, WIDTH: gl.constexpr, TRANSPOSED: gl.constexpr):
    """(rows / 2, columns / 2, key bit, query bit) to (rows, columns), the bits above the lowest 8 and WIDTH of them."""
    ROWS: gl.constexpr = x.shape[0]
    COLS: gl.constexpr = x.shape[1]
    x = gl.reshape(x, [ROWS // 8, 8, COLS // WIDTH, WIDTH, 2, 2])
    x = gl.permute(x, (0, 4, 1, 2, 5, 3)) if TRANSPOSED else gl.permute(x, (0, 5, 1, 2, 4, 3))
    return gl.reshape(x, [2 * ROWS, 2 * COLS])


@gluon.jit
def spread(words, WIDTH: gl.constexpr, TRANSPOSED: gl.constexpr, LAYOUT: gl.constexpr):
    """For each element, or each pair of a tile in LAYOUT its word, and which byte of it is its own."""
    quads = gl.join(gl.join(words, words), gl.join(words, words))
    zero = gl.full_like(words, 0)
    own_byte = gl.join(gl.join(zero, zero + 1), gl.join(zero + 2, zero + 3))  # trailing dims: key bit 3, query bit 3
    quads = gl.convert_layout(unfold(quads, WIDTH, TRANSPOSED), LAYOUT, assert_trivial=True)
    own_byte = gl.convert_layout(unfold(own_byte, WIDTH, TRANSPOSED), LAYOUT, assert_trivial=True)
    return quads, own_byte


@gluon.jit
def drop_pairs(pairs, words, TRANSPOSED: gl.constexpr):
    """`hopper_pairs` with 0 where dropped; a pair is of two neighbours, and so are the words that decide it."""
    LAYOUT: gl.constexpr = pairs.type.layout
    first, second = gl.split(gl.reshape(words, [words.shape[0], words.shape[1] // 2, 2]))
    first, own_byte = spread(first, 4, TRANSPOSED, LAYOUT)
    second, _ = spread(second, 4, TRANSPOSED, LAYOUT)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 gone; prmt.b32 gone, $2, $3, $4; lop3.b32 $0, $1, gone, 0, 0x30; }",
        "=r,r,r,r,r",
        [pairs, first, second, 0xCC88 + 0x1111 * own_byte],
        dtype=gl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def drop_single(x, words, TRANSPOSED: gl.constexpr, LAYOUT: gl.constexpr):
    """An fp32 tile in LAYOUT with 0 where dropped."""
    quads, own_byte = spread(words, 8, TRANSPOSED, LAYOUT)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 gone; prmt.b32 gone, $2, 0, $3; lop3.b32 $0, $1, gone, 0, 0x30; }",
        "=r,r,r,r",
        [x, quads, 0x8888 + 0x1111 * own_byte],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
