// FlashAttention-3's backward (Shah et al. 2024, arXiv:2407.08608, Algorithm 3): dK, dV, and sums of dQ.
//
// A persistent block owns a tile of keys at a time and walks the queries that see them. Two threads load, for whom a
// third walks LISTS; two consumer warpgroups compute; the copy engine adds their parts of dQ to fp32 sums in global
// memory, for two more threads where the order of sums is settled.
#pragma once
#include "backward/narrow.cuh"
#include "backward/wide.cuh"

namespace backward {

template <class C, bool WIDE = C::WIDE>
struct Kind {
    using Consumer = NarrowConsumer<C>;
};
template <class C>
struct Kind<C, true> {
    using Consumer = WideConsumer<C>;
};

/// The kernel, in a grid of work.blocks.
template <class C>
DEVICE void run(const Params& params) {
    auto& plan = *reinterpret_cast<SharedMemoryPlan<C>*>(ptx::shared_memory);
    static_assert(sizeof(SharedMemoryPlan<C>) <= 227 * 1024, "more shared memory than Hopper has");
    const int warpgroup = ptx::uniform(threadIdx.x / WARPGROUP);

    if (threadIdx.x == 0) {
        constexpr u32 CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
        plan.kv_barriers.init(CONSUMER_WARPS);
        ptx::init(plan.v_empty, CONSUMER_WARPS);
        plan.assignment_barriers.init(1);
        if constexpr (C::CLUSTER > 1) {
            ptx::init(plan.arrivals.tile_ready, 1);
            ptx::init(plan.arrivals.tile_read, 1);
            for (auto& ready : plan.arrivals.d_scores_ready) ptx::init(ready, 1);
        }
        plan.q_barriers.init(CONSUMER_WARPS);
        plan.d_out_barriers.init(CONSUMER_WARPS);
        if constexpr (C::LISTS) {
            for (auto& ready : plan.visit_ready) ptx::init(ready, 1);
        }
        if constexpr (C::DETERMINISTIC) {
            for (auto& barriers : plan.stage_barriers) barriers.init(1);
        }
        ptx::publish_barriers();
        ptx::prefetch(params.q);
        ptx::prefetch(params.d_out);
        ptx::prefetch(params.k);
        ptx::prefetch(params.v);
    }
    __syncthreads();
    if constexpr (C::CLUSTER > 1) ptx::sync_cluster();  // nobody reaches into a block that has not begun

    if (warpgroup == 0) {
        ptx::release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            produce_keys<C>(params, plan);
        } else if (threadIdx.x == 32) {
            produce_rows<C>(params, plan);
        } else if (C::LISTS && threadIdx.x == 64) {
            produce_visits<C>(params, plan);
        } else if constexpr (C::DETERMINISTIC) {
            if (threadIdx.x % 32 == 0) add_in_turn(params, plan, threadIdx.x / 32 - 2);
        }
    } else {
        ptx::claim_registers<CONSUMER_REGISTERS>();
        typename Kind<C>::Consumer(params, plan, warpgroup - 1).run();
    }
    if constexpr (C::CLUSTER > 1) {  // nor into one that has ended
        __syncwarp();
        ptx::sync_cluster();
    }
}

}  // namespace backward
