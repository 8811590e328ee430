// FlashAttention-3's forward (Shah et al. 2024, arXiv:2407.08608, Algorithms 1 and 2): out and LSE.
//
// A persistent block: one thread issues copies, CONSUMERS warpgroups own 64 query rows each. In a warpgroup the product
// S = Q K^T of a step and O += P V of the step before are in flight while the softmax runs; between warpgroups nothing
// is ordered, so that one's softmax also hides under the others' products. Keys are walked from the right: masked
// blocks come first and last, and the long run between them has no mask. Of a block-sparse row its partial blocks come
// first, then its full ones.
#pragma once
#include "attn/softmax.cuh"
#include "forward/plan.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "tile/fragment.cuh"
#include "tile/product.cuh"

namespace forward {

/// Queries of a warpgroup's rows.
template <class C>
DEVICE int queries_of(const Params& params) {
    return C::DECODE ? params.queries : tile::ROWS;
}

template <class C>
DEVICE Assignment assign(const Params& params, int index) {
    const attn::Place place = attn::place_of(params.work, index);
    const int members = C::DECODE ? 1 : params.group;  // planes of one key head
    const int kv_plane = place.plane / members;
    const int entry = kv_plane / params.kv_heads;
    Assignment work{};
    work.member = place.plane - kv_plane * members;
    work.plane = kv_plane * params.group + work.member;
    work.kv_head = kv_plane - entry * params.kv_heads;
    work.batch = C::DECODE ? entry % params.batch : entry;
    work.row = place.tile * C::CONSUMERS * queries_of<C>(params);
    if constexpr (C::LISTS) {
        work.list_row =
            attn::list_row(params.lists, work.batch, work.kv_head * params.group + work.member, work.row);
        work.steps = attn::steps_of<C::KEYS, C::HAS_LEFT || C::HAS_RIGHT>(params.lists, work.list_row, params.band.keys);
        work.blocks = {0, work.steps.all};
    } else {
        const int last = attn::min(work.row + C::CONSUMERS * queries_of<C>(params), params.band.rows) - 1;
        work.blocks = attn::blocks_touching<C::KEYS>(
            attn::keys_of_any<C::HAS_LEFT, C::HAS_RIGHT>(params.band, work.row, last));
        if constexpr (C::DECODE) work.blocks = attn::share_of(work.blocks, entry / params.batch, params.splits);
    }
    return work;
}

/// One thread: draw tiles, load Q once a tile, and K and V from the right as slots come free.
template <class C>
DEVICE void produce(const Params& params, SharedMemoryPlan<C>& plan) {
    using Plan = SharedMemoryPlan<C>;
    tile::Cursor<C::Q_SLOTS> q_at;
    tile::Cursor<C::SLOTS> at;
    const int rows = C::DECODE ? params.queries * params.group : tile::ROWS;  // of a copy of Q
    // Tiles of a plane read the same K and V; with few queries there is one, or hardly more.
    constexpr ptx::Keep KEEP = C::DECODE ? ptx::Keep::NORMAL : ptx::Keep::LAST_OUT;
    const auto find = [&](int index) {
        Assignment work{-1};
        if (index < params.work.total) work = assign<C>(params, index);
        return work;
    };
    for (Assignment work = find(blockIdx.x);;) {
        const bool any = work.plane >= 0 && work.blocks.size() > 0;
        const auto load_q = [&](int c) {
            tile::RingBarriers<C::Q_SLOTS>& barriers = plan.q_barriers[c];
            ptx::wait(barriers.empty[q_at.slot], q_at.parity ^ 1);
            plan.assignment[q_at.slot][c] = work;
            ptx::Barrier& full = barriers.full[q_at.slot];
            ptx::arrive_expecting(full, any ? Plan::Query::PANELS * rows * tile::ROW_BYTES : 0);
            if (!any) return;
            for (int p = 0; p < Plan::Query::PANELS; ++p) {
                ptx::load(plan.q[q_at.slot][c].panel(p), params.q, full, ptx::Keep::FIRST_OUT, p * tile::PANEL,
                          work.member, work.row + c * tile::ROWS, work.kv_head, work.batch);
            }
        };
        int key = 0;
        const auto load_k = [&](int block) {
            key = block * C::KEYS;
            if constexpr (C::LISTS) {
                key = attn::position_of<C::KEYS>(params.lists, work.list_row, work.steps, block);
                ptx::wait(plan.k_barriers.empty[at.slot], at.parity ^ 1);
                plan.first_key[at.slot] = key;
            }
            ptx::Barrier& full = plan.k_barriers.begin_fill(at, Plan::Key::BYTES);
            for (int p = 0; p < Plan::Key::PANELS; ++p) {
                ptx::load(plan.k[at.slot].panel(p), params.k, full, KEEP, p * tile::PANEL, key, work.kv_head,
                          work.batch);
            }
        };
        const auto load_v = [&] {
            ptx::Barrier& full = plan.v_barriers.begin_fill(at, Plan::Value::BYTES);
            for (int p = 0; p < Plan::Value::PANELS; ++p) {
                ptx::load(plan.v[at.slot].panel(p), params.v, full, KEEP, p * tile::PANEL, key, work.kv_head,
                          work.batch);
            }
            at.advance();
        };
        // The first warpgroup may begin before the others have left the last tile.
        int block = work.blocks.end - 1;
        load_q(0);
        if (any) load_k(block);
        for (int c = 1; c < C::CONSUMERS; ++c) load_q(c);
        q_at.advance();
        if (work.plane < 0) break;
        while (block > work.blocks.begin) {
            load_v();
            load_k(--block);
        }
        // The next tile is drawn and found under the last load, which waits for its slot. Drawn before the first ones it
        // stood behind this whole tile, and of a causal mask the longest ones behind one another (NOTES.md).
        // Every block draws until it is refused: `total` draws in all, after which the counter has wrapped to 0.
        const int drawn = params.work.blocks + atomicInc(params.ticket, params.work.total - 1);
        const Assignment next = find(drawn);
        if (any) load_v();
        work = next;
    }
}

/// A warpgroup: 64 rows of out and LSE of each tile. Registers belong to the tensor cores from an `issue` to its `take`.
template <class C>
struct Consumer {
    using T = typename C::T;
    using Plan = SharedMemoryPlan<C>;

    const Params& params;
    Plan& plan;
    const int consumer, thread, lane;
    tile::Cursor<C::Q_SLOTS> q_at;
    tile::Cursor<C::SLOTS> k_at, v_at;

    Assignment work;
    int first, row;  // of the warpgroup, and of the thread: queries; of DECODE `row` is within the tile
    int key;         // by LISTS: where the block begins whose scores are computed
    float scores[tile::accumulators(C::KEYS)];
    float out[tile::accumulators(C::DIM_V)];
    u32 weights[tile::packed(C::KEYS)];
    float rescale[tile::HALVES];
    attn::Softmax softmax;
    Room<Dropped<C::KEYS>, C::DROPOUT ? 1 : 0> dropped;
    int buffer = 0;  // of plan.dropout

    __device__ __forceinline__ Consumer(const Params& params_, Plan& plan_, int consumer_)
        : params(params_),
          plan(plan_),
          consumer(consumer_),
          thread(threadIdx.x % C::WARPGROUP),
          lane(threadIdx.x % 32) {}

    __device__ __forceinline__ void run() {
        for (;; q_at.advance()) {
            plan.q_barriers[consumer].wait_full(q_at);
            work = plan.assignment[q_at.slot][consumer];
            if (work.plane < 0) break;
            first = work.row + consumer * tile::ROWS;
            row = (C::DECODE ? 0 : first) + tile::first_row(thread);
            softmax.reset();
            attend();
            finish();
            store();
        }
        if (thread == 0) ptx::wait_stores_read<0>();
    }

    /// Walk the tile's blocks of keys from the right.
    __device__ __forceinline__ void attend() {
        const attn::Range seen = blocks_seen();
        int block = work.blocks.end - 1;
        for (; block >= seen.end; --block) pass();
        if (seen.size() == 0) {
            release_q();
#pragma unroll
            for (float& value : out) value = 0.f;
            return;
        }
        const attn::Range whole = blocks_without_mask();
        issue_scores();
        draw(block);
        take_scores<0>();
        if (block < whole.begin || block >= whole.end) mask(block);
        softmax.template update<C::PARTS>(scores, rescale, params.scale_log2);
        round_weights();

        bool accumulate = false;  // the first product with V overwrites
        --block;
        if constexpr (C::HAS_RIGHT || C::LISTS) {
            for (; block >= attn::max(whole.end, seen.begin); --block) step<true>(block, accumulate);
        }
        for (; block >= attn::max(whole.begin, seen.begin); --block) step<false>(block, accumulate);
        if constexpr (C::HAS_LEFT && !C::LISTS) {
            for (; block >= seen.begin; --block) step<true>(block, accumulate);
        }
        release_q();
        issue_out(accumulate);
        take_out();
        if constexpr (C::HAS_LEFT && !C::LISTS) {
            for (; block >= work.blocks.begin; --block) pass();
        }
    }

    /// Of the tile's blocks those that the warpgroup's own rows touch.
    __device__ __forceinline__ attn::Range blocks_seen() {
        const attn::Range none = {work.blocks.begin, work.blocks.begin};
        if (C::CONSUMERS > 1 && first >= params.band.rows) return none;
        if (C::CONSUMERS == 1 || C::LISTS) return work.blocks;
        const int last = attn::min(first + tile::ROWS, params.band.rows) - 1;
        const attn::Range seen = attn::blocks_touching<C::KEYS>(
            attn::keys_of_any<C::HAS_LEFT, C::HAS_RIGHT>(params.band, first, last));
        return seen.size() > 0 ? seen : none;
    }

    /// Leave a block to the other warpgroups.
    __device__ __forceinline__ void pass() {
        plan.k_barriers.wait_full(k_at);
        plan.v_barriers.wait_full(v_at);
        __syncwarp();  // every lane has seen it
        plan.k_barriers.release(k_at, lane);
        plan.v_barriers.release(v_at, lane);
        k_at.advance();
        v_at.advance();
    }

    __device__ __forceinline__ attn::Range blocks_without_mask() {
        if constexpr (C::LISTS) {
            return {0, work.steps.whole};
        } else {
            return attn::blocks_within<C::KEYS>(attn::keys_of_all<C::HAS_LEFT, C::HAS_RIGHT>(
                params.band, first, first + queries_of<C>(params) - 1));
        }
    }

    /// S of this block and O += P V of the one before run while the softmax does.
    template <bool MASKED>
    __device__ __forceinline__ void step(int block, bool& accumulate) {
        issue_scores();
        issue_out(accumulate);
        draw(block);
        take_scores<1>();
        if constexpr (MASKED) mask(block);
        const bool rose = softmax.template update<C::PARTS>(scores, rescale, params.scale_log2);
        take_out();
        round_weights();
        if (rose) attn::scale_rows(out, rescale);
        accumulate = true;
    }

    __device__ __forceinline__ void issue_scores() {
        plan.k_barriers.wait_full(k_at);
        if constexpr (C::LISTS) key = ptx::uniform(plan.first_key[k_at.slot]);
        ptx::pin(scores);
        ptx::begin_products();
        tile::multiply_transposed<T, C::KEYS>(scores, plan.q[q_at.slot][consumer], plan.k[k_at.slot]);
        ptx::commit_products();
    }

    /// LATER: how many groups of products were issued after the scores.
    template <int LATER>
    __device__ __forceinline__ void take_scores() {
        ptx::wait_products<LATER>();
        ptx::pin(scores);
        plan.k_barriers.release(k_at, lane);
        k_at.advance();
    }

    __device__ __forceinline__ void issue_out(bool accumulate) {
        plan.v_barriers.wait_full(v_at);
        ptx::pin(out);
        ptx::pin(weights);
        ptx::begin_products();
        tile::multiply<T, C::DIM_V>(out, weights, plan.v[v_at.slot], accumulate);
        ptx::commit_products();
    }

    __device__ __forceinline__ void take_out() {
        ptx::wait_products<0>();
        ptx::pin(out);
        ptx::pin(weights);
        plan.v_barriers.release(v_at, lane);
        v_at.advance();
    }

    __device__ __forceinline__ int first_key(int block) const { return C::LISTS ? key : block * C::KEYS; }

    __device__ __forceinline__ void mask(int block) {
        const int from = first_key(block) + tile::first_column(thread);
        attn::Range limits[tile::HALVES];
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            attn::Range seen = attn::visible_keys<C::HAS_LEFT, C::HAS_RIGHT>(params.band, query_of(h));
            if (C::LISTS && block < work.steps.full) seen = {0, params.band.keys};
            limits[h] = {seen.begin - from, seen.end - from};
        }
        attn::mask_scores<C::HAS_LEFT>(scores, limits);
    }

    /// Dropout's random bits, while the scores are computed.
    __device__ __forceinline__ void draw(int block) {
        if constexpr (C::DROPOUT) {
            dropped.items[0].draw({params.rng, params.threshold}, row, first_key(block) + tile::first_column(thread),
                                  work.plane, plan.dropout.items[consumer], buffer, thread);
        }
    }

    /// The softmax's weights, still fp32 in `scores`, to the next product's operand.
    __device__ __forceinline__ void round_weights() {
        tile::to_operand<T>(weights, scores);
        if constexpr (C::DROPOUT) {
            constexpr int WARPS = 2;
            ptx::sync_threads(FIRST_PAIR_BARRIER + consumer * 2 + thread / (32 * WARPS), 32 * WARPS);
            dropped.items[0].drop(weights, row, plan.dropout.items[consumer], buffer, thread);
            buffer ^= 1;
        }
    }

    __device__ __forceinline__ void release_q() {
        __syncwarp();  // every lane has read the assignment
        if constexpr (!C::OUT_IN_Q) plan.q_barriers[consumer].release(q_at, lane);
    }

    /// Query of a half's row; of DECODE, whose rows are the group's heads query by query, one past the last for no row.
    __device__ __forceinline__ int query_of(int h) const {
        if constexpr (C::DECODE) {
            const int local = (row + 8 * h) / params.group;
            return local < params.queries ? first + local : params.band.rows;
        } else {
            return row + 8 * h;
        }
    }

    /// Row of `lse` and `parts` that a half's row is.
    __device__ __forceinline__ i64 result_row(int h) const {
        const int member = C::DECODE ? (row + 8 * h) % params.group : 0;
        return static_cast<i64>(work.plane + member) * params.band.rows + query_of(h);
    }

    /// Divide by the softmax's sum, and write LSE.
    __device__ __forceinline__ void finish() {
        float inverse[tile::HALVES], lse[tile::HALVES];
        softmax.finish(inverse, lse);
        if constexpr (C::DROPOUT) {
            for (float& factor : inverse) factor *= 256.f / params.threshold;
        }
        if (thread % 4 == 0) {
#pragma unroll
            for (int h = 0; h < tile::HALVES; ++h) {
                if (query_of(h) < params.band.rows) params.lse[result_row(h)] = lse[h];
            }
        }
        attn::scale_rows(out, inverse);
    }

    __device__ __forceinline__ void store() {
        if (C::DECODE && params.splits > 1) {
            store_part();
        } else {
            store_out();
        }
        if constexpr (C::OUT_IN_Q) {
            if (thread == 0) ptx::wait_stores_read<0>();
            __syncwarp();
            plan.q_barriers[consumer].release(q_at, lane);
        }
    }

    /// Stage the output and let the copy engine take it away, clipped at the last row, under the next tile.
    __device__ __forceinline__ void store_out() {
        const u32 barrier = FIRST_CONSUMER_BARRIER + consumer;
        typename Plan::Out& staged = plan.out(consumer);
        // The last output must have left its place, or, if that is Q's, all of the warpgroup must have read Q.
        if (thread == 0) ptx::wait_stores_read<0>();
        ptx::sync_threads(barrier, C::WARPGROUP);
        tile::store_fragment<T, C::DIM_V>(staged, out, thread);
        ptx::fence_async_shared();
        ptx::sync_threads(barrier, C::WARPGROUP);
        if (thread == 0) {
            for (int p = 0; p < Plan::Out::PANELS; ++p) {
                ptx::store(params.out, staged.panel(p), p * tile::PANEL, work.member, first, work.kv_head, work.batch);
            }
            ptx::commit_stores();
        }
    }

    /// This split's output, for `merge`.
    __device__ __forceinline__ void store_part() {
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            if (query_of(h) >= params.band.rows) continue;
            float* part = params.parts + result_row(h) * C::DIM_V + tile::first_column(thread);
#pragma unroll
            for (int g = 0; g < C::DIM_V / 8; ++g) {
                *reinterpret_cast<float2*>(part + 8 * g) = make_float2(out[4 * g + 2 * h], out[4 * g + 2 * h + 1]);
            }
        }
    }
};

/// The kernel, in a grid of work.blocks.
template <class C>
DEVICE void run(const Params& params) {
    auto& plan = *reinterpret_cast<SharedMemoryPlan<C>*>(ptx::shared_memory);
    static_assert(sizeof(SharedMemoryPlan<C>) <= 227 * 1024, "more shared memory than Hopper has");
    const int warpgroup = ptx::uniform(threadIdx.x / C::WARPGROUP);

    if (threadIdx.x == 0) {
        constexpr u32 CONSUMER_WARPS = C::CONSUMERS * C::WARPGROUP / 32;
        for (auto& barriers : plan.q_barriers) barriers.init(C::WARPGROUP / 32);
        plan.k_barriers.init(CONSUMER_WARPS);
        plan.v_barriers.init(CONSUMER_WARPS);
        ptx::publish_barriers();
        ptx::prefetch(params.q);
        ptx::prefetch(params.k);
        ptx::prefetch(params.v);
        ptx::prefetch(params.out);
    }
    __syncthreads();

    if (warpgroup == 0) {
        if constexpr (C::MOVE_REGISTERS) ptx::release_registers<C::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<C>(params, plan);
    } else {
        if constexpr (C::MOVE_REGISTERS) ptx::claim_registers<C::CONSUMER_REGISTERS>();
        Consumer<C>(params, plan, warpgroup - 1).run();
    }
}

}  // namespace forward
