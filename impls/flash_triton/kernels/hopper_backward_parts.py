"""What the two backward kernels for Hopper share: the walk over query tiles, their producer, and the mask.

A program owns some keys of one (batch, key head) and walks the query tiles that see them, for each query head of the
group in turn: a range of tiles under a band, entries of the transposed block lists under a block mask.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attnbench.impls.flash_triton.kernels.hopper_dropout import ROWS, leave_words, random_state
from attnbench.impls.flash_triton.kernels.hopper_tma import load_async
from attnbench.impls.flash_triton.kernels.primitives import list_entry


@gluon.jit
def steps_of_head(lists, head, place, MASK_M: gl.constexpr, MASK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """(begin, end, partial_steps, list_start) of a query head: steps of the band's range, or of the two lists."""
    batch, _, col, begin, end, _, _, _, _ = place
    partial_steps = 0
    list_start = 0
    if MASK_M > 0:
        partial_count, _, full_count, _, batch_rows, head_rows, width = lists
        list_row = batch * batch_rows + head * head_rows + col // MASK_N
        partial_steps = gl.load(partial_count + list_row) * (MASK_M // BLOCK_M)
        begin = 0
        end = partial_steps + gl.load(full_count + list_row) * (MASK_M // BLOCK_M)
        list_start = list_row.to(gl.int64) * width
    return begin, end, partial_steps, list_start


@gluon.jit
def row_of_step(step, partial_steps, lists, list_start, MASK_M: gl.constexpr, BLOCK_M: gl.constexpr):
    """First query of a step's tile."""
    row = step * BLOCK_M
    if MASK_M > 0:
        _, partial, _, full, _, _, _ = lists
        block, sub, _ = list_entry(step, partial_steps, partial, full, list_start, MASK_M // BLOCK_M)
        row = block * MASK_M + sub * BLOCK_M
    return row


@gluon.jit
def next_step(cursor, lists, place, GROUP: gl.constexpr, MASK_M: gl.constexpr, MASK_N: gl.constexpr,
              BLOCK_M: gl.constexpr):  # fmt: skip
    """The step after (head in group, step, end, partial_steps, list_start), which may be the next head's first."""
    g, step, end, partial_steps, list_start = cursor
    _, kv_head, _, _, _, _, _, _, _ = place
    step += 1
    while (step >= end) & (g + 1 < GROUP):
        g += 1
        step, end, partial_steps, list_start = steps_of_head(
            lists, kv_head * GROUP + g, place, MASK_M, MASK_N, BLOCK_M
        )
    return g, step, end, partial_steps, list_start


@gluon.jit
def first_step(lists, place, GROUP: gl.constexpr, MASK_M: gl.constexpr, MASK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """The program's first step, as `next_step` gives it."""
    _, kv_head, _, _, _, _, _, _, _ = place
    step, end, partial_steps, list_start = steps_of_head(lists, kv_head * GROUP, place, MASK_M, MASK_N, BLOCK_M)
    return next_step((0, step - 1, end, partial_steps, list_start), lists, place, GROUP, MASK_M, MASK_N, BLOCK_M)


@gluon.jit
def all_steps(lists, place, GROUP: gl.constexpr, MASK_M: gl.constexpr, MASK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """Steps of the whole program."""
    _, kv_head, _, begin, end, _, _, _, _ = place
    total = (end - begin) * GROUP
    if MASK_M > 0:
        total = 0
        for g in range(GROUP):
            _first, steps, _partial, _start = steps_of_head(lists, kv_head * GROUP + g, place, MASK_M, MASK_N, BLOCK_M)
            total += steps
    return total


@gluon.jit
def row_values(buffer, LAYOUT: gl.constexpr):
    """A (1, columns) buffer as a row of a tile in LAYOUT."""
    x = gl.reshape(buffer.load(LAYOUT), [buffer.shape[1]])
    return gl.convert_layout(x, gl.SliceLayout(0, LAYOUT), assert_trivial=True)


@gluon.jit
def keep_between(p, local, cols, row, seqlen_k, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """p where the band rule lets query row + local see key cols, else 0: the test is lowest <= local <= highest.

    Written in PTX to tie each comparison to its element: left to itself, the compiler makes all comparisons while the
    products are in flight and keeps 32 results in registers that the accumulators need. Of local, bits 1 and 2 are the
    lane's and go to the bounds; the rest then is a constant of the instruction, not a register.
    """
    lane = (local & 6)[None, :]
    place = (local & ~6)[None, :]
    lowest = gl.where(cols < seqlen_k, -(2**30), 2**30)
    if HAS_RIGHT:
        lowest = gl.where(cols < seqlen_k, cols - (row + shift + right), 2**30)
    if HAS_LEFT:
        highest = cols - (row + shift - left)
        kept = gl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ge.s32 inside, $2, $3;
            setp.le.and.s32 inside, $2, $4, inside;
            selp.f32 $0, $1, 0f00000000, inside;
            }""",
            "=f,f,r,r,r",
            [p, place, lowest[:, None] - lane, highest[:, None] - lane],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        kept = gl.inline_asm_elementwise(
            "{ .reg .pred inside; setp.ge.s32 inside, $2, $3; selp.f32 $0, $1, 0f00000000, inside; }",
            "=f,f,r,r",
            [p, place, lowest[:, None] - lane],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return kept


@gluon.jit
def load_partition(state, consumer: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
                   HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr, DROPOUT: gl.constexpr,
                   MASK_M: gl.constexpr, MASK_N: gl.constexpr):  # fmt: skip
    """Producer: K and V once, then Q and LSE, dO and delta of the query tiles of every head of the group.

    Under DROPOUT four warps, which draw for all consumers whom it drops: the words, in the exchange's last buffers, are
    with dO in a slot of the same number behind the same two barriers.
    """
    descriptors, buffers, barriers, exchange, place, lists, band = state
    q_desc, k_desc, v_desc, do_desc, stats_desc, _, _, _ = descriptors
    q_bufs, k_buf, v_buf, do_bufs, log_bufs, delta_bufs = buffers
    kv_ready, q_ready, q_empty, do_ready, do_empty = barriers
    batch, kv_head, col, _, _, heads, planes, _, _ = place
    STAGES: gl.constexpr = q_bufs.shape[0]
    STATS: gl.constexpr = stats_desc.block_type.nbytes
    if DROPOUT:
        _, _, _, _, _, rng, threshold = band
        random = random_state(rng)
        TILES: gl.constexpr = exchange[-1].shape[0] // STAGES
    mbarrier.expect(kv_ready, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    load_async(k_desc, [batch, kv_head, col, 0], kv_ready, k_buf)
    load_async(v_desc, [batch, kv_head, col, 0], kv_ready, v_buf)
    i = 0
    for g in range(GROUP):
        head = kv_head * GROUP + g
        plane = batch * heads + head
        begin, end, partial_steps, list_start = steps_of_head(lists, head, place, MASK_M, MASK_N, BLOCK_M)
        for step in range(begin, end):
            row = row_of_step(step, partial_steps, lists, list_start, MASK_M, BLOCK_M)
            at = i % STAGES
            turn = (i // STAGES) & 1
            mbarrier.wait(q_empty.index(at), turn ^ 1)
            mbarrier.expect(q_ready.index(at), q_desc.block_type.nbytes + STATS)
            load_async(q_desc, [batch, head, row, 0], q_ready.index(at), q_bufs.index(at))
            load_async(stats_desc, [plane, row], q_ready.index(at), log_bufs.index(at))
            mbarrier.wait(do_empty.index(at), turn ^ 1)
            mbarrier.expect(do_ready.index(at), do_desc.block_type.nbytes + STATS)
            load_async(do_desc, [batch, head, row, 0], do_ready.index(at), do_bufs.index(at))
            load_async(stats_desc, [planes + plane, row], do_ready.index(at), delta_bufs.index(at))
            if DROPOUT:
                for c in gl.static_range(TILES):
                    words = exchange[-1].index(at * TILES + c)
                    leave_words(words, random, plane, row, col + ROWS * c, threshold, True)
                mbarrier.arrive(do_ready.index(at), count=1)
            i += 1
