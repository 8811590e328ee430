// The emulation of csrc/ptx/sync.cuh. Registers are not counted: the assembler's report is the judge of those.
#pragma once
#include "ptx/base.cuh"

namespace ptx {

DEVICE void sync_threads(u32 id, u32 threads) { ::emulator::sync_named(id, threads); }

DEVICE bool is_published(const u32* counter, u32 value) { return *static_cast<const volatile u32*>(counter) == value; }

DEVICE void wait_for(const u32* counter, u32 value) {
    while (!is_published(counter, value)) ::emulator::poll();
}

DEVICE void publish(u32* counter, u32 value) {
    *static_cast<volatile u32*>(counter) = value;
    ::emulator::preempt();
}

DEVICE void fence_async_shared() { ::emulator::fence_async(); }

DEVICE void fence_async_global() {}

template <int REGISTERS>
DEVICE void release_registers() {
    static_assert(24 <= REGISTERS && REGISTERS <= 256 && REGISTERS % 8 == 0);
}

template <int REGISTERS>
DEVICE void claim_registers() {
    static_assert(24 <= REGISTERS && REGISTERS <= 256 && REGISTERS % 8 == 0);
}

DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

}  // namespace ptx
