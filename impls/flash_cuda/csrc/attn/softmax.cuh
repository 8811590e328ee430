// Online softmax over a warpgroup's scores (Milakov & Gimelshein 2018; FlashAttention-2, Algorithm 1, lines 9 to 12),
// whose origin follows the maximum only where it must (FlashAttention-4, Zadouri et al. 2026).
#pragma once
#include "attn/band.cuh"
#include "tile/fragment.cuh"

namespace attn {

constexpr float LN_2 = 0.69314718055994531f;

DEVICE float negative_infinity() { return __uint_as_float(0xFF800000u); }

/// Scores outside [limits.begin, limits.end) of each half's row become -inf; column 0 is the thread's first.
template <bool HAS_LEFT, int COUNT>
DEVICE void mask_scores(float (&scores)[COUNT], const Range (&limits)[tile::HALVES]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const Range& limit = limits[tile::half_of(i)];
        const int column = tile::column_of(i);
        if ((HAS_LEFT && column < limit.begin) || column >= limit.end) scores[i] = negative_infinity();
    }
}

/// Origin and sum of the exponentials in a thread's two rows. The origin is common to a row's four threads, the sum is
/// this thread's share until `finish`.
///
/// The origin is a maximum that the row has had. It rises to the present one only where a score exceeds it by more than
/// SLACK, so that weights stay below 2^SLACK: mostly in a row's first tile. What has been summed then stays as it is,
/// and no exponential waits for the row's other threads.
struct Softmax {
    static constexpr float SLACK = 8.f;

    float origin[tile::HALVES];  // in units of log2, as SLACK
    float limit[tile::HALVES];   // origin + SLACK; -inf until the row has seen a key
    float sum[tile::HALVES];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            origin[h] = 0.f;
            limit[h] = negative_infinity();
            sum[h] = 0.f;
        }
    }

    /// Take in a tile: scores become exp2(score * scale - origin). Whether an origin rose in this warp; what earlier
    /// tiles gave then shrinks by `rescale`. PARTS: the maximum of a part is found under the exponentials of the one
    /// before.
    template <int PARTS, int COUNT>
    __device__ __forceinline__ bool update(float (&scores)[COUNT], float (&rescale)[tile::HALVES], float scale) {
        constexpr int PART = COUNT / PARTS;
        static_assert(PART % 4 == 0);
        // Two chains a row: a dependent maximum or sum takes several times the issue slot of one.
        float total[tile::HALVES][2] = {};
        bool rose = false;
#pragma unroll
        for (int first = 0; first < COUNT; first += PART) {
            float top[tile::HALVES][2];
#pragma unroll
            for (int i = 0; i < PART; ++i) {
                float& chain = top[tile::half_of(i)][i & 1];
                chain = i < 4 ? scores[first + i] : fmaxf(chain, scores[first + i]);
            }
            bool above = false;
#pragma unroll
            for (int h = 0; h < tile::HALVES; ++h) above |= fmaxf(top[h][0], top[h][1]) * scale > limit[h];
            if (__any_sync(0xffffffffu, above)) {
#pragma unroll
                for (int h = 0; h < tile::HALVES; ++h) {
                    const float factor = raise(h, fmaxf(top[h][0], top[h][1]) * scale);
                    rescale[h] = rose ? rescale[h] * factor : factor;
                    total[h][0] *= factor;
                    total[h][1] *= factor;
#pragma unroll
                    for (int i = 0; i < first; ++i) {
                        if (tile::half_of(i) == h) scores[i] *= factor;
                    }
                }
                rose = true;
            }
#pragma unroll
            for (int i = first; i < first + PART; ++i) {
                const int h = tile::half_of(i);
                scores[i] = ptx::exp2(scores[i] * scale - origin[h]);
                total[h][i & 1] += scores[i];
            }
        }
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) sum[h] += total[h][0] + total[h][1];
        return rose;
    }

    /// Raise a half's origin to `top`, each thread's maximum: what earlier weights shrink by.
    __device__ __forceinline__ float raise(int h, float top) {
        const bool seen = limit[h] != negative_infinity();
        const float now = tile::maximum_of_row(top);
        if (!seen && now == negative_infinity()) return 1.f;
        const float next = seen ? fmaxf(origin[h], now) : now;
        const float factor = seen ? ptx::exp2(origin[h] - next) : 0.f;
        sum[h] *= factor;
        origin[h] = next;
        limit[h] = next + SLACK;
        return factor;
    }

    /// What the output is multiplied by at the end, and the natural log of the sum of exponentials.
    __device__ __forceinline__ void finish(float (&inverse)[tile::HALVES], float (&lse)[tile::HALVES]) {
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            const float all = tile::sum_of_row(sum[h]);
            inverse[h] = all == 0.f ? 0.f : ptx::reciprocal(all);
            lse[h] = all == 0.f ? negative_infinity() : (origin[h] + ptx::log2(all)) * LN_2;
        }
    }
};

/// Multiply each half's values by its factor.
template <int COUNT>
DEVICE void scale_rows(float (&values)[COUNT], const float (&factor)[tile::HALVES]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] *= factor[tile::half_of(i)];
}

}  // namespace attn
