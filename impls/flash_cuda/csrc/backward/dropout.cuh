// Which weights dropout drops, for a thread's part of S^T: the contract of flash_api/dropout.py where rows are keys.
//
// A thread's keys j and j + 8 lie in one half (j / 16 % 2) of a patch of 32 x 32: of the four words of a Philox call it
// needs two, and all their bytes; the thread of the same lane in the warp beside it needs the others. Each makes half of
// the calls for both, while the products of the step run. A bit of every byte remains, so that what a step drops waits
// in one register for the scores.
#pragma once
#include "attn/dropout.cuh"
#include "ptx/sync.cuh"

namespace backward {

/// Of 64 keys by ROWS queries. Word n = 4 p + 2 e + a is for queries 32 p + 16 a + 8 b + (the thread's first column) + e,
/// and of its bytes 2 b + h for key half h.
template <int ROWS>
struct Dropped {
    static constexpr int WORDS = ROWS / 32 * 4;
    static_assert(ROWS % 32 == 0 && WORDS <= 8, "a byte has a bit for each word");
    u32 flags[1];  // bit 8 - WORDS + n of every byte is that byte of word n

    /// row: the thread's first query, a multiple of 32 plus its first column; key: its first key, of 64 from a multiple
    /// of 32 on. exchange: the warpgroup's, and nobody else's until its next barrier; pair_barrier: of two warps.
    __device__ __forceinline__ void draw(const attn::Dropout& dropout, u32 row, u32 key, u32 plane, u32* exchange,
                                         int thread, u32 pair_barrier) {
        const u32 i = row / 32 * 8 + row % 8, j = key / 32 * 8 + key % 8;
        const u32 odd = key / 16 % 2;  // the thread's keys, and e of the calls that it makes
        u32 own = 0, given = 0;
#pragma unroll
        for (int p = 0; p < ROWS / 32; ++p) {
            const attn::Philox words =
                attn::philox<7>({i + 8 * p + odd, j, plane, dropout.offset}, dropout.k0, dropout.k1);
            own |= flag(odd ? words.c1 : words.c0, 4 * p, dropout) | flag(odd ? words.c3 : words.c2, 4 * p + 1, dropout);
            given |= flag(odd ? words.c0 : words.c1, 4 * p, dropout) | flag(odd ? words.c2 : words.c3, 4 * p + 1, dropout);
        }
        exchange[thread] = given << 2 * odd;
        ptx::sync_threads(pair_barrier, 64);
        flags[0] = own << 2 * odd | exchange[thread ^ 32];
    }

    /// Zero the dropped weights of a packed operand.
    template <int COUNT>
    __device__ __forceinline__ void drop(u32 (&weights)[COUNT]) const {
        static_assert(COUNT == ROWS / 4);
#pragma unroll
        for (int r = 0; r < COUNT; ++r) {
            const int n = word_of(2 * r);
            weights[r] &= ~ptx::spread_signs(word(n), word(n + 2), byte_of(2 * r));
        }
    }

    /// A value of the fragment, or 0 where its weight is dropped.
    __device__ __forceinline__ float kept(float value, int i) const {
        const u32 own = word(word_of(i));
        return __uint_as_float(__float_as_uint(value) & ~ptx::spread_signs(own, own, byte_of(i)));
    }

private:
    /// The bit of every byte that says whether word n drops it.
    static __device__ __forceinline__ u32 flag(u32 bytes, int n, const attn::Dropout& dropout) {
        return (attn::bytes_from(bytes, dropout.threshold) & 0x80808080u) >> (WORDS - 1 - n);
    }

    /// Word n, with its flags where `spread_signs` looks for them.
    __device__ __forceinline__ u32 word(int n) const { return flags[0] << (WORDS - 1 - n); }

    /// Word and byte of value i of a fragment, which lies in column 8 (i / 4) + i % 2 and half i / 2 % 2.
    static constexpr __device__ __forceinline__ int word_of(int i) { return i / 16 * 4 + i % 2 * 2 + i / 8 % 2; }
    static constexpr __device__ __forceinline__ int byte_of(int i) { return i / 4 % 2 * 2 + i / 2 % 2; }
};

}  // namespace backward
