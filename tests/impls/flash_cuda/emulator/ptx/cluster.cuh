// The emulation of csrc/ptx/cluster.cuh.
#pragma once
#include "ptx/base.cuh"
#include "ptx/mbarrier.cuh"

namespace ptx {

DEVICE u32 cluster_rank() { return ::emulator::cluster_rank(); }

DEVICE u32 remote_address(const void* pointer, u32 rank) {
    return ::emulator::remote_address(shared_address(pointer), rank);
}

DEVICE void sync_cluster() { ::emulator::sync_cluster(); }

DEVICE void arrive_remote(u32 barrier) { ::emulator::arrive_remote(barrier); }

DEVICE void store_remote(u32 target, u32 value, u32 barrier) { ::emulator::store_remote(target, value, barrier); }

DEVICE void copy_remote(u32 target, const void* source, u32 bytes, u32 barrier) {
    ::emulator::copy_remote(target, shared_address(source), bytes, barrier);
}

}  // namespace ptx
