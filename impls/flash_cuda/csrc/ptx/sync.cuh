// What threads of a block agree on beside barriers in memory: named barriers, fences, registers.
#pragma once
#include "ptx/base.cuh"

namespace ptx {

/// Barrier `id` (1 to 15) among `threads` threads, whole warps.
DEVICE void sync_threads(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Whether a counter in global memory has this value; if so, this thread sees what was done before `publish` of it.
DEVICE bool is_published(const u32* counter, u32 value) {
    u32 found;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    return found == value;
}

/// Wait for that; a build with WATCHDOG gives up, as in `wait` for a barrier.
DEVICE void wait_for(const u32* counter, u32 value) {
#ifdef WATCHDOG
    for (u32 spins = 0; !is_published(counter, value) && spins < 1u << 20; ++spins) {
    }
#else
    while (!is_published(counter, value)) {
    }
#endif
}

/// Give a counter in global memory this value, after all that this thread did or saw done.
DEVICE void publish(u32* counter, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

/// Shared memory that this thread wrote becomes visible to the tensor cores and the copy engine.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Global memory as this thread sees it is what its copies find that follow.
DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// Lower this warpgroup's registers a thread; the freed ones go back to the block.
template <int REGISTERS>
DEVICE void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/// Raise this warpgroup's registers a thread, waiting until they are free.
template <int REGISTERS>
DEVICE void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/// A value that is the same in every lane, in a form in which the compiler knows it and keeps it in a uniform register.
DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

}  // namespace ptx
