"""Forward on Hopper: the same algorithm as `forward.py`, warp-specialised in Gluon.

Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), Algorithms 1 and 2. One warp issues the TMA
copies; each of CONSUMERS warpgroups owns 64 query rows. Within a warpgroup the product S = Q K^T of a step
and O += P V of the step before are in flight while the softmax runs; between warpgroups nothing is ordered,
so one's softmax also hides under the other's products. Keys are walked from the right, so that the masked
tiles of a causal row come first and the long run of unmasked ones keeps no mask and no branch: a branch
between an issued product and its wait would serialise it.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnbench.impls.flash_triton.kernels.hopper_dropout import drop_pairs, drop_words
from attnbench.impls.flash_triton.kernels.hopper_pairs import pack_pairs, unpack_pairs
from attnbench.impls.flash_triton.kernels.hopper_tma import load_async, store_async, store_wait
from attnbench.impls.flash_triton.kernels.primitives import (
    list_entry,
    log_sum_exp,
    program_order,
    visible,
    visible_cols,
)

ROWS = gl.constexpr(64)
"""Query rows of a consumer warpgroup: the M of one wgmma."""


@gluon.jit
def col_of_step(step, end, lists, BLOCK_N: gl.constexpr, MASK_N: gl.constexpr):
    """First key of a step's tile: tiles of the band's range from the right, or entries of the two block lists."""
    col = (end - 1 - step) * BLOCK_N
    if MASK_N > 0:
        partial_steps, partial, full, list_start = lists
        block, sub, _ = list_entry(step, partial_steps, partial, full, list_start, MASK_N // BLOCK_N)
        col = block * MASK_N + sub * BLOCK_N
    return col


@gluon.jit
def load_partition(
    buffers, place, lists, consumer: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    EVEN_K: gl.constexpr, BLOCK_N: gl.constexpr, DROPOUT: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """Producer: Q once, then K and V tiles into a ring of buffers as consumers free them."""
    q_desc, k_desc, v_desc, _, q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty = buffers
    batch, head, kv_head, row, begin, end, _, _, _, _, _, _, _, _, _, _ = place
    CONSUMERS: gl.constexpr = q_bufs.shape[0]
    STAGES: gl.constexpr = k_bufs.shape[0]
    mbarrier.expect(q_ready, CONSUMERS * q_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        load_async(q_desc, [batch, head, row + c * ROWS, 0], q_ready, q_bufs.index(c))
    for i in range(gl.maximum(end - begin, 1)):
        col = col_of_step(i, end, lists, BLOCK_N, MASK_N)
        at = i % STAGES
        turn = (i // STAGES) & 1
        mbarrier.wait(k_empty.index(at), turn ^ 1)
        mbarrier.expect(k_ready.index(at), k_desc.block_type.nbytes)
        load_async(k_desc, [batch, kv_head, col, 0], k_ready.index(at), k_bufs.index(at))
        mbarrier.wait(v_empty.index(at), turn ^ 1)
        mbarrier.expect(v_ready.index(at), v_desc.block_type.nbytes)
        load_async(v_desc, [batch, kv_head, col, 0], v_ready.index(at), v_bufs.index(at))


@gluon.jit
def softmax_step(scores, row_max, row_sum, rows, col, seqlen_k, shift, left, right, scale_log2,
                 MASKED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, COLS: gl.constexpr):
    """Online softmax as in `primitives.online_softmax_update`, with the mask first if MASKED: p, max, sum,
    rescale."""
    if MASKED:
        cols = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, scores.type.layout))
        seen = visible(rows[:, None], cols[None, :], seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
        scores = gl.where(seen, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    origin = new_max
    if MASKED:
        origin = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(scores * scale_log2 - origin[:, None])
    rescale = gl.exp2(row_max - origin)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def consume_partition(
    buffers, place, lists, consumer: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    EVEN_K: gl.constexpr, BLOCK_N: gl.constexpr, DROPOUT: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """Consumer: 64 rows of O and LSE."""
    _, _, _, out_desc, q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty = buffers
    batch, head, _, row, begin, end, lse, plane, seqlen_q, seqlen_k, shift, left, right, scale_log2, rng, threshold = (
        place
    )
    D: gl.constexpr = q_bufs.shape[4]
    STAGES: gl.constexpr = k_bufs.shape[0]
    dtype: gl.constexpr = q_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    row += consumer * ROWS
    rows = row + gl.arange(0, ROWS, layout=S_ROWS)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    row_sum = gl.full([ROWS], 0.0, gl.float32, S_ROWS)
    no_scores = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    out = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    q = q_bufs.index(consumer).reshape([ROWS, D])

    # Of the steps 1 .. steps - 1, those of the middle run need no mask, or under block lists none but the end of the
    # keys; step 0 always has its mask.
    steps = gl.maximum(end - begin, 1)
    BANDED: gl.constexpr = HAS_LEFT or HAS_RIGHT
    FIRST: gl.constexpr = 0 if (BANDED if MASK_N > 0 else HAS_RIGHT) else 1
    LAST: gl.constexpr = 2 if HAS_LEFT and MASK_N == 0 else 1
    if MASK_N > 0:
        partial_steps, _, _, _ = lists
        full_begin = gl.minimum(gl.maximum(partial_steps, 1), steps)
        full_end = steps
        # Without any block the one step that is walked sees no key; a full block is outside the band rule.
        limit = gl.where(end > 0, seqlen_k, 0)
        slack = gl.where(partial_steps > 0, 0, 2**29)
    else:
        _, _, full_lo, full_hi = visible_cols(row, row + ROWS - 1, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
        full_begin = gl.minimum(gl.maximum(end - gl.maximum(full_hi, 0) // BLOCK_N, 1), steps)
        full_end = gl.minimum(gl.maximum(end - gl.cdiv(full_lo, BLOCK_N), full_begin), steps)
        limit = seqlen_k
        slack = 0

    col = col_of_step(0, end, lists, BLOCK_N, MASK_N)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    k = k_bufs.index(0).reshape([BLOCK_N, D])
    scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    if DROPOUT:
        gone = drop_words(rng, plane, row, col, threshold, False, BLOCK_N)
    scores = warpgroup_mma_wait(0, deps=(scores, ))
    mbarrier.arrive(k_empty.index(0), count=1)
    p, row_max, row_sum, rescale = softmax_step(
        scores, row_max, row_sum, rows, col, limit, shift, left + slack, right + slack, scale_log2,
        BANDED or not EVEN_K or MASK_N > 0, HAS_LEFT, HAS_RIGHT, BLOCK_N,
    )  # fmt: skip
    pairs = pack_pairs(p, dtype)
    if DROPOUT:
        pairs = drop_pairs(pairs, gone, False)

    for run in gl.static_range(FIRST, LAST + 1):
        run_begin = 1 if run == FIRST else (full_begin if run == 1 else full_end)
        run_end = steps if run == LAST else (full_begin if run == 0 else full_end)
        for i in range(run_begin, run_end):
            at = i % STAGES
            before = (i - 1) % STAGES
            MASKED: gl.constexpr = run != 1 or (MASK_N > 0 and not EVEN_K)
            col = 0
            if MASKED or DROPOUT:
                col = col_of_step(i, end, lists, BLOCK_N, MASK_N)
            mbarrier.wait(k_ready.index(at), (i // STAGES) & 1)
            k = k_bufs.index(at).reshape([BLOCK_N, D])
            scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
            v = v_bufs.index(before).reshape([BLOCK_N, D])
            weights = unpack_pairs(pairs, dtype, P_LAYOUT)
            out = warpgroup_mma(weights, v, out, is_async=True)
            if DROPOUT:
                gone = drop_words(rng, plane, row, col, threshold, False, BLOCK_N)
            scores = warpgroup_mma_wait(1, deps=(scores, ))
            mbarrier.arrive(k_empty.index(at), count=1)
            p, row_max, row_sum, rescale = softmax_step(
                scores, row_max, row_sum, rows, col, seqlen_k, shift, left, right, scale_log2,
                MASKED, HAS_LEFT and run != 1, HAS_RIGHT and run != 1, BLOCK_N,
            )  # fmt: skip
            pairs = pack_pairs(p, dtype)
            if DROPOUT:
                pairs = drop_pairs(pairs, gone, False)
            out, weights = warpgroup_mma_wait(0, deps=(out, weights))
            mbarrier.arrive(v_empty.index(before), count=1)
            out = out * gl.convert_layout(rescale, O_ROWS)[:, None]

    last = steps - 1
    mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
    v = v_bufs.index(last % STAGES).reshape([BLOCK_N, D])
    out = warpgroup_mma(unpack_pairs(pairs, dtype, P_LAYOUT), v, out, is_async=True)
    out = warpgroup_mma_wait(0, deps=(out, ))

    final = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
    if DROPOUT:
        final = final * (256.0 / threshold)
    out = out * gl.convert_layout(final, O_ROWS)[:, None]
    in_q = rows < seqlen_q
    gl.store(lse + plane.to(gl.int64) * seqlen_q + rows, log_sum_exp(row_max, row_sum), mask=in_q)
    # Q is not read any more: its buffer stages the output for one bulk store, which clips rows past the end.
    q.store(out.to(dtype))
    fence_async_shared()
    store_async(out_desc, [batch, head, row, 0], q_bufs.index(consumer))
    store_wait(0)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "shift", "left", "right", "threshold", "tiles", "planes",
                              "planes_per_wave", "mask_batch_rows", "mask_head_rows", "mask_width"])
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse, rng, partial_count, partial_list, full_count, full_list,
    seqlen_q, seqlen_k, shift, left, right, scale_log2, threshold,
    mask_batch_rows, mask_head_rows, mask_width, tiles, planes, planes_per_wave,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    EVEN_K: gl.constexpr, HEAVY_LAST: gl.constexpr, DROPOUT: gl.constexpr, MASK_M: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """out and LSE of 64 * CONSUMERS query rows of one (batch, head). D is a power of two and also the head
    dim of V."""
    tile, plane = program_order(gl.program_id(0), tiles, planes, planes_per_wave, HEAVY_LAST)
    batch = plane // HEADS
    head = plane % HEADS
    kv_head = head // GROUP
    row = tile * (ROWS * CONSUMERS)
    last_row = gl.minimum(row + ROWS * CONSUMERS, seqlen_q) - 1
    lo, hi, _, _ = visible_cols(row, last_row, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
    begin = lo // BLOCK_N
    # Rows that see nothing still walk one tile, wholly masked, so that every barrier has its partner.
    end = gl.maximum(gl.cdiv(hi, BLOCK_N), begin + 1)
    partial_steps = 0
    list_start = 0
    if MASK_M > 0:
        list_row = batch * mask_batch_rows + head * mask_head_rows + row // MASK_M
        partial_steps = gl.load(partial_count + list_row) * (MASK_N // BLOCK_N)
        begin = 0
        end = partial_steps + gl.load(full_count + list_row) * (MASK_N // BLOCK_N)
        list_start = list_row.to(gl.int64) * mask_width

    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    buffers = (q_desc, k_desc, v_desc, out_desc, q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty)
    place = (batch, head, kv_head, row, begin, end, lse, plane, seqlen_q, seqlen_k, shift, left, right, scale_log2,
             rng, threshold)
    lists = (partial_steps, partial_list, full_list, list_start)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume_partition, (buffers, place, lists, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, BLOCK_N, DROPOUT, MASK_N)),
            (consume_partition, (buffers, place, lists, 1, HAS_LEFT, HAS_RIGHT, EVEN_K, BLOCK_N, DROPOUT, MASK_N)),
            (load_partition, (buffers, place, lists, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, BLOCK_N, DROPOUT, MASK_N)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume_partition, (buffers, place, lists, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, BLOCK_N, DROPOUT, MASK_N)),
            (consume_partition, (buffers, place, lists, 1, HAS_LEFT, HAS_RIGHT, EVEN_K, BLOCK_N, DROPOUT, MASK_N)),
            (consume_partition, (buffers, place, lists, 2, HAS_LEFT, HAS_RIGHT, EVEN_K, BLOCK_N, DROPOUT, MASK_N)),
            (load_partition, (buffers, place, lists, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, BLOCK_N, DROPOUT, MASK_N)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
