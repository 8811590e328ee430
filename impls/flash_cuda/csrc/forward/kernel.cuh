// FlashAttention-3's forward (Shah et al. 2024, arXiv:2407.08608, Algorithms 1 and 2): out and LSE.
//
// A persistent block: one thread issues copies, CONSUMERS warpgroups own 64 query rows each. In a warpgroup the product
// S = Q K^T of a step and O += P V of the step before are in flight while the softmax runs; between warpgroups nothing
// is ordered, so that one's softmax also hides under the others' products. Keys are walked from the right: masked
// blocks come first and last, and the long run between them has no mask.
#pragma once
#include "attn/dropout.cuh"
#include "attn/softmax.cuh"
#include "forward/plan.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "tile/fragment.cuh"
#include "tile/product.cuh"

namespace forward {

template <class C>
DEVICE Assignment assign(const Params& params, int index) {
    const attn::Place place = attn::place_of(params.work, index);
    const int heads = params.kv_heads * params.group;
    const int batch = place.plane / heads;
    const int head = place.plane - batch * heads;
    const int kv_head = head / params.group;
    const int row = place.tile * C::ROWS;
    const int last = attn::min(row + C::ROWS, params.band.rows) - 1;
    const attn::Range keys = attn::keys_of_any<C::HAS_LEFT, C::HAS_RIGHT>(params.band, row, last);
    return {place.plane, row, kv_head, head - kv_head * params.group, batch, attn::blocks_touching<C::KEYS>(keys)};
}

/// One thread: draw tiles, load Q once a tile, and K and V from the right as slots come free.
template <class C>
DEVICE void produce(const Params& params, SharedMemoryPlan<C>& plan) {
    using Plan = SharedMemoryPlan<C>;
    tile::Cursor<C::Q_SLOTS> q_at;
    tile::Cursor<C::SLOTS> at;
    for (int index = blockIdx.x;;) {
        const bool more = index < params.work.total;
        const Assignment work = more ? assign<C>(params, index) : Assignment{-1};
        const bool any = more && work.blocks.size() > 0;

        ptx::wait(plan.q_barriers.empty[q_at.slot], q_at.parity ^ 1);
        plan.assignment[q_at.slot] = work;
        ptx::Barrier& q_full = plan.q_barriers.full[q_at.slot];
        ptx::arrive_expecting(q_full, any ? C::CONSUMERS * Plan::Query::BYTES : 0);
        if (any) {
            for (int c = 0; c < C::CONSUMERS; ++c) {
                for (int p = 0; p < Plan::Query::PANELS; ++p) {
                    ptx::load(plan.q[q_at.slot][c].panel(p), params.q, q_full, ptx::Keep::FIRST_OUT,
                              p * tile::PANEL, work.member, work.row + c * tile::ROWS, work.kv_head, work.batch);
                }
            }
        }
        q_at.advance();
        if (!more) break;
        // Every block draws until it is refused: `total` draws in all, after which the counter has wrapped to 0.
        index = params.work.blocks + atomicInc(params.ticket, params.work.total - 1);
        for (int block = work.blocks.end - 1; block >= work.blocks.begin; --block) {
            const int key = block * C::KEYS;
            ptx::Barrier& k_full = plan.k_barriers.begin_fill(at, Plan::Key::BYTES);
            for (int p = 0; p < Plan::Key::PANELS; ++p) {
                ptx::load(plan.k[at.slot].panel(p), params.k, k_full, ptx::Keep::LAST_OUT, p * tile::PANEL, key,
                          work.kv_head, work.batch);
            }
            ptx::Barrier& v_full = plan.v_barriers.begin_fill(at, Plan::Value::BYTES);
            for (int p = 0; p < Plan::Value::PANELS; ++p) {
                ptx::load(plan.v[at.slot].panel(p), params.v, v_full, ptx::Keep::LAST_OUT, p * tile::PANEL, key,
                          work.kv_head, work.batch);
            }
            at.advance();
        }
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
    int first, row;  // of the warpgroup, and of the thread
    float scores[tile::accumulators(C::KEYS)];
    float out[tile::accumulators(C::DIM_V)];
    u32 weights[tile::packed(C::KEYS)];
    float rescale[tile::HALVES];
    attn::Softmax softmax;

    __device__ __forceinline__ Consumer(const Params& params_, Plan& plan_, int consumer_)
        : params(params_),
          plan(plan_),
          consumer(consumer_),
          thread(threadIdx.x % C::WARPGROUP),
          lane(threadIdx.x % 32) {}

    __device__ __forceinline__ void run() {
        for (;; q_at.advance()) {
            plan.q_barriers.wait_full(q_at);
            work = plan.assignment[q_at.slot];
            if (work.plane < 0) break;
            first = work.row + consumer * tile::ROWS;
            row = first + tile::first_row(thread);
            softmax.reset();
            attend();
            finish();
            store();
        }
        if (thread == 0) ptx::wait_stores_read<0>();
    }

    /// Walk the tile's blocks of keys from the right.
    __device__ __forceinline__ void attend() {
        if (work.blocks.size() == 0) {
            release_q();
#pragma unroll
            for (float& value : out) value = 0.f;
            return;
        }
        const attn::Range whole = attn::blocks_within<C::KEYS>(
            attn::keys_of_all<C::HAS_LEFT, C::HAS_RIGHT>(params.band, first, first + tile::ROWS - 1));
        int block = work.blocks.end - 1;
        issue_scores();
        take_scores<0>();
        if (block < whole.begin || block >= whole.end) mask(block);
        softmax.template update<true>(scores, rescale, params.scale_log2);
        round_weights(block);

        bool accumulate = false;  // the first product with V overwrites
        --block;
        if constexpr (C::HAS_RIGHT) {
            for (; block >= attn::max(whole.end, work.blocks.begin); --block) step<true>(block, accumulate);
        }
        for (; block >= attn::max(whole.begin, work.blocks.begin); --block) step<false>(block, accumulate);
        if constexpr (C::HAS_LEFT) {
            for (; block >= work.blocks.begin; --block) step<true>(block, accumulate);
        }
        release_q();
        issue_out(accumulate);
        take_out();
    }

    /// S of this block and O += P V of the one before run while the softmax does.
    template <bool MASKED>
    __device__ __forceinline__ void step(int block, bool& accumulate) {
        issue_scores();
        issue_out(accumulate);
        take_scores<1>();
        if constexpr (MASKED) mask(block);
        softmax.template update<MASKED>(scores, rescale, params.scale_log2);
        take_out();
        attn::scale_rows(out, rescale);
        round_weights(block);
        accumulate = true;
    }

    __device__ __forceinline__ void issue_scores() {
        plan.k_barriers.wait_full(k_at);
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

    __device__ __forceinline__ void mask(int block) {
        const int from = block * C::KEYS + tile::first_column(thread);
        attn::Range limits[tile::HALVES];
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            const attn::Range seen = attn::visible_keys<C::HAS_LEFT, C::HAS_RIGHT>(params.band, row + 8 * h);
            limits[h] = {seen.begin - from, seen.end - from};
        }
        attn::mask_scores<C::HAS_LEFT>(scores, limits);
    }

    /// The softmax's weights, still fp32 in `scores`, to the next product's operand.
    __device__ __forceinline__ void round_weights(int block) {
        tile::to_operand<T>(weights, scores);
        if constexpr (C::DROPOUT) {
            const attn::Dropout dropout(params.rng, params.threshold);
            dropout.drop(weights, row, block * C::KEYS + tile::first_column(thread), work.plane);
        }
    }

    __device__ __forceinline__ void release_q() {
        __syncwarp();  // every lane has read the assignment
        if constexpr (!C::OUT_IN_Q) plan.q_barriers.release(q_at, lane);
    }

    /// Divide by the softmax's sum, and write LSE.
    __device__ __forceinline__ void finish() {
        float inverse[tile::HALVES], lse[tile::HALVES];
        softmax.finish(inverse, lse, params.scale_log2);
        if constexpr (C::DROPOUT) {
            for (float& factor : inverse) factor *= 256.f / params.threshold;
        }
        if (thread % 4 == 0) {
#pragma unroll
            for (int h = 0; h < tile::HALVES; ++h) {
                const int at = row + 8 * h;
                if (at < params.band.rows) params.lse[static_cast<i64>(work.plane) * params.band.rows + at] = lse[h];
            }
        }
        attn::scale_rows(out, inverse);
    }

    /// Stage the output and let the copy engine take it away, clipped at the last row, under the next tile.
    __device__ __forceinline__ void store() {
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
        if constexpr (C::OUT_IN_Q) {
            if (thread == 0) ptx::wait_stores_read<0>();
            __syncwarp();
            plan.q_barriers.release(q_at, lane);
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
        plan.q_barriers.init(CONSUMER_WARPS);
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
        ptx::release_registers<C::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<C>(params, plan);
    } else {
        ptx::claim_registers<C::CONSUMER_REGISTERS>();
        Consumer<C>(params, plan, warpgroup - 1).run();
    }
}

}  // namespace forward
