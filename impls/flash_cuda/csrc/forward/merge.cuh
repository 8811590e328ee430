// The results of split keys as one (Flash-Decoding): out = sum_s exp(lse_s - lse) out_s, lse = log sum_s exp(lse_s).
#pragma once
#include "attn/softmax.cuh"
#include "ptx/math.cuh"

namespace forward {

constexpr int MERGE_THREADS = 128;

/// Arguments of `merge`. A row is one of (batch, heads, seqlen_q), of which there are `rows`.
struct MergeParams {
    const float* parts;      // (splits, rows, DIM_V)
    const float* lse_parts;  // (splits, rows), natural log, -inf where no key was seen
    void* out;               // (batch, seqlen_q, heads, dim_v), contiguous
    float* lse;              // (rows)
    int splits, rows, heads, seqlen_q, dim_v;
};

/// A warp for each row.
template <class T, int DIM_V>
DEVICE void merge(const MergeParams& params) {
    constexpr float LOG2_E = 1.44269504088896341f;
    const int row = (blockIdx.x * MERGE_THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= params.rows) return;

    float top = attn::negative_infinity();
    for (int s = 0; s < params.splits; ++s) top = fmaxf(top, params.lse_parts[static_cast<i64>(s) * params.rows + row]);
    const float origin = top == attn::negative_infinity() ? 0.f : top;

    constexpr int EACH = 4, GROUPS = (DIM_V / EACH + 31) / 32;  // columns of a lane: GROUPS of EACH
    float sum = 0.f;
    float4 merged[GROUPS] = {};
#pragma unroll 4
    for (int s = 0; s < params.splits; ++s) {
        const i64 at = static_cast<i64>(s) * params.rows + row;
        const float weight = ptx::exp2((params.lse_parts[at] - origin) * LOG2_E);
        sum += weight;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int column = (g * 32 + lane) * EACH;
            if (column >= params.dim_v) continue;
            const float4 part = *reinterpret_cast<const float4*>(params.parts + at * DIM_V + column);
            merged[g].x += weight * part.x;
            merged[g].y += weight * part.y;
            merged[g].z += weight * part.z;
            merged[g].w += weight * part.w;
        }
    }

    const float inverse = sum == 0.f ? 0.f : ptx::reciprocal(sum);
    const int plane = row / params.seqlen_q, query = row % params.seqlen_q;
    const i64 batch = plane / params.heads, head = plane % params.heads;
    u32* out = static_cast<u32*>(params.out) +
               ((batch * params.seqlen_q + query) * params.heads + head) * (params.dim_v / 2);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int column = (g * 32 + lane) * EACH;
        if (column >= params.dim_v) continue;
        out[column / 2] = ptx::pack<T>(merged[g].x * inverse, merged[g].y * inverse);
        out[column / 2 + 1] = ptx::pack<T>(merged[g].z * inverse, merged[g].w * inverse);
    }
    if (lane == 0) {
        params.lse[row] = sum == 0.f ? attn::negative_infinity() : origin + ptx::log2(sum) * attn::LN_2;
    }
}

}  // namespace forward
