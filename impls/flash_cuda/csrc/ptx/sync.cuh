// What threads of a block agree on beside barriers in memory: named barriers, fences, registers.
#pragma once
#include "ptx/base.cuh"

namespace ptx {

/// Barrier `id` (1 to 15) among `threads` threads, whole warps.
DEVICE void sync_threads(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Shared memory that this thread wrote becomes visible to the tensor cores and the copy engine.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

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
