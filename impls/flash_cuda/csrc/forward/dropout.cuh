// Which weights dropout drops, for a thread's part of S.
//
// A thread's rows i and i + 8 lie in one half (i / 16 % 2) of a patch of 32 x 32: of the four words of a Philox call it
// needs two; the thread of the same lane in the warp beside it needs the others. Each makes half of the calls for both,
// while the products of the step run.
#pragma once
#include "attn/dropout.cuh"
#include "tile/fragment.cuh"

namespace forward {

/// What the two warps of 32 rows leave for each other, in a step and in the next.
struct DropoutExchange {
    u32 given[2][128];
};

/// Of 64 rows by KEYS keys. Word 2 p + a is for keys 32 p + 16 a + 8 b + (the thread's first column) + 0 or 1, and of its
/// bytes 2 h + b for row half h; bit 7 of a byte says dropped.
template <int KEYS>
struct Dropped {
    static constexpr int WORDS = KEYS / 16;
    static_assert(KEYS % 32 == 0 && WORDS <= 8, "patches of 32 keys, and a byte given has a bit for each word");
    u32 own[WORDS];  // of even keys in the upper warp, of odd ones in the lower: the calls that it makes

    /// row and key: the thread's first ones. All threads of both warps must meet before `drop`.
    __device__ __forceinline__ void draw(const attn::Dropout& dropout, u32 row, u32 key, u32 plane,
                                         DropoutExchange& exchange, int buffer, int thread) {
        const bool lower = row & 16;
        const u32 i = row / 32 * 8 + row % 8, j = key / 32 * 8 + key % 8 + lower;
        u32 given = 0;  // word w in bit 8 - WORDS + w of its bytes
#pragma unroll
        for (int p = 0; p < KEYS / 32; ++p) {
            const attn::Philox words =
                attn::philox<7>({i, j + 8 * p, plane, dropout.offset}, dropout.k0, dropout.k1);
            own[2 * p] = attn::bytes_from(lower ? words.c2 : words.c0, dropout.threshold);
            own[2 * p + 1] = attn::bytes_from(lower ? words.c3 : words.c1, dropout.threshold);
            given = given >> 1 | (attn::bytes_from(lower ? words.c0 : words.c2, dropout.threshold) & 0x80808080u);
            given = given >> 1 | (attn::bytes_from(lower ? words.c1 : words.c3, dropout.threshold) & 0x80808080u);
        }
        exchange.given[buffer][thread] = given;
    }

    /// Zero the dropped weights of a packed operand.
    __device__ __forceinline__ void drop(u32 (&weights)[tile::packed(KEYS)], u32 row, const DropoutExchange& exchange,
                                         int buffer, int thread) const {
        const u32 given = exchange.given[buffer][thread ^ 32];
        // The sign of a byte of `own` in the half of its key, of `other` in the other half.
        const u32 selector = row & 16 ? 0x88CC : 0xCC88;
#pragma unroll
        for (int r = 0; r < tile::packed(KEYS); ++r) {
            // Of 8 registers, register r: columns 8 (r / 2) + (0, 1), half r % 2.
            const u32 byte = 2 * (r % 2) + r / 2 % 2;
            const u32 other = given << (WORDS - 1 - r / 4);
            weights[r] &= ~ptx::permute(own[r / 4], other, selector + byte * 0x1111u);
        }
    }
};

}  // namespace forward
