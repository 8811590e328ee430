// The emulation of csrc/ptx/mbarrier.cuh.
#pragma once
#include "ptx/base.cuh"

namespace ptx {

struct Barrier {
    u64 state;
};

DEVICE void init(Barrier& barrier, u32 arrivals) { ::emulator::barrier_init(shared_address(&barrier), arrivals); }

DEVICE void publish_barriers() { ::emulator::fence_async(); }

DEVICE void arrive(Barrier& barrier) { ::emulator::barrier_arrive(shared_address(&barrier), 0, false); }

DEVICE void arrive_expecting(Barrier& barrier, u32 bytes) {
    ::emulator::barrier_arrive(shared_address(&barrier), bytes, true);
}

DEVICE bool phase_done(Barrier& barrier, u32 parity) {
    return ::emulator::barrier_done(shared_address(&barrier), parity);
}

DEVICE void wait(Barrier& barrier, u32 parity) { ::emulator::barrier_wait(shared_address(&barrier), parity); }

}  // namespace ptx
