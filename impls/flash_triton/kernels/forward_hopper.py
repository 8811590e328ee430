"""Forward on Hopper: the same algorithm as `forward.py`, warp-specialised in Gluon.

Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), Algorithms 1 and 2. A program is resident: it draws
tickets for tiles, the longest first, until there are none. One warp draws them and issues the TMA copies, those of the
next tile while this one is computed; each of CONSUMERS warpgroups owns 64 query rows. Within a warpgroup the product
S = Q K^T of a step and O += P V of the step before are in flight while the softmax runs; between warpgroups nothing is
ordered, so one's softmax also hides under the other's products. Keys are walked from the right, so that the masked
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

from attnbench.impls.flash_triton.kernels.hopper_dropout import (
    drop_pairs,
    leave_words,
    left_words,
    random_state,
    word_buffers,
)
from attnbench.impls.flash_triton.kernels.hopper_pairs import pack_pairs, unpack_pairs
from attnbench.impls.flash_triton.kernels.hopper_tma import load_async, store_async, store_wait
from attnbench.impls.flash_triton.kernels.primitives import (
    list_entry,
    log_sum_exp,
    program_order,
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
def tile_of_ticket(ticket, problem, lists, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, TILE: gl.constexpr):
    """A tile's rows and steps: (batch, head, kv_head, plane, row, begin, end, entries of the lists)."""
    _, _, seqlen_q, seqlen_k, shift, left, right, _, _, tiles, planes, planes_per_wave = problem
    HEADS: gl.constexpr = TILE[0]
    GROUP: gl.constexpr = TILE[1]
    ROWS_HERE: gl.constexpr = TILE[2]
    BLOCK_N: gl.constexpr = TILE[3]
    MASK_M: gl.constexpr = TILE[5]
    MASK_N: gl.constexpr = TILE[6]
    tile, plane = program_order(ticket, tiles, planes, planes_per_wave, TILE[4])
    batch = plane // HEADS
    head = plane % HEADS
    row = tile * ROWS_HERE
    last_row = gl.minimum(row + ROWS_HERE, seqlen_q) - 1
    lo, hi, _, _ = visible_cols(row, last_row, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
    begin = lo // BLOCK_N
    # Rows that see nothing still walk one tile, wholly masked, so that every barrier has its partner.
    end = gl.maximum(gl.cdiv(hi, BLOCK_N), begin + 1)
    partial_count, partial_list, full_count, full_list, batch_rows, head_rows, width = lists
    partial_steps = 0
    list_start = 0
    if MASK_M > 0:
        list_row = batch * batch_rows + head * head_rows + row // MASK_M
        partial_steps = gl.load(partial_count + list_row) * (MASK_N // BLOCK_N)
        begin = 0
        end = partial_steps + gl.load(full_count + list_row) * (MASK_N // BLOCK_N)
        list_start = list_row.to(gl.int64) * width
    return batch, head, head // GROUP, plane, row, begin, end, (partial_steps, partial_list, full_list, list_start)


@gluon.jit
def turn_of_release(k, SLOTS: gl.constexpr):
    """The phase in which the slot for Q of the k-th tile becomes free: with two, the tile before frees the other one,
    the first tile too."""
    return ((k + 1) // 2 + 1) & 1 if SLOTS == 2 else (k & 1) ^ 1


@gluon.jit
def show_ticket(tickets, k, ticket):
    """Producer: the k-th ticket to all consumers."""
    _, shown, ready, taken = tickets
    slot = k % 2
    mbarrier.wait(taken.index(slot), ((k // 2) & 1) ^ 1)
    shown.index(slot).store(gl.full([1], ticket, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def take_ticket(tickets, k):
    """Consumer: the k-th ticket of the program."""
    _, shown, ready, taken = tickets
    slot = k % 2
    mbarrier.wait(ready.index(slot), (k // 2) & 1)
    ticket = shown.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    mbarrier.arrive(taken.index(slot), count=1)
    return gl.max(ticket, 0)


@gluon.jit
def load_partition(
    state, consumer: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr,
    DROPOUT: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Producer: draws tickets; Q of a tile once, K and V tiles into a ring of buffers as consumers free them.

    Under DROPOUT four warps, which draw for all consumers whom it drops: the words of a step are with its V, in a slot
    of the same number behind the same two barriers. They are wanted when its V is, under the next step's S.
    """
    buffers, problem, lists, tickets = state
    q_desc, k_desc, v_desc, _, q_bufs, k_bufs, v_bufs, word_bufs, barriers = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    _, rng, _, _, _, _, _, _, threshold, tiles, planes, _ = problem
    drawn, _, _, _ = tickets
    CONSUMERS: gl.constexpr = TILE[2] // ROWS
    BLOCK_N: gl.constexpr = TILE[3]
    SLOTS: gl.constexpr = q_bufs.shape[0] // CONSUMERS
    STAGES: gl.constexpr = k_bufs.shape[0]
    if DROPOUT:
        random = random_state(rng)
    ticket = gl.program_id(0)
    k = 0
    done = 0
    while ticket < tiles * planes:
        show_ticket(tickets, k, ticket)
        batch, head, kv_head, plane, row, begin, end, entries = tile_of_ticket(
            ticket, problem, lists, HAS_LEFT, HAS_RIGHT, TILE
        )
        steps = gl.maximum(end - begin, 1)
        for i in range(steps):
            col = col_of_step(i, end, entries, BLOCK_N, TILE[6])
            at = (done + i) % STAGES
            turn = ((done + i) // STAGES) & 1
            mbarrier.wait(k_empty.index(at), turn ^ 1)
            mbarrier.expect(k_ready.index(at), k_desc.block_type.nbytes)
            load_async(k_desc, [batch, kv_head, col, 0], k_ready.index(at), k_bufs.index(at))
            if i == 0:
                slot = k % SLOTS
                mbarrier.wait(q_empty.index(slot), turn_of_release(k, SLOTS))
                mbarrier.expect(q_ready.index(slot), CONSUMERS * q_desc.block_type.nbytes)
                for c in gl.static_range(CONSUMERS):
                    own_slot = q_bufs.index(slot * CONSUMERS + c)
                    load_async(q_desc, [batch, head, row + c * ROWS, 0], q_ready.index(slot), own_slot)
            mbarrier.wait(v_empty.index(at), turn ^ 1)
            mbarrier.expect(v_ready.index(at), v_desc.block_type.nbytes)
            load_async(v_desc, [batch, kv_head, col, 0], v_ready.index(at), v_bufs.index(at))
            if DROPOUT:
                for c in gl.static_range(CONSUMERS):
                    words = word_bufs.index(at * CONSUMERS + c)
                    leave_words(words, random, plane, row + c * ROWS, col, threshold, False)
                mbarrier.arrive(v_ready.index(at), count=1)
        done += steps
        k += 1
        # Here the consumers have work enough to hide the latency.
        ticket = gl.num_programs(0) + gl.atomic_add(drawn, 1, sem="relaxed")
    show_ticket(tickets, k, ticket)


@gluon.jit
def mask_scores(scores, rows, col, seqlen_k, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Scores of the keys from col on, -inf where `primitives.visible` does not let their row see them.

    In PTX, and with the lane's part of the column in the bound, as `keep_between` in the backward: left to itself the
    compiler packs the comparisons into words, 365 instructions for 64 rows and 128 keys where these are 134.
    """
    local = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
    lane = (local & 6)[None, :]
    place = (local & ~6)[None, :]
    highest = seqlen_k - 1 - col - lane
    if HAS_RIGHT:
        highest = (gl.minimum(rows + shift + right, seqlen_k - 1) - col)[:, None] - lane
    if HAS_LEFT:
        lowest = (rows + shift - left - col)[:, None] - lane
        seen = gl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ge.s32 inside, $2, $3;
            setp.le.and.s32 inside, $2, $4, inside;
            selp.f32 $0, $1, 0fFF800000, inside;
            }""",
            "=f,f,r,r,r",
            [scores, place, lowest, highest],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        seen = gl.inline_asm_elementwise(
            "{ .reg .pred inside; setp.le.s32 inside, $2, $3; selp.f32 $0, $1, 0fFF800000, inside; }",
            "=f,f,r,r",
            [scores, place, highest],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return seen


@gluon.jit
def softmax_step(scores, row_max, row_sum, rows, col, seqlen_k, shift, left, right, scale_log2,
                 MASKED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Online softmax as in `primitives.online_softmax_update`, with the mask first if MASKED: p, max, sum,
    rescale."""
    if MASKED:
        scores = mask_scores(scores, rows, col, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    origin = new_max
    if MASKED:
        origin = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(scores * scale_log2 - origin[:, None])
    rescale = gl.exp2(row_max - origin)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def attend_tile(
    k, done, place, buffers, problem, entries, consumer: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    EVEN_K: gl.constexpr, DROPOUT: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """64 rows of O and LSE of the program's k-th tile, which follows `done` steps; its own steps."""
    _, _, _, out_desc, q_bufs, k_bufs, v_bufs, word_bufs, barriers = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    batch, head, plane, row, begin, end = place
    lse, _, seqlen_q, seqlen_k, shift, left, right, scale_log2, threshold, _, _, _ = problem
    CONSUMERS: gl.constexpr = TILE[2] // ROWS
    SLOTS: gl.constexpr = q_bufs.shape[0] // CONSUMERS
    BLOCK_N: gl.constexpr = TILE[3]
    MASK_N: gl.constexpr = TILE[6]
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
    slot = k % SLOTS
    own_slot = q_bufs.index(slot * CONSUMERS + consumer)
    q = own_slot.reshape([ROWS, D])

    # The program's steps on the right that touch none of these 64 rows are passed over. Without a right bound only rows
    # past the end have such steps, and only tiles of three consumers are full of them at usual lengths.
    steps = gl.maximum(end - begin, 1)
    passed = 0
    if MASK_N == 0 and (HAS_RIGHT or CONSUMERS == 3):
        _, own_hi, _, _ = visible_cols(row, row + ROWS - 1, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
        own_end = gl.where(row < seqlen_q, gl.cdiv(own_hi, BLOCK_N), 0)
        passed = gl.minimum(gl.maximum(end - own_end, 0), steps - 1)
        for i in range(done, done + passed):
            mbarrier.wait(k_ready.index(i % STAGES), (i // STAGES) & 1)
            mbarrier.arrive(k_empty.index(i % STAGES), count=1)
            mbarrier.wait(v_ready.index(i % STAGES), (i // STAGES) & 1)
            mbarrier.arrive(v_empty.index(i % STAGES), count=1)
        done += passed
        end -= passed
        steps -= passed

    # Of the steps 1 .. steps - 1, those of the middle run need no mask, or under block lists none but the end of the
    # keys; step 0 always has its mask.
    BANDED: gl.constexpr = HAS_LEFT or HAS_RIGHT
    FIRST: gl.constexpr = 0 if (BANDED if MASK_N > 0 else HAS_RIGHT) else 1
    LAST: gl.constexpr = 2 if HAS_LEFT and MASK_N == 0 else 1
    if MASK_N > 0:
        partial_steps, _, _, _ = entries
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

    col = col_of_step(0, end, entries, BLOCK_N, MASK_N)
    at = done % STAGES
    mbarrier.wait(q_ready.index(slot), (k // SLOTS) & 1)
    mbarrier.wait(k_ready.index(at), (done // STAGES) & 1)
    keys = k_bufs.index(at).reshape([BLOCK_N, D])
    scores = warpgroup_mma(q, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    if SLOTS == 2:
        # By now the output of the tile before has left its slot.
        store_wait(0)
        mbarrier.arrive(q_empty.index((k + 1) % 2), count=1)
    scores = warpgroup_mma_wait(0, deps=(scores, ))
    mbarrier.arrive(k_empty.index(at), count=1)
    p, row_max, row_sum, rescale = softmax_step(
        scores, row_max, row_sum, rows, col, limit, shift, left + slack, right + slack, scale_log2,
        BANDED or not EVEN_K or MASK_N > 0, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    pairs = pack_pairs(p, dtype)

    for run in gl.static_range(FIRST, LAST + 1):
        run_begin = 1 if run == FIRST else (full_begin if run == 1 else full_end)
        run_end = steps if run == LAST else (full_begin if run == 0 else full_end)
        for i in range(run_begin, run_end):
            at = (done + i) % STAGES
            before = (done + i - 1) % STAGES
            MASKED: gl.constexpr = run != 1 or (MASK_N > 0 and not EVEN_K)
            col = 0
            if MASKED:
                col = col_of_step(i, end, entries, BLOCK_N, MASK_N)
            mbarrier.wait(k_ready.index(at), ((done + i) // STAGES) & 1)
            keys = k_bufs.index(at).reshape([BLOCK_N, D])
            scores = warpgroup_mma(q, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(before), ((done + i - 1) // STAGES) & 1)
            v = v_bufs.index(before).reshape([BLOCK_N, D])
            if DROPOUT:
                pairs = drop_pairs(pairs, left_words(word_bufs.index(before * CONSUMERS + consumer)), False)
            weights = unpack_pairs(pairs, dtype, P_LAYOUT)
            out = warpgroup_mma(weights, v, out, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores, ))
            mbarrier.arrive(k_empty.index(at), count=1)
            p, row_max, row_sum, rescale = softmax_step(
                scores, row_max, row_sum, rows, col, seqlen_k, shift, left, right, scale_log2,
                MASKED, HAS_LEFT and run != 1, HAS_RIGHT and run != 1,
            )  # fmt: skip
            pairs = pack_pairs(p, dtype)
            out, weights = warpgroup_mma_wait(0, deps=(out, weights))
            mbarrier.arrive(v_empty.index(before), count=1)
            out = out * gl.convert_layout(rescale, O_ROWS)[:, None]

    last = done + steps - 1
    mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
    v = v_bufs.index(last % STAGES).reshape([BLOCK_N, D])
    if DROPOUT:
        pairs = drop_pairs(pairs, left_words(word_bufs.index(last % STAGES * CONSUMERS + consumer)), False)
    out = warpgroup_mma(unpack_pairs(pairs, dtype, P_LAYOUT), v, out, is_async=True)
    out = warpgroup_mma_wait(0, deps=(out, ))
    mbarrier.arrive(v_empty.index(last % STAGES), count=1)

    final = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
    if DROPOUT:
        final = final * (256.0 / threshold)
    out = out * gl.convert_layout(final, O_ROWS)[:, None]
    in_q = rows < seqlen_q
    gl.store(lse + plane.to(gl.int64) * seqlen_q + rows, log_sum_exp(row_max, row_sum), mask=in_q)
    # Q is not read any more: its buffer stages the output for one bulk store, which clips rows past the end.
    q.store(out.to(dtype))
    fence_async_shared()
    store_async(out_desc, [batch, head, row, 0], own_slot)
    if SLOTS == 1:
        store_wait(0)
        mbarrier.arrive(q_empty.index(0), count=1)
    return passed + steps


@gluon.jit
def consume_partition(
    state, consumer: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, EVEN_K: gl.constexpr,
    DROPOUT: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Consumer: 64 rows of every tile that the program draws a ticket for."""
    buffers, problem, lists, tickets = state
    _, _, _, _, _, _, _, _, _, tiles, planes, _ = problem
    k = 0
    done = 0
    ticket = take_ticket(tickets, 0)
    while ticket < tiles * planes:
        batch, head, _kv_head, plane, row, begin, end, entries = tile_of_ticket(
            ticket, problem, lists, HAS_LEFT, HAS_RIGHT, TILE
        )
        place = (batch, head, plane, row, begin, end)
        done += attend_tile(
            k, done, place, buffers, problem, entries, consumer, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE
        )
        k += 1
        ticket = take_ticket(tickets, k)
    store_wait(0)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "shift", "left", "right", "threshold", "tiles", "planes",
                              "planes_per_wave", "mask_batch_rows", "mask_head_rows", "mask_width"])
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse, rng, drawn,  # drawn: tickets so far, 0
    partial_count, partial_list, full_count, full_list,
    seqlen_q, seqlen_k, shift, left, right, scale_log2, threshold,
    mask_batch_rows, mask_head_rows, mask_width, tiles, planes, planes_per_wave,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    EVEN_K: gl.constexpr, HEAVY_LAST: gl.constexpr, SLOTS: gl.constexpr, DROPOUT: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """out and LSE of the tiles that this program draws tickets for, its own number first; a tile is 64 * CONSUMERS
    query rows of one (batch, head). D is a power of two and also the head dim of V."""
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [SLOTS * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    SHOWN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shown = gl.allocate_shared_memory(gl.int32, [2, 1], SHOWN)
    q_ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ticket_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ticket_taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(ticket_ready.index(i), count=1)
        mbarrier.init(ticket_taken.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1 + DROPOUT)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    word_bufs = k_bufs  # any: without dropout there are none, and none is read
    if DROPOUT:
        word_bufs = word_buffers(STAGES * CONSUMERS, BLOCK_N)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    buffers = (q_desc, k_desc, v_desc, out_desc, q_bufs, k_bufs, v_bufs, word_bufs, barriers)
    problem = (lse, rng, seqlen_q, seqlen_k, shift, left, right, scale_log2, threshold, tiles, planes, planes_per_wave)
    lists = (partial_count, partial_list, full_count, full_list, mask_batch_rows, mask_head_rows, mask_width)
    tickets = (drawn, shown, ticket_ready, ticket_taken)
    TILE: gl.constexpr = (HEADS, GROUP, ROWS * CONSUMERS, BLOCK_N, HEAVY_LAST, MASK_M, MASK_N)
    state = (buffers, problem, lists, tickets)
    LOADERS: gl.constexpr = 4 if DROPOUT else 1
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume_partition, (state, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE)),
            (consume_partition, (state, 1, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE)),
            (load_partition, (state, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE)),
        ], [4, LOADERS], [232, 40] if DROPOUT else [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume_partition, (state, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE)),
            (consume_partition, (state, 1, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE)),
            (consume_partition, (state, 2, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE)),
            (load_partition, (state, 0, HAS_LEFT, HAS_RIGHT, EVEN_K, DROPOUT, TILE)),
        ], [4, 4, LOADERS], [152, 152, 56] if DROPOUT else [160, 160, 24])  # fmt: skip
