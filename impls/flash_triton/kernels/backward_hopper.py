"""Backward on Hopper: dK, dV and dQ in one warp-specialised kernel, five products a tile pair, in Gluon.

Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), Algorithm 3, with delta and dQ as in
`backward.py`. A program owns 128 keys, 64 for each of two consumer warpgroups, and walks the query tiles
that see them. S^T = K Q^T and dP^T = V dO^T are computed transposed, so that P^T and dS^T feed dV and dK
straight from registers. Only dS goes through shared memory: there the two warpgroups exchange it, and each
computes half the columns of dQ from all 128 keys, which halves the atomics.
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

from attnbench.impls.flash_triton.kernels.hopper_dropout import dropout_keep
from attnbench.impls.flash_triton.kernels.hopper_tma import load_async, store_async, store_wait
from attnbench.impls.flash_triton.kernels.primitives import program_order, visible_rows

KEYS = gl.constexpr(64)
"""Keys of a consumer warpgroup: the M of one wgmma."""
CONSUMERS = gl.constexpr(2)


@gluon.jit
def keep_between(p, local, cols, row, seqlen_k, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """p where the band rule lets query row + local see key cols, else 0: the test is lowest <= local <= highest.

    Written in PTX to tie each comparison to its element: left to itself, the compiler makes all comparisons while the
    products are in flight and keeps 32 results in registers that the accumulators need.
    """
    lowest = gl.where(cols < seqlen_k, -(2**30), 2**30)
    if HAS_RIGHT:
        lowest = gl.where(cols < seqlen_k, cols - (row + shift + right), 2**30)
    highest = gl.full(cols.shape, 2**30, gl.int32, cols.type.layout)
    if HAS_LEFT:
        highest = cols - (row + shift - left)
    return gl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        setp.ge.s32 inside, $2, $3;
        setp.le.and.s32 inside, $2, $4, inside;
        selp.f32 $0, $1, 0f00000000, inside;
        }""",
        "=f,f,r,r,r",
        [p, local[None, :], lowest[:, None], highest[:, None]],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def load_partition(state, consumer: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
                   HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr,
                   DROPOUT: gl.constexpr):  # fmt: skip
    """Producer: K and V once, then Q and dO tiles of every query head of the group."""
    descriptors, buffers, barriers, place, _ = state
    q_desc, k_desc, v_desc, do_desc, _, _ = descriptors
    q_bufs, k_buf, v_buf, do_bufs, _ = buffers
    kv_ready, q_ready, q_empty, do_ready, do_empty, _, _ = barriers
    batch, kv_head, col, begin, end, _, _, _, _, _, _, _ = place
    STAGES: gl.constexpr = q_bufs.shape[0]
    mbarrier.expect(kv_ready, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    load_async(k_desc, [batch, kv_head, col, 0], kv_ready, k_buf)
    load_async(v_desc, [batch, kv_head, col, 0], kv_ready, v_buf)
    steps = end - begin
    for i in range(steps * GROUP):
        head = kv_head * GROUP + i // steps
        row = (begin + i % steps) * BLOCK_M
        at = i % STAGES
        turn = (i // STAGES) & 1
        mbarrier.wait(q_empty.index(at), turn ^ 1)
        mbarrier.expect(q_ready.index(at), q_desc.block_type.nbytes)
        load_async(q_desc, [batch, head, row, 0], q_ready.index(at), q_bufs.index(at))
        mbarrier.wait(do_empty.index(at), turn ^ 1)
        mbarrier.expect(do_ready.index(at), do_desc.block_type.nbytes)
        load_async(do_desc, [batch, head, row, 0], do_ready.index(at), do_bufs.index(at))


@gluon.jit
def consume_partition(state, consumer: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
                      HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr,
                      DROPOUT: gl.constexpr):  # fmt: skip
    """Consumer: dK and dV of 64 keys, and half the columns of dQ of every query tile."""
    descriptors, buffers, barriers, place, band = state
    _, _, _, _, dk_desc, dv_desc = descriptors
    q_bufs, k_buf, v_buf, do_bufs, ds_bufs = buffers
    kv_ready, q_ready, q_empty, do_ready, do_empty, ds_ready, ds_empty = barriers
    batch, kv_head, col, begin, end, lse_log2, delta, dq, heads, rows_padded, seqlen_q, seqlen_k = place
    shift, left, right, scale, scale_log2, rng, threshold = band
    D: gl.constexpr = k_buf.shape[3]
    HALF: gl.constexpr = D // 2
    STAGES: gl.constexpr = q_bufs.shape[0]
    dtype: gl.constexpr = q_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, KV_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)  # queries run along the columns of S^T
    S_COLS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)

    TILE: gl.constexpr = [KEYS.value, BLOCK_M]
    all_keys = k_buf.reshape([CONSUMERS * KEYS, D])
    k = all_keys.slice(consumer * KEYS, KEYS)
    v = v_buf.reshape([CONSUMERS * KEYS, D]).slice(consumer * KEYS, KEYS)
    k_half = all_keys.slice(consumer * HALF, HALF, dim=1)
    dk_tile = gl.zeros([KEYS, D], gl.float32, KV_LAYOUT)
    dv_tile = gl.zeros([KEYS, D], gl.float32, KV_LAYOUT)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    no_dq = gl.zeros([BLOCK_M, HALF], gl.float32, DQ_LAYOUT)
    local = gl.arange(0, BLOCK_M, layout=S_ROWS)
    first_key = col + consumer * KEYS
    cols = first_key + gl.arange(0, KEYS, layout=S_COLS)
    dq_rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, DQ_LAYOUT))
    dq_cols = consumer * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, DQ_LAYOUT))

    # Query tiles before full_begin and from full_end on are masked. Keys past the end must not reach dQ:
    # mask them all.
    last_key = gl.minimum(first_key + KEYS, seqlen_k) - 1
    _, _, full_lo, full_hi = visible_rows(first_key, last_key, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT)
    full_begin = gl.minimum(gl.maximum(gl.cdiv(full_lo, BLOCK_M), begin), end)
    if not EVEN_K:
        full_begin = gl.where(first_key + KEYS > seqlen_k, end, full_begin)
    full_end = end
    if HAS_LEFT:
        full_end = gl.maximum(gl.minimum(full_hi // BLOCK_M, end), full_begin)
    FIRST: gl.constexpr = 0 if HAS_RIGHT or not EVEN_K else 1
    LAST: gl.constexpr = 2 if HAS_LEFT else 1

    mbarrier.wait(kv_ready, 0)
    i = 0
    for g in range(GROUP):
        head = kv_head * GROUP + g
        stats = (batch * heads + head).to(gl.int64) * rows_padded
        dq_head = dq + batch.to(gl.int64) * seqlen_q * heads * D + head * D
        for run in gl.static_range(FIRST, LAST + 1):
            run_begin = begin if run == FIRST else (full_begin if run == 1 else full_end)
            run_end = end if run == LAST else (full_begin if run == 0 else full_end)
            for step in range(run_begin, run_end):
                row = step * BLOCK_M
                at = i % STAGES
                turn = (i // STAGES) & 1
                log = gl.load(lse_log2 + stats + row + local)
                delta_rows = gl.load(delta + stats + row + local)
                q = q_bufs.index(at).reshape([BLOCK_M, D])
                do = do_bufs.index(at).reshape([BLOCK_M, D])
                mbarrier.wait(q_ready.index(at), turn)
                scores = warpgroup_mma(k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
                mbarrier.wait(do_ready.index(at), turn)
                # dP - delta in one: the accumulator starts from -delta, whose registers are then free. Under dropout
                # dP is scaled first, and delta taken off afterwards.
                d_p_start = no_scores if DROPOUT else no_scores - delta_rows[None, :]
                d_p = warpgroup_mma(v, do.permute((1, 0)), d_p_start, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores, ))
                p = gl.exp2(scores * scale_log2 - log[None, :])
                if run != 1:
                    p = keep_between(p, local, cols, row, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
                kept = p
                if DROPOUT:
                    place_of_head = batch * heads + head
                    keep = dropout_keep(rng, place_of_head, row, first_key, threshold, True, TILE, S_LAYOUT)
                    kept = gl.where(keep, p, 0.0)
                weights = gl.convert_layout(kept.to(dtype), LEFT_OPERAND)
                d_p = warpgroup_mma_wait(0, deps=(d_p, ))
                if DROPOUT:
                    d_p = gl.where(keep, d_p * (256.0 / threshold), 0.0) - delta_rows[None, :]
                dv_tile = warpgroup_mma(weights, do, dv_tile, is_async=True)
                d_s = (p * d_p).to(dtype)
                # dS changes hands through a ring of two buffers.
                ring = i % 2
                mbarrier.wait(ds_empty.index(ring), ((i // 2) & 1) ^ 1)
                ds = ds_bufs.index(ring)
                ds.slice(consumer * KEYS, KEYS).store(d_s)
                fence_async_shared()
                mbarrier.arrive(ds_ready.index(ring), count=1)
                d_s_operand = gl.convert_layout(d_s, LEFT_OPERAND)
                dk_tile = warpgroup_mma(d_s_operand, q, dk_tile, is_async=True)
                mbarrier.wait(ds_ready.index(ring), (i // 2) & 1)
                dq_part = warpgroup_mma(ds.permute((1, 0)), k_half, no_dq, use_acc=False, is_async=True)
                dv_tile, weights = warpgroup_mma_wait(2, deps=(dv_tile, weights))
                mbarrier.arrive(do_empty.index(at), count=1)
                dk_tile, d_s_operand = warpgroup_mma_wait(1, deps=(dk_tile, d_s_operand))
                mbarrier.arrive(q_empty.index(at), count=1)
                dq_part = warpgroup_mma_wait(0, deps=(dq_part, ))
                mbarrier.arrive(ds_empty.index(ring), count=1)
                ptrs = dq_head + ((row + dq_rows).to(gl.int64) * (heads * D))[:, None] + dq_cols[None, :]
                gl.atomic_add(ptrs, dq_part, mask=(row + dq_rows < seqlen_q)[:, None], sem="relaxed")
                i += 1

    # V is not read any more by this warpgroup, nor are its rows by the other one: they stage both results.
    target = v_buf.slice(consumer * KEYS, KEYS, dim=2)
    if DROPOUT:
        dv_tile = dv_tile * (256.0 / threshold)
    v.store(dv_tile.to(dtype))
    fence_async_shared()
    store_async(dv_desc, [batch, kv_head, first_key, 0], target)
    store_wait(0)
    v.store((dk_tile * scale).to(dtype))
    fence_async_shared()
    store_async(dk_desc, [batch, kv_head, first_key, 0], target)
    store_wait(0)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "rows_padded", "shift", "left", "right", "threshold",
                              "tiles", "planes", "planes_per_wave"])
def hopper_backward_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, lse_log2, delta, rng, dq,  # dq fp32, contiguous BSHD, zeroed
    seqlen_q, seqlen_k, rows_padded, shift, left, right, scale, scale_log2, threshold,
    tiles, planes, planes_per_wave,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys of one (batch, key head), and their share of dQ / scale, added to dq."""
    tile, plane = program_order(gl.program_id(0), tiles, planes, planes_per_wave, False)
    batch = plane // (HEADS // GROUP)
    kv_head = plane % (HEADS // GROUP)
    col = tile * (KEYS * CONSUMERS)
    last_col = gl.minimum(col + KEYS * CONSUMERS, seqlen_k) - 1
    lo, hi, _, _ = visible_rows(col, last_col, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT)
    begin = lo // BLOCK_M
    end = gl.maximum(gl.cdiv(hi, BLOCK_M), begin)

    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [1, 1, KEYS * CONSUMERS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [1, 1, KEYS * CONSUMERS, D], v_desc.layout)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS * CONSUMERS, BLOCK_M], q_desc.dtype)
    ds_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, KEYS * CONSUMERS, BLOCK_M], DS_LAYOUT)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(do_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
        mbarrier.init(do_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(ds_ready.index(i), count=CONSUMERS)
        mbarrier.init(ds_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    descriptors = (q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc)
    buffers = (q_bufs, k_buf, v_buf, do_bufs, ds_bufs)
    barriers = (kv_ready, q_ready, q_empty, do_ready, do_empty, ds_ready, ds_empty)
    place = (batch, kv_head, col, begin, end, lse_log2, delta, dq, HEADS, rows_padded, seqlen_q, seqlen_k)
    band = (shift, left, right, scale, scale_log2, rng, threshold)
    state = (descriptors, buffers, barriers, place, band)
    gl.warp_specialize([
        (consume_partition, (state, 0, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT)),
        (consume_partition, (state, 1, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT)),
        (load_partition, (state, 0, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT)),
    ], [4, 1], [240, 24])  # fmt: skip
