// The emulation of csrc/ptx/wgmma.cuh. Registers are handed over by reference: they are read and written when the
// product is done, not when it is started.
#pragma once
#include "ptx/base.cuh"
#include "ptx/math.cuh"

namespace ptx {

template <int COUNT>
DEVICE void pin(float (&)[COUNT]) {}

template <int COUNT>
DEVICE void pin(u32 (&)[COUNT]) {}

DEVICE void begin_products() { ::emulator::begin_products(); }

DEVICE void commit_products() { ::emulator::commit_products(); }

template <int PENDING>
DEVICE void wait_products() {
    ::emulator::wait_products(PENDING);
}

template <class T, int N>
struct Product {
    static_assert(8 <= N && N <= 256 && N % 8 == 0);

    template <bool A_TRANSPOSED = false, bool B_TRANSPOSED = false>
    static __device__ __forceinline__ void shared(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
        ::emulator::start_product({N, T::BRAIN, false, A_TRANSPOSED, B_TRANSPOSED}, d, a, nullptr, b, accumulate);
    }
    template <bool B_TRANSPOSED = false>
    static __device__ __forceinline__ void registers(float (&d)[N / 2], const u32& a0, const u32& a1, const u32& a2,
                                                     const u32& a3, u64 b, bool accumulate) {
        const u32* const a[] = {&a0, &a1, &a2, &a3};
        ::emulator::start_product({N, T::BRAIN, true, false, B_TRANSPOSED}, d, 0, a, b, accumulate);
    }
};

}  // namespace ptx
