// Blocks of a cluster, which reach into each other's shared memory (PTX clusters).
#pragma once
#include "ptx/base.cuh"
#include "ptx/mbarrier.cuh"

namespace ptx {

/// This block's number in its cluster.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Where block `rank` of the cluster has what lies at `pointer` here: an address for the functions below.
DEVICE u32 remote_address(const void* pointer, u32 rank) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
    return address;
}

/// All threads of the cluster come together, by whole warps; what each did before is seen by all.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DEVICE void arrive_remote(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Store a word; its bytes count on `barrier`, of the same block as `target`.
DEVICE void store_remote(u32 target, u32 value, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(target), "r"(value),
                 "r"(barrier)
                 : "memory");
}

/// Copy `bytes` (a multiple of 16) of this block's shared memory; they count on `barrier`, of the same block as `target`.
DEVICE void copy_remote(u32 target, const void* source, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     target),
                 "r"(shared_address(source)), "r"(bytes), "r"(barrier)
                 : "memory");
}

}  // namespace ptx
