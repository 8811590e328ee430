// Bulk copies of tiles between global and shared memory (PTX cp.async.bulk.tensor).
// A coordinate may lie outside the tensor: loads fill zeros there, stores write nothing.
#pragma once
#include "ptx/base.cuh"
#include "ptx/mbarrier.cuh"

namespace ptx {

/// What the second-level cache should do with a tile: the encodings of createpolicy's fractional policies at 1.0.
enum class Keep : u64 { NORMAL = 0x1000000000000000, FIRST_OUT = 0x12F0000000000000, LAST_OUT = 0x14F0000000000000 };

DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

/// Bring a 4-D box into the second-level cache.
DEVICE void prefetch(const TensorMap& map, i32 c0, i32 c1, i32 c2, i32 c3) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(c0), "r"(c1),
                 "r"(c2), "r"(c3)
                 : "memory");
}

/// Load a 4-D box at (c0, c1, c2, c3), c0 innermost; its bytes count on `barrier`.
DEVICE void load(void* target, const TensorMap& map, Barrier& barrier, Keep keep, i32 c0, i32 c1, i32 c2, i32 c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(target)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(static_cast<u64>(keep))
        : "memory");
}

/// Load a 5-D box.
DEVICE void load(void* target, const TensorMap& map, Barrier& barrier, Keep keep, i32 c0, i32 c1, i32 c2, i32 c3,
                 i32 c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(target)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
        "l"(static_cast<u64>(keep))
        : "memory");
}

/// Load `bytes` (a multiple of 16) of contiguous memory.
DEVICE void load_bytes(void* target, const void* source, u32 bytes, Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(target)),
                 "l"(source), "r"(bytes), "r"(shared_address(&barrier))
                 : "memory");
}

/// Store a 4-D box; belongs to the thread's open group of stores.
DEVICE void store(const TensorMap& map, const void* source, i32 c0, i32 c1, i32 c2, i32 c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

/// Store a 5-D box.
DEVICE void store(const TensorMap& map, const void* source, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
        "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

/// Add `bytes` of fp32 from shared to global memory; belongs to the thread's open group of stores.
DEVICE void reduce_add(float* target, const void* source, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}

/// Close the thread's group of stores.
DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Wait until all but the last PENDING groups of this thread have read their shared memory.
template <int PENDING>
DEVICE void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

/// Wait until all but the last PENDING groups of this thread are done: what they wrote is in global memory.
template <int PENDING>
DEVICE void wait_stores() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace ptx
