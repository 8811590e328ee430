// A ring of shared-memory slots between a producer and consumers, each slot with a barrier for full and one for empty.
#pragma once
#include "ptx/mbarrier.cuh"

namespace tile {

/// Where a thread stands in a ring: the slot, and the parity of the phase that fills it.
template <int SLOTS>
struct Cursor {
    int slot = 0;
    u32 parity = 0;

    /// Where so many advances lead: for a thread that has a register for one number, not for two.
    static __device__ __forceinline__ Cursor after(u32 advances) {
        static_assert((SLOTS & (SLOTS - 1)) == 0, "the count wraps");
        return {static_cast<int>(advances % SLOTS), advances / SLOTS & 1};
    }

    __device__ __forceinline__ void advance() {
        if (++slot == SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
};

template <class Content, int SLOTS_>
struct Ring {
    static constexpr int SLOTS = SLOTS_;
    using At = Cursor<SLOTS>;
    Content slots[SLOTS];
};

/// The barriers of a ring, kept apart from its slots so that these stay aligned without gaps.
template <int SLOTS>
struct RingBarriers {
    ptx::Barrier full[SLOTS];
    ptx::Barrier empty[SLOTS];

    /// `consumers` arrivals empty a slot; one arrival, the producer's, and its bytes fill it.
    __device__ __forceinline__ void init(u32 consumers) {
        for (int i = 0; i < SLOTS; ++i) {
            ptx::init(full[i], 1);
            ptx::init(empty[i], consumers);
        }
    }
    /// Producer: wait until the slot is free, then announce what will be loaded into it.
    __device__ __forceinline__ ptx::Barrier& begin_fill(const Cursor<SLOTS>& at, u32 bytes) {
        ptx::wait(empty[at.slot], at.parity ^ 1);
        ptx::arrive_expecting(full[at.slot], bytes);
        return full[at.slot];
    }
    /// Consumer: wait until the slot is filled.
    __device__ __forceinline__ void wait_full(const Cursor<SLOTS>& at) { ptx::wait(full[at.slot], at.parity); }
    /// Consumer, once a warp: the slot is not read any more.
    __device__ __forceinline__ void release(const Cursor<SLOTS>& at, int lane) {
        if (lane == 0) ptx::arrive(empty[at.slot]);
    }
};

}  // namespace tile
