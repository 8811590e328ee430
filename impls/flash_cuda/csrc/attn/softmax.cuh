// Online softmax over a warpgroup's scores (Milakov & Gimelshein 2018; FlashAttention-2, Algorithm 1, lines 9 to 12).
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

/// Running maximum (of raw scores) and sum of a thread's two rows. The maximum is common to the row's four threads,
/// the sum is this thread's share until `finish`.
struct Softmax {
    float max[tile::HALVES];
    float sum[tile::HALVES];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            max[h] = negative_infinity();
            sum[h] = 0.f;
        }
    }

    /// Take in a tile: scores become exp2((score - max) * scale), and `rescale` is what earlier weights shrink by.
    /// MASKED: a row may have seen no key yet.
    template <bool MASKED, int COUNT>
    __device__ __forceinline__ void update(float (&scores)[COUNT], float (&rescale)[tile::HALVES], float scale) {
        // Two chains a row: a dependent maximum or sum takes several times the issue slot of one.
        float top[tile::HALVES][2];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float& chain = top[tile::half_of(i)][i & 1];
            chain = i < 4 ? scores[i] : fmaxf(chain, scores[i]);
        }
        float origin[tile::HALVES];  // of the exponent, in units of log2
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            const float now = fmaxf(max[h], tile::maximum_of_row(fmaxf(top[h][0], top[h][1])));
            const float finite = MASKED && now == negative_infinity() ? 0.f : now;
            origin[h] = finite * scale;
            rescale[h] = ptx::exp2((max[h] - finite) * scale);
            max[h] = now;
        }
        float total[tile::HALVES][2];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int h = tile::half_of(i);
            scores[i] = ptx::exp2(scores[i] * scale - origin[h]);
            float& chain = total[h][i & 1];
            chain = i < 4 ? scores[i] : chain + scores[i];
        }
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) sum[h] = sum[h] * rescale[h] + (total[h][0] + total[h][1]);
    }

    /// What the output is multiplied by at the end, and the natural log of the sum of exponentials.
    __device__ __forceinline__ void finish(float (&inverse)[tile::HALVES], float (&lse)[tile::HALVES], float scale) {
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            const float all = tile::sum_of_row(sum[h]);
            inverse[h] = all == 0.f ? 0.f : ptx::reciprocal(all);
            lse[h] = all == 0.f ? negative_infinity() : (max[h] * scale + ptx::log2(all)) * LN_2;
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
