// Barriers in shared memory that count arrivals and bytes (PTX mbarrier).
#pragma once
#include "ptx/base.cuh"

namespace ptx {

struct Barrier {
    u64 state;
};

DEVICE void init(Barrier& barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

/// Makes initialised barriers visible to the copy engine; the block still has to synchronise.
DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

/// One arrival, after which the phase also waits for this many bytes from the copy engine.
DEVICE void arrive_expecting(Barrier& barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

/// Whether the phase of this parity has completed; may suspend the thread for a while first.
DEVICE bool phase_done(Barrier& barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
    return done;
}

/// Wait for the phase of this parity. A build with WATCHDOG gives up at some point: a wrong result instead of a hang.
/// (It does not trap: with a trap the assembler forgets the registers that setmaxnreg claimed, and spills.)
DEVICE void wait(Barrier& barrier, u32 parity) {
#ifdef WATCHDOG
    for (u32 spins = 0; !phase_done(barrier, parity) && spins < 1u << 20; ++spins) {
    }
#else
    while (!phase_done(barrier, parity)) {
    }
#endif
}

}  // namespace ptx
