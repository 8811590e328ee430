// Which weights dropout keeps: the contract of flash_api/dropout.py, for the fragment of one thread.
//
// One Philox call gives 16 bytes for rows i0 + 8 a and keys j0 + 8 b, 0 <= a, b < 4: word 2 (i / 16 % 2) + j / 16 % 2,
// byte 2 (i / 8 % 2) + j / 8 % 2. A thread's two rows lie in one half (i / 16 % 2) of such a patch: two of the four words.
// The other two are what the thread of the same lane in the warp beside it needs (DropoutStep).
#pragma once
#include "ptx/math.cuh"
#include "tile/fragment.cuh"

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

    /// Of one Philox call, the two words of a half patch of rows (those with i / 16 % 2 == `lower`): keys with
    /// j / 16 % 2 = 0, and 1; as bytes of which bit 7 says dropped.
    __device__ __forceinline__ void dropped_bytes(u32 (&dropped)[2], u32 i, u32 j, u32 plane, bool lower) const {
        constexpr int ROUNDS = 7;
        const Philox c = philox<ROUNDS - 1>({i, j, plane, offset}, k0, k1);
        // Of the last round only one product is needed; which one is common to the warp.
        const u32 k = lower ? k1 + (ROUNDS - 1) * 0xBB67AE85u : k0 + (ROUNDS - 1) * 0x9E3779B9u;
        const u64 product = static_cast<u64>(lower ? c.c0 : c.c2) * (lower ? 0xD2511F53u : 0xCD9E8D57u);
        dropped[0] = bytes_from(static_cast<u32>(product >> 32) ^ (lower ? c.c3 : c.c1) ^ k, threshold);
        dropped[1] = bytes_from(static_cast<u32>(product), threshold);
    }

    /// Zero the dropped weights of a fragment of S: rows `row` and + 8, from key `key` on, a multiple of 32 plus the
    /// thread's first column.
    template <int COUNT>
    __device__ __forceinline__ void drop(u32 (&weights)[COUNT], u32 row, u32 key, u32 plane) const {
        static_assert(COUNT % 8 == 0, "dropout works on patches of 32 keys");
        const u32 i = row / 32 * 8 + row % 8, j = key / 32 * 8 + key % 8;
#pragma unroll
        for (int patch = 0; patch < COUNT / 8; ++patch) {
            u32 even[2], odd[2];
            dropped_bytes(even, i, j + 8 * patch, plane, row & 16);
            dropped_bytes(odd, i, j + 8 * patch + 1, plane, row & 16);
#pragma unroll
            for (int r = 0; r < 8; ++r) {
                // Register r of a patch: columns 8 (r / 2) + (0, 1), half r % 2.
                const u32 byte = 2 * (r % 2) + r / 2 % 2;
                weights[8 * patch + r] &= ~ptx::spread_signs(even[r / 4], odd[r / 4], byte);
            }
        }
    }
};

/// What the two warps that share 32 rows leave for each other, in a step and in the next.
struct DropoutExchange {
    u32 dropped[2][128];
};

/// Dropout of one step's fragment of S, KEYS wide. The warps that share 32 rows need the same Philox calls, the upper one
/// their first two words, the lower one the last two: each makes half of the calls and gives half of the words away.
template <int KEYS>
struct DropoutStep {
    static_assert(KEYS % 32 == 0 && KEYS <= 128, "dropout works on patches of 32 keys, and gives 32 bits away");
    static constexpr int WORDS = KEYS / 16;
    u32 own[WORDS];  // bit 7 of each byte says dropped

    /// Make the calls for the even keys in the upper warp, for the odd ones in the lower; `row` and `key` are the
    /// thread's first ones. All threads of both warps must meet before `drop`.
    __device__ __forceinline__ void draw(const Dropout& state, DropoutExchange& exchange, int buffer, int thread, u32 row,
                                         u32 key, u32 plane) {
        const bool lower = row & 16;
        const u32 i = row / 32 * 8 + row % 8, j = key / 32 * 8 + key % 8 + lower;
        u32 given = 0;  // word w in bits 7 - (WORDS - 1 - w) of the bytes
#pragma unroll
        for (int patch = 0; patch < KEYS / 32; ++patch) {
            const Philox c = philox<7>({i, j + 8 * patch, plane, state.offset}, state.k0, state.k1);
            own[2 * patch] = bytes_from(lower ? c.c2 : c.c0, state.threshold);
            own[2 * patch + 1] = bytes_from(lower ? c.c3 : c.c1, state.threshold);
            given = given >> 1 | (bytes_from(lower ? c.c0 : c.c2, state.threshold) & 0x80808080u);
            given = given >> 1 | (bytes_from(lower ? c.c1 : c.c3, state.threshold) & 0x80808080u);
        }
        exchange.dropped[buffer][thread] = given;
    }

    /// Zero the dropped weights.
    __device__ __forceinline__ void drop(u32 (&weights)[tile::packed(KEYS)], const DropoutExchange& exchange, int buffer,
                                         int thread, u32 row) const {
        const u32 got = exchange.dropped[buffer][thread ^ 32];
        // The sign of a byte of `own` in the half of its column, of `others` in the other.
        const u32 selector = row & 16 ? 0x88CC : 0xCC88;
#pragma unroll
        for (int r = 0; r < tile::packed(KEYS); ++r) {
            // Of 8 registers, register r: columns 8 (r / 2) + (0, 1), half r % 2.
            const u32 byte = 2 * (r % 2) + r / 2 % 2;
            const u32 others = got << (WORDS - 1 - r / 4);
            weights[r] &= ~ptx::permute(own[r / 4], others, selector + byte * 0x1111u);
        }
    }
};

}  // namespace attn
