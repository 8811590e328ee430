// Which weights dropout keeps: the contract of flash_api/dropout.py.
//
// One Philox call gives 16 bytes for rows i0 + 8 a and keys j0 + 8 b, 0 <= a, b < 4: word 2 (i / 16 % 2) + j / 16 % 2,
// byte 2 (i / 8 % 2) + j / 8 % 2. A thread's part of it in either pass: forward/dropout.cuh, backward/dropout.cuh.
#pragma once
#include "ptx/math.cuh"

namespace attn {

struct Philox {
    u32 c0, c1, c2, c3;
};

/// Both words of a 32-bit product, also in constant expressions.
PLAIN ptx::Wide product(u32 a, u32 b) {
    if (!__builtin_is_constant_evaluated()) return ptx::wide_product(a, b);
    const u64 both = static_cast<u64>(a) * b;
    return {static_cast<u32>(both), static_cast<u32>(both >> 32)};
}

/// One round of Philox4x32 (Salmon et al., SC'11).
PLAIN Philox philox_round(const Philox& c, u32 k0, u32 k1) {
    const ptx::Wide a = product(c.c0, 0xD2511F53u), b = product(c.c2, 0xCD9E8D57u);
    return {b.high ^ c.c1 ^ k0, b.low, a.high ^ c.c3 ^ k1, a.low};
}

/// ROUNDS rounds, the key bumped between them.
template <int ROUNDS>
PLAIN Philox philox(Philox c, u32 k0, u32 k1) {
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) c = philox_round(c, k0 + r * 0x9E3779B9u, k1 + r * 0xBB67AE85u);
    return c;
}

/// Bit 7 of every byte: whether that byte of `bytes` is at least `threshold`, 1 to 256. With k = 256 - threshold it is
/// iff adding k carries out of the byte: the majority of both top bits and the carry into them.
PLAIN u32 bytes_from(u32 bytes, int threshold) {
    const u32 k = (256 - threshold) * 0x01010101u;
    const u32 low = (bytes & 0x7F7F7F7Fu) + (k & 0x7F7F7F7Fu);
    return (bytes & k) | (bytes & low) | (k & low);
}

/// The state of one call: (seed, offset), and threshold: a weight is kept iff its byte is below.
struct Dropout {
    u32 k0, k1, offset;
    int threshold;

    __device__ __forceinline__ Dropout(const i64* state, int threshold_) : threshold(threshold_) {
        const u64 seed = state[0];
        k0 = static_cast<u32>(seed);
        k1 = static_cast<u32>(seed >> 32);
        offset = static_cast<u32>(state[1]);
    }
};

}  // namespace attn
