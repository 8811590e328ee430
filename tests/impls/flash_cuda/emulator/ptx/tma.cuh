// The emulation of csrc/ptx/tma.cuh.
#pragma once
#include "ptx/base.cuh"
#include "ptx/mbarrier.cuh"

namespace ptx {

enum class Keep : u64 { NORMAL = 0x1000000000000000, FIRST_OUT = 0x12F0000000000000, LAST_OUT = 0x14F0000000000000 };

DEVICE void prefetch(const TensorMap&) {}

DEVICE void prefetch(const TensorMap&, i32, i32, i32, i32) {}

DEVICE void load(void* target, const TensorMap& map, Barrier& barrier, Keep, i32 c0, i32 c1, i32 c2, i32 c3) {
    const int at[] = {c0, c1, c2, c3};
    ::emulator::load_tile(shared_address(target), &map, shared_address(&barrier), 4, at);
}

DEVICE void load(void* target, const TensorMap& map, Barrier& barrier, Keep, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
    const int at[] = {c0, c1, c2, c3, c4};
    ::emulator::load_tile(shared_address(target), &map, shared_address(&barrier), 5, at);
}

DEVICE void load_bytes(void* target, const void* source, u32 bytes, Barrier& barrier) {
    ::emulator::load_bytes(shared_address(target), source, bytes, shared_address(&barrier));
}

DEVICE void store(const TensorMap& map, const void* source, i32 c0, i32 c1, i32 c2, i32 c3) {
    const int at[] = {c0, c1, c2, c3};
    ::emulator::store_tile(&map, shared_address(source), 4, at);
}

DEVICE void store(const TensorMap& map, const void* source, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
    const int at[] = {c0, c1, c2, c3, c4};
    ::emulator::store_tile(&map, shared_address(source), 5, at);
}

DEVICE void reduce_add(float* target, const void* source, u32 bytes) {
    ::emulator::store_bytes(target, shared_address(source), bytes, true);
}

DEVICE void commit_stores() { ::emulator::commit_stores(); }

template <int PENDING>
DEVICE void wait_stores_read() {
    ::emulator::wait_stores_read(PENDING);
}

template <int PENDING>
DEVICE void wait_stores() {
    ::emulator::wait_stores(PENDING);
}

}  // namespace ptx
