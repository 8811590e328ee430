"""Backward on Hopper: dK, dV and dQ in one warp-specialised kernel, five products a tile pair, in Gluon.

Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), Algorithm 3, with delta as in `backward.py`. A program
owns 128 keys, 64 for each of two consumer warpgroups, and walks the query tiles that see them. S^T = K Q^T and
dP^T = V dO^T are computed transposed, so that P^T and dS^T feed dV and dK straight from registers. Only dS goes
through shared memory: there the two warpgroups exchange it, and each computes half of dQ from all 128 keys, which the
copy engine adds to memory. A tile has 64 queries, or 128 in two parts where their registers allow it: dV and dK of one
part run under the exponentials of the other. A whole tile has no other part: its dK runs under the exchange of dS, and
dQ comes last (dQ first, as with two parts, was 1 to 3% slower at head_dim 128).
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
    keep_between,
    load_partition,
    row_of_step,
    row_values,
    steps_of_head,
)
from attnbench.impls.flash_triton.kernels.hopper_dropout import (
    drop_pairs,
    drop_single,
    left_words,
    word_buffers,
)
from attnbench.impls.flash_triton.kernels.hopper_pairs import pack_pairs, unpack_pairs
from attnbench.impls.flash_triton.kernels.hopper_tma import add_async, store_async, store_wait
from attnbench.impls.flash_triton.kernels.primitives import program_order, visible_rows

KEYS = gl.constexpr(64)
"""Keys of a consumer warpgroup: the M of one wgmma."""
CONSUMERS = gl.constexpr(2)
PART = gl.constexpr(64)
"""Queries whose exponentials are computed at a time."""


@gluon.jit
def part_of(tile, part: gl.constexpr, LAYOUT: gl.constexpr):
    """Columns part * PART .. of a tile, in LAYOUT: its own registers, none is moved."""
    PARTS: gl.constexpr = tile.shape[1] // PART
    if PARTS == 2:
        first, second = gl.split(gl.permute(gl.reshape(tile, [tile.shape[0], 2, PART]), (0, 2, 1)))
        tile = gl.convert_layout(first if part == 0 else second, LAYOUT, assert_trivial=True)
    return tile


@gluon.jit
def add_dq(dq_desc, coordinates, stage, dq_part):
    """Let the copy engine add a part of dQ to memory, once its addition before has left the stage."""
    store_wait(0)
    stage.reshape(dq_part.shape).store(dq_part)
    fence_async_shared()
    add_async(dq_desc, coordinates, stage)


@gluon.jit
def consume_partition(state, consumer: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
                      HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr, DROPOUT: gl.constexpr,
                      MASK_M: gl.constexpr, MASK_N: gl.constexpr):  # fmt: skip
    """Consumer: dK and dV of 64 keys, and half of dQ of every query tile: 64 of 128 rows, or of 64 half the columns."""
    descriptors, buffers, barriers, exchange, place, lists, band = state
    _, _, _, _, _, dk_desc, dv_desc, dq_desc = descriptors
    q_bufs, k_buf, v_buf, do_bufs, log_bufs, delta_bufs = buffers
    kv_ready, q_ready, empty, do_ready, _ = barriers
    ds_bufs, dq_bufs, ds_ready, word_bufs = exchange
    batch, kv_head, col, _, _, _, _, seqlen_q, seqlen_k = place
    shift, left, right, scale, scale_log2, _, threshold = band
    D: gl.constexpr = k_buf.shape[3]
    STAGES: gl.constexpr = q_bufs.shape[0]
    PARTS: gl.constexpr = BLOCK_M // PART
    WHOLE: gl.constexpr = PARTS == 1
    DQ_COLS: gl.constexpr = dq_bufs.shape[4]
    dtype: gl.constexpr = q_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    PART_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLS, 16])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, KV_LAYOUT, 2)
    PART_ROWS: gl.constexpr = gl.SliceLayout(0, PART_LAYOUT)  # queries run along the columns of S^T
    PART_COLS: gl.constexpr = gl.SliceLayout(1, PART_LAYOUT)

    all_keys = k_buf.reshape([CONSUMERS * KEYS, D])
    k = all_keys.slice(consumer * KEYS, KEYS)
    v = v_buf.reshape([CONSUMERS * KEYS, D]).slice(consumer * KEYS, KEYS)
    dk_tile = gl.zeros([KEYS, D], gl.float32, KV_LAYOUT)
    dv_tile = gl.zeros([KEYS, D], gl.float32, KV_LAYOUT)
    no_scores = gl.zeros([KEYS, BLOCK_M], gl.float32, S_LAYOUT)
    no_dq = gl.zeros([PART, DQ_COLS], gl.float32, DQ_LAYOUT)
    local = gl.arange(0, PART, layout=PART_ROWS)
    first_key = col + consumer * KEYS
    cols = first_key + gl.arange(0, KEYS, layout=PART_COLS)
    DQ_ROW: gl.constexpr = consumer * PART % BLOCK_M
    DQ_COL: gl.constexpr = consumer * DQ_COLS % D
    dq_stage = dq_bufs.index(consumer)
    keep_rate = threshold / 256.0
    gl.static_assert(WHOLE or not DROPOUT)  # spills

    # Under a band every tile is masked: a loop apart for those that need no mask spills, which costs more. In parts and
    # without a left bound it does not.
    NEEDED: gl.constexpr = HAS_LEFT or HAS_RIGHT or not EVEN_K
    RUNS: gl.constexpr = 2 if PARTS == 2 and HAS_RIGHT and not HAS_LEFT and MASK_M == 0 else 1

    mbarrier.wait(kv_ready, 0)
    i = 0
    for g in range(GROUP):
        head = kv_head * GROUP + g
        begin, end, partial_steps, list_start = steps_of_head(lists, head, place, MASK_M, MASK_N, BLOCK_M)
        masked_end = end
        if RUNS == 2:
            _, _, full_from, _ = visible_rows(
                first_key, first_key + KEYS - 1, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT
            )
            masked_end = gl.minimum(gl.maximum(gl.cdiv(full_from, BLOCK_M), begin), end)
            if not EVEN_K:
                masked_end = gl.where(first_key + KEYS > seqlen_k, end, masked_end)
        for run in gl.static_range(RUNS):
            for step in range(begin if run == 0 else masked_end, masked_end if run == 0 else end):
                MASKED: gl.constexpr = NEEDED and run == 0
                row = row_of_step(step, partial_steps, lists, list_start, MASK_M, BLOCK_M)
                at = i % STAGES
                turn = (i // STAGES) & 1
                ring = i % 2
                q = q_bufs.index(at).reshape([BLOCK_M, D])
                do = do_bufs.index(at).reshape([BLOCK_M, D])
                mbarrier.wait(q_ready.index(at), turn)
                scores = warpgroup_mma(k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
                log = row_values(log_bufs.index(at).slice(0, PART, dim=1), PART_LAYOUT)
                mbarrier.wait(do_ready.index(at), turn)
                if WHOLE and not DROPOUT:
                    # dP - delta in one: the accumulator starts from -delta, whose registers are then free.
                    delta_rows = row_values(delta_bufs.index(at), PART_LAYOUT)
                    d_p = warpgroup_mma(v, do.permute((1, 0)), no_scores - delta_rows[None, :], is_async=True)
                else:
                    d_p = warpgroup_mma(v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores, ))
                if DROPOUT:
                    gone = left_words(word_bufs.index(at * CONSUMERS + consumer))

                operands = ()
                for part in gl.static_range(PARTS):
                    p = gl.exp2(part_of(scores, part, PART_LAYOUT) * scale_log2 - log[None, :])
                    if MASKED:
                        # A full block is outside the band rule.
                        slack = gl.where((MASK_M > 0) & (step >= partial_steps), 2**29, 0)
                        p = keep_between(
                            p, local, cols, row + part * PART, seqlen_k, shift, left + slack, right + slack,
                            HAS_LEFT, HAS_RIGHT,
                        )  # fmt: skip
                    if DROPOUT:
                        # In pairs here, one by one below: no mask is made that stays in registers.
                        weights = unpack_pairs(drop_pairs(pack_pairs(p, dtype), gone, True), dtype, LEFT_OPERAND)
                    else:
                        weights = gl.convert_layout(p.to(dtype), LEFT_OPERAND)
                    if WHOLE:
                        d_p = warpgroup_mma_wait(0, deps=(d_p, ))
                    dv_tile = warpgroup_mma(weights, do.slice(part * PART, PART), dv_tile, is_async=True)
                    if part + 1 < PARTS:
                        d_p = warpgroup_mma_wait(1, deps=(d_p, ))
                    d_p_part = part_of(d_p, part, PART_LAYOUT)
                    if DROPOUT:
                        d_p_part = drop_single(d_p_part, gone, True, PART_LAYOUT)
                    if DROPOUT or not WHOLE:
                        delta_rows = row_values(delta_bufs.index(at).slice(part * PART, PART, dim=1), PART_LAYOUT)
                        d_p_part -= (delta_rows * keep_rate if DROPOUT else delta_rows)[None, :]
                    d_s = (p * d_p_part).to(dtype)
                    d_s_operand = gl.convert_layout(d_s, LEFT_OPERAND)
                    if part + 1 < PARTS:
                        # The other part's exponentials run under these two products.
                        dk_tile = warpgroup_mma(d_s_operand, q.slice(part * PART, PART), dk_tile, is_async=True)
                        log = row_values(log_bufs.index(at).slice((part + 1) * PART, PART, dim=1), PART_LAYOUT)
                    operands += (weights, d_s_operand)  # type: ignore[assignment]
                    ds_bufs[part].index(ring).slice(consumer * KEYS, KEYS).store(d_s)
                fence_async_shared()
                # dS changes hands through a ring of two: who has seen the other's dS of a step knows that the other has
                # read that of the step before, so no barrier says that a buffer is free.
                mbarrier.arrive(ds_ready.index(ring), count=1)
                last_q = q.slice((PARTS - 1) * PART, PART)
                if WHOLE:
                    dk_tile = warpgroup_mma(d_s_operand, last_q, dk_tile, is_async=True)
                mbarrier.wait(ds_ready.index(ring), (i // 2) & 1)
                ds = ds_bufs[DQ_ROW // PART].index(ring).permute((1, 0))
                dq_part = warpgroup_mma(
                    ds, all_keys.slice(DQ_COL, DQ_COLS, dim=1), no_dq, use_acc=False, is_async=True
                )
                if WHOLE:
                    dk_tile, dv_tile = warpgroup_mma_wait(1, deps=(dk_tile, dv_tile) + operands)[:2]  # noqa: RUF005
                    mbarrier.arrive(empty.index(at), count=1)
                    dq_part = warpgroup_mma_wait(0, deps=(dq_part, ))
                    add_dq(dq_desc, [batch, head, row + DQ_ROW, DQ_COL], dq_stage, dq_part)
                else:
                    # dQ before the last of dK: its way to memory begins under that.
                    dk_tile = warpgroup_mma(d_s_operand, last_q, dk_tile, is_async=True)
                    dq_part, dv_tile = warpgroup_mma_wait(1, deps=(dq_part, dv_tile))
                    add_dq(dq_desc, [batch, head, row + DQ_ROW, DQ_COL], dq_stage, dq_part)
                    dk_tile = warpgroup_mma_wait(0, deps=(dk_tile, ) + operands)[0]  # noqa: RUF005
                    mbarrier.arrive(empty.index(at), count=1)
                i += 1

    # V is not read any more by this warpgroup, nor are its rows by the other one: they stage both results.
    target = v_buf.slice(consumer * KEYS, KEYS, dim=2)
    if DROPOUT:
        # 1 / keep_rate, which scales dP, is left out of dS: here it comes to dK, and dQ's last pass has it for dQ.
        dv_tile = dv_tile / keep_rate
        dk_tile = dk_tile / keep_rate
    v.store(dv_tile.to(dtype))
    fence_async_shared()
    store_async(dv_desc, [batch, kv_head, first_key, 0], target)
    store_wait(0)
    v.store((dk_tile * scale).to(dtype))
    fence_async_shared()
    store_async(dk_desc, [batch, kv_head, first_key, 0], target)
    store_wait(0)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "shift", "left", "right", "threshold", "tiles", "planes",
                              "planes_per_wave", "mask_batch_rows", "mask_head_rows", "mask_width"])
def hopper_backward_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc, dq_desc,  # dq fp32, zeroed
    rng, partial_count, partial_list, full_count, full_list,
    seqlen_q, seqlen_k, shift, left, right, scale, scale_log2, threshold,
    mask_batch_rows, mask_head_rows, mask_width, tiles, planes, planes_per_wave,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr, DROPOUT: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys of one (batch, key head), and their share of dQ / scale, added to dq."""
    tile, plane = program_order(gl.program_id(0), tiles, planes, planes_per_wave, False)
    batch = plane // (HEADS // GROUP)
    kv_head = plane % (HEADS // GROUP)
    col = tile * (KEYS * CONSUMERS)
    last_col = gl.minimum(col + KEYS * CONSUMERS, seqlen_k) - 1
    lo, hi, _, _ = visible_rows(col, last_col, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT)
    begin = lo // BLOCK_M
    end = gl.cdiv(hi, BLOCK_M)

    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    log_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], stats_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], stats_desc.layout)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [1, 1, KEYS * CONSUMERS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [1, 1, KEYS * CONSUMERS, D], v_desc.layout)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS * CONSUMERS, PART], q_desc.dtype)
    ds_bufs = (gl.allocate_shared_memory(q_desc.dtype, [2, KEYS * CONSUMERS, PART], DS_LAYOUT), )
    if BLOCK_M > PART:  # a ring a part
        ds_bufs += (gl.allocate_shared_memory(q_desc.dtype, [2, KEYS * CONSUMERS, PART], DS_LAYOUT), )  # type: ignore[assignment]
    dq_bufs = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 1, 1, PART, BLOCK_M * D // 128], dq_desc.layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(do_ready.index(i), count=1 + DROPOUT)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(ds_ready.index(i), count=CONSUMERS)
    fence_async_shared()

    descriptors = (q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc, dq_desc)
    buffers = (q_bufs, k_buf, v_buf, do_bufs, log_bufs, delta_bufs)
    barriers = (kv_ready, q_ready, empty, do_ready, empty)  # Q and dO of a slot are released together
    word_bufs = dq_bufs  # any: without dropout there are none, and none is read
    if DROPOUT:
        word_bufs = word_buffers(STAGES * CONSUMERS, PART)
    exchange = (ds_bufs, dq_bufs, ds_ready, word_bufs)
    place = (batch, kv_head, col, begin, end, HEADS, planes * GROUP, seqlen_q, seqlen_k)
    lists = (partial_count, partial_list, full_count, full_list, mask_batch_rows, mask_head_rows, mask_width)
    band = (shift, left, right, scale, scale_log2, rng, threshold)
    state = (descriptors, buffers, barriers, exchange, place, lists, band)
    gl.warp_specialize([
        (consume_partition, (state, 0, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, MASK_M, MASK_N)),
        (consume_partition, (state, 1, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, MASK_M, MASK_N)),
        (load_partition, (state, 0, GROUP, BLOCK_M, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, MASK_M, MASK_N)),
    ], [4, 4 if DROPOUT else 1], [232, 40] if DROPOUT else [240, 24])  # fmt: skip
