"""Backward on Hopper for wide heads: dK in one warpgroup, dV in the other, and half of dQ's columns in each, in Gluon.

At head_dim 256 dK and dV of 64 keys fill the registers of a warpgroup each. So one computes S^T = K Q^T, P and
dV += P^T dO, the other dP^T = V dO^T, dS and dK += dS^T Q. P changes hands, and FUSED dS, in the inputs' type through
shared memory: rings of two, so that neither warpgroup waits for the other's step. dQ of a step is computed in the next
one, whose products leave time for dS to arrive, and added to memory from the registers; the rings leave no shared
memory to stage it in. Not FUSED, dQ is `backward.dq_kernel`'s: there are no atomics, and gradients repeat bit for bit.
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

from attnbench.impls.flash_triton.kernels.hopper_backward_parts import (
    all_steps,
    first_step,
    keep_between,
    load_partition,
    next_step,
    row_of_step,
    row_values,
)
from attnbench.impls.flash_triton.kernels.hopper_dropout import drop_single, drop_words, random_state
from attnbench.impls.flash_triton.kernels.hopper_sums import add_in_order
from attnbench.impls.flash_triton.kernels.hopper_tma import store_async, store_wait
from attnbench.impls.flash_triton.kernels.primitives import program_order, visible_rows

KEYS = gl.constexpr(64)
"""Keys of a program: the M of one wgmma."""
CONSUMERS = gl.constexpr(2)


@gluon.jit
def tile_of_step(row, g, sums, place, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """The number of a step's tile of queries among the tiles of all heads, as the sums of dQ are ordered."""
    batch, kv_head, _, _, _, heads, _, _, _ = place
    _, row_tiles = sums
    return (batch * heads + kv_head * GROUP + g) * row_tiles + row // BLOCK_M


@gluon.jit
def tile_at(cursor, lists, sums, place, GROUP: gl.constexpr, MASK_M: gl.constexpr, BLOCK_M: gl.constexpr):
    """The same of the step that `next_step` is at."""
    g, step, _end, partial_steps, list_start = cursor
    row = row_of_step(step, partial_steps, lists, list_start, MASK_M, BLOCK_M)
    return tile_of_step(row, g, sums, place, GROUP, BLOCK_M)


@gluon.jit
def add_dq(i, tile, sums, k_buf, ds_ring, consumer: gl.constexpr, BLOCK_M: gl.constexpr):
    """Add half the columns of dS K of step i to the sums of its tile."""
    first_sum, _ = sums
    ds_bufs, ds_ready, ds_empty = ds_ring
    D: gl.constexpr = k_buf.shape[3]
    HALF: gl.constexpr = D // CONSUMERS
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ring = i % 2
    mbarrier.wait(ds_ready.index(ring), (i // 2) & 1)
    k_half = k_buf.reshape([KEYS, D]).slice(consumer * HALF, HALF, dim=1)
    no_dq = gl.zeros([BLOCK_M, HALF], gl.float32, DQ_LAYOUT)
    part = warpgroup_mma(ds_bufs.index(ring).permute((1, 0)), k_half, no_dq, use_acc=False, is_async=True)
    part = warpgroup_mma_wait(0, deps=(part, ))
    mbarrier.arrive(ds_empty.index(ring), count=1)
    add_in_order(first_sum + tile.to(gl.int64) * (BLOCK_M * D) + consumer * BLOCK_M * HALF, part)


@gluon.jit
def weigh(scores, log, gone, row, exempt, place, band, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
          EVEN_K: gl.constexpr, DROPOUT: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """(P with the dropped elements 0, P with their sign set) of a tile of scores.

    An exempt tile, of a full block, is outside the band rule. Keys past the end are masked too: their K is 0, but an
    infinite P would make their share of dQ NaN.
    """
    _, _, col, _, _, _, _, _, seqlen_k = place
    shift, left, right, _, scale_log2, _, _ = band
    p = gl.exp2(scores * scale_log2 - log[None, :])
    if HAS_LEFT or HAS_RIGHT or not EVEN_K:
        local = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        cols = col + gl.arange(0, scores.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        slack = gl.where(exempt, 2**29, 0)
        last = 2**30 if EVEN_K else seqlen_k
        p = keep_between(p, local, cols, row, last, shift, left + slack, right + slack, HAS_LEFT, HAS_RIGHT)
    kept = p
    signed = p
    if DROPOUT:
        kept = drop_single(p, gone, True, LAYOUT)
        signed = kept + (kept - p)
    return kept, signed


@gluon.jit
def value_partition(state, consumer: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
                    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr, DROPOUT: gl.constexpr,
                    MASK_M: gl.constexpr, MASK_N: gl.constexpr, FUSED: gl.constexpr):  # fmt: skip
    """Consumer: S, P and dV, and dQ's first half; S of a step runs with dV of the step before."""
    descriptors, buffers, barriers, exchange, place, lists, band = state
    _, _, _, _, _, _, dv_desc, _ = descriptors
    q_bufs, k_buf, _, do_bufs, log_bufs, _ = buffers
    kv_ready, q_ready, q_empty, do_ready, do_empty = barriers
    p_ring, ds_ring, sums = exchange
    p_bufs, p_ready, p_empty = p_ring
    batch, kv_head, col, _, _, heads, _, _, _ = place
    _, _, _, _, _, rng, threshold = band
    D: gl.constexpr = k_buf.shape[3]
    STAGES: gl.constexpr = q_bufs.shape[0]
    dtype: gl.constexpr = q_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, V_LAYOUT, 2)

    k = k_buf.reshape([KEYS, D])
    dv_tile = gl.zeros([KEYS, D], gl.float32, V_LAYOUT)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    total = all_steps(lists, place, GROUP, MASK_M, MASK_N, BLOCK_M)

    mbarrier.wait(kv_ready, 0)
    if total > 0:
        cursor = first_step(lists, place, GROUP, MASK_M, MASK_N, BLOCK_M)
        g, step, _end, partial_steps, list_start = cursor
        row = row_of_step(step, partial_steps, lists, list_start, MASK_M, BLOCK_M)
        exempt = (MASK_M > 0) & (step >= partial_steps)
        mbarrier.wait(q_ready.index(0), 0)
        q = q_bufs.index(0).reshape([BLOCK_M, D])
        log = row_values(log_bufs.index(0), S_LAYOUT)
        scores = warpgroup_mma(k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        gone = 0
        if DROPOUT:
            plane = batch * heads + kv_head * GROUP + g
            gone = drop_words(random_state(rng), plane, row, col, threshold, True, BLOCK_M)
        scores = warpgroup_mma_wait(0, deps=(scores, ))
        mbarrier.arrive(q_empty.index(0), count=1)
        kept, signed = weigh(
            scores, log, gone, row, exempt, place, band, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, S_LAYOUT
        )  # fmt: skip
        p_bufs.index(0).store(signed.to(dtype))
        mbarrier.arrive(p_ready.index(0), count=1)
        weights = gl.convert_layout(kept.to(dtype), LEFT_OPERAND)
        tile = tile_of_step(row, g, sums, place, GROUP, BLOCK_M)
        for i in range(1, total):
            at = i % STAGES
            before = (i - 1) % STAGES
            cursor = next_step(cursor, lists, place, GROUP, MASK_M, MASK_N, BLOCK_M)
            g, step, _end, partial_steps, list_start = cursor
            row = row_of_step(step, partial_steps, lists, list_start, MASK_M, BLOCK_M)
            exempt = (MASK_M > 0) & (step >= partial_steps)
            mbarrier.wait(q_ready.index(at), (i // STAGES) & 1)
            q = q_bufs.index(at).reshape([BLOCK_M, D])
            log = row_values(log_bufs.index(at), S_LAYOUT)
            scores = warpgroup_mma(k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(do_ready.index(before), ((i - 1) // STAGES) & 1)
            do = do_bufs.index(before).reshape([BLOCK_M, D])
            dv_tile = warpgroup_mma(weights, do, dv_tile, is_async=True)
            if DROPOUT:
                plane = batch * heads + kv_head * GROUP + g
                gone = drop_words(random_state(rng), plane, row, col, threshold, True, BLOCK_M)
            scores = warpgroup_mma_wait(1, deps=(scores, ))
            mbarrier.arrive(q_empty.index(at), count=1)
            kept, signed = weigh(
                scores, log, gone, row, exempt, place, band, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, S_LAYOUT
            )  # fmt: skip
            ring = i % 2
            mbarrier.wait(p_empty.index(ring), ((i // 2) & 1) ^ 1)
            p_bufs.index(ring).store(signed.to(dtype))
            mbarrier.arrive(p_ready.index(ring), count=1)
            dv_tile, weights = warpgroup_mma_wait(0, deps=(dv_tile, weights))
            mbarrier.arrive(do_empty.index(before), count=1)
            weights = gl.convert_layout(kept.to(dtype), LEFT_OPERAND)
            if FUSED:
                add_dq(i - 1, tile, sums, k_buf, ds_ring, consumer, BLOCK_M)
                tile = tile_of_step(row, g, sums, place, GROUP, BLOCK_M)
        last = total - 1
        mbarrier.wait(do_ready.index(last % STAGES), (last // STAGES) & 1)
        do = do_bufs.index(last % STAGES).reshape([BLOCK_M, D])
        dv_tile = warpgroup_mma(weights, do, dv_tile, is_async=True)
        dv_tile = warpgroup_mma_wait(0, deps=(dv_tile, ))
        if FUSED:
            add_dq(last, tile, sums, k_buf, ds_ring, consumer, BLOCK_M)

    if DROPOUT:
        dv_tile = dv_tile * (256.0 / threshold)
    # Not FUSED, K is read by this warpgroup alone, and not any more. FUSED, the other may still read it, but no dO: of
    # the last one it made the dS that this warpgroup has seen.
    staged = do_bufs.index(0) if FUSED else k_buf
    staged.reshape([KEYS, D]).store(dv_tile.to(dtype))
    fence_async_shared()
    store_async(dv_desc, [batch, kv_head, col, 0], staged)
    store_wait(0)


@gluon.jit
def score_gradient(d_p, p, delta_rows, keep_rate, DROPOUT: gl.constexpr):
    """dS, under dropout times keep_rate, from dP and the P that the other partition hands over."""
    p = p.to(gl.float32)
    if DROPOUT:
        d_s = gl.maximum(p, 0.0) * d_p - gl.abs(p) * (delta_rows * keep_rate)[None, :]
    else:
        d_s = p * (d_p - delta_rows[None, :])
    return d_s


@gluon.jit
def hand_over(d_s, i, ds_ring):
    """Leave dS of step i for both warpgroups' dQ."""
    ds_bufs, ds_ready, ds_empty = ds_ring
    ring = i % 2
    mbarrier.wait(ds_empty.index(ring), ((i // 2) & 1) ^ 1)
    ds_bufs.index(ring).store(d_s)
    fence_async_shared()
    mbarrier.arrive(ds_ready.index(ring), count=1)


@gluon.jit
def key_partition(state, consumer: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
                  HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DROPOUT: gl.constexpr, MASK_M: gl.constexpr,
                  MASK_N: gl.constexpr, FUSED: gl.constexpr):  # fmt: skip
    """Consumer: dP, dS and dK, and dQ's second half; dP of a step runs with dK of the step before."""
    descriptors, buffers, barriers, exchange, place, lists, band = state
    _, _, _, _, _, dk_desc, _, _ = descriptors
    q_bufs, k_buf, v_buf, do_bufs, _, delta_bufs = buffers
    kv_ready, q_ready, q_empty, do_ready, do_empty = barriers
    p_ring, ds_ring, sums = exchange
    p_bufs, p_ready, p_empty = p_ring
    batch, kv_head, col, _, _, _, _, _, _ = place
    _, _, _, scale, _, _, threshold = band
    D: gl.constexpr = v_buf.shape[3]
    STAGES: gl.constexpr = q_bufs.shape[0]
    dtype: gl.constexpr = q_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, K_LAYOUT, 2)
    keep_rate = threshold / 256.0

    v = v_buf.reshape([KEYS, D])
    dk_tile = gl.zeros([KEYS, D], gl.float32, K_LAYOUT)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    total = all_steps(lists, place, GROUP, MASK_M, MASK_N, BLOCK_M)

    mbarrier.wait(kv_ready, 0)
    if total > 0:
        mbarrier.wait(do_ready.index(0), 0)
        do = do_bufs.index(0).reshape([BLOCK_M, D])
        delta_rows = row_values(delta_bufs.index(0), S_LAYOUT)
        d_p = warpgroup_mma(v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        d_p = warpgroup_mma_wait(0, deps=(d_p, ))
        mbarrier.arrive(do_empty.index(0), count=1)
        mbarrier.wait(p_ready.index(0), 0)
        p = p_bufs.index(0).load(S_LAYOUT)
        mbarrier.arrive(p_empty.index(0), count=1)
        d_s = score_gradient(d_p, p, delta_rows, keep_rate, DROPOUT).to(dtype)
        if FUSED:
            hand_over(d_s, 0, ds_ring)
            cursor = first_step(lists, place, GROUP, MASK_M, MASK_N, BLOCK_M)
        d_s_operand = gl.convert_layout(d_s, LEFT_OPERAND)
        for i in range(1, total):
            at = i % STAGES
            before = (i - 1) % STAGES
            mbarrier.wait(do_ready.index(at), (i // STAGES) & 1)
            do = do_bufs.index(at).reshape([BLOCK_M, D])
            delta_rows = row_values(delta_bufs.index(at), S_LAYOUT)
            d_p = warpgroup_mma(v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(q_ready.index(before), ((i - 1) // STAGES) & 1)
            q = q_bufs.index(before).reshape([BLOCK_M, D])
            dk_tile = warpgroup_mma(d_s_operand, q, dk_tile, is_async=True)
            d_p = warpgroup_mma_wait(1, deps=(d_p, ))
            mbarrier.arrive(do_empty.index(at), count=1)
            ring = i % 2
            mbarrier.wait(p_ready.index(ring), (i // 2) & 1)
            p = p_bufs.index(ring).load(S_LAYOUT)
            mbarrier.arrive(p_empty.index(ring), count=1)
            d_s = score_gradient(d_p, p, delta_rows, keep_rate, DROPOUT).to(dtype)
            if FUSED:
                hand_over(d_s, i, ds_ring)
            dk_tile, d_s_operand = warpgroup_mma_wait(0, deps=(dk_tile, d_s_operand))
            mbarrier.arrive(q_empty.index(before), count=1)
            d_s_operand = gl.convert_layout(d_s, LEFT_OPERAND)
            if FUSED:
                add_dq(i - 1, tile_at(cursor, lists, sums, place, GROUP, MASK_M, BLOCK_M), sums, k_buf, ds_ring,
                       consumer, BLOCK_M)  # fmt: skip
                cursor = next_step(cursor, lists, place, GROUP, MASK_M, MASK_N, BLOCK_M)
        last = total - 1
        mbarrier.wait(q_ready.index(last % STAGES), (last // STAGES) & 1)
        q = q_bufs.index(last % STAGES).reshape([BLOCK_M, D])
        dk_tile = warpgroup_mma(d_s_operand, q, dk_tile, is_async=True)
        dk_tile = warpgroup_mma_wait(0, deps=(dk_tile, ))
        if FUSED:
            add_dq(last, tile_at(cursor, lists, sums, place, GROUP, MASK_M, BLOCK_M), sums, k_buf, ds_ring,
                   consumer, BLOCK_M)  # fmt: skip

    if DROPOUT:
        dk_tile = dk_tile / keep_rate  # which dP was not divided by
    # V is read by this warpgroup alone, and not any more.
    v.store((dk_tile * scale).to(dtype))
    fence_async_shared()
    store_async(dk_desc, [batch, kv_head, col, 0], v_buf)
    store_wait(0)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "shift", "left", "right", "threshold", "tiles", "planes",
                              "planes_per_wave", "mask_batch_rows", "mask_head_rows", "mask_width", "row_tiles"])
def hopper_wide_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc, dq_sums,  # dq_sums as in `sums.py`, zeroed
    rng, partial_count, partial_list, full_count, full_list,
    seqlen_q, seqlen_k, shift, left, right, scale, scale_log2, threshold,
    mask_batch_rows, mask_head_rows, mask_width, row_tiles, tiles, planes, planes_per_wave,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr, DROPOUT: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys of one (batch, key head), and FUSED their share of dQ / scale, added to dq_sums."""
    tile, plane = program_order(gl.program_id(0), tiles, planes, planes_per_wave, False)
    batch = plane // (HEADS // GROUP)
    kv_head = plane % (HEADS // GROUP)
    col = tile * KEYS
    last_col = gl.minimum(col + KEYS, seqlen_k) - 1
    lo, hi, _, _ = visible_rows(col, last_col, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT)
    begin = lo // BLOCK_M
    end = gl.cdiv(hi, BLOCK_M)

    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    log_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], stats_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], stats_desc.layout)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [1, 1, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [1, 1, KEYS, D], v_desc.layout)
    RING_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], q_desc.dtype)
    p_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, KEYS, BLOCK_M], RING_LAYOUT)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_ring = (p_bufs, p_ready, p_empty)
    ds_ring = p_ring
    if FUSED:
        gl.static_assert(BLOCK_M == KEYS)  # a buffer of dO stages dV
        ds_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, KEYS, BLOCK_M], RING_LAYOUT)
        ds_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        ds_ring = (ds_bufs, ds_ready, ds_empty)
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(do_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(p_ready.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=1)
        if FUSED:
            mbarrier.init(ds_ready.index(i), count=1)
            mbarrier.init(ds_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    descriptors = (q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc, dv_desc)
    buffers = (q_bufs, k_buf, v_buf, do_bufs, log_bufs, delta_bufs)
    barriers = (kv_ready, q_ready, q_empty, do_ready, do_empty)
    exchange = (p_ring, ds_ring, (dq_sums, row_tiles))
    place = (batch, kv_head, col, begin, end, HEADS, planes * GROUP, seqlen_q, seqlen_k)
    lists = (partial_count, partial_list, full_count, full_list, mask_batch_rows, mask_head_rows, mask_width)
    band = (shift, left, right, scale, scale_log2, rng, threshold)
    state = (descriptors, buffers, barriers, exchange, place, lists, band)
    gl.warp_specialize([
        (value_partition, (state, 0, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, MASK_M, MASK_N, FUSED)),
        (key_partition, (state, 1, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, DROPOUT, MASK_M, MASK_N, FUSED)),
        (load_partition, (state, 0, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, False, MASK_M, MASK_N)),
    ], [4, 1], [240, 24])  # fmt: skip
