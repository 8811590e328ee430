// Before and after the main kernel: statistics of every row, zeros for dQ, an order of tiles; then dQ from its sums.
#pragma once
#include "backward/order.cuh"
#include "backward/plan.cuh"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace backward {

/// Arguments of `prepare`. out: (batch, rows, heads, dim_v), contiguous; strides in elements.
struct RowParams {
    const void* out;
    const void* d_out;
    const float* lse;    // (batch, heads, rows), natural log
    const float* d_lse;  // likewise with strides, or null
    float* lse_log2;     // (batch, heads, rows_padded)
    float* delta;
    float4* dq;          // to be zeroed
    i64 dq_count;        // in float4
    u32* ticket;         // of the main kernel, to be zeroed: whatever an earlier launch left, this one starts right
    i64 d_out_batch, d_out_row, d_out_head;
    i64 d_lse_batch, d_lse_head, d_lse_row;
    int batch, heads, rows, rows_padded, dim_v;
    OrderParams order;   // by LISTS
};

constexpr int PREPARE_THREADS = 256;
constexpr float LOG2_E = 1.44269504088896341f;

/// delta = rowsum(d_out * out) - d_lse and LSE in units of log2; +inf where the row sees no key or lies past the last.
template <class T, int LANES>
DEVICE void prepare(const RowParams& params) {
    constexpr int VALUES = 8;  // of 16 bytes
    const float infinity = __uint_as_float(0x7F800000u);
    const int lane = threadIdx.x % LANES;
    // 32 bits hold the rows of any problem: each has 256 bytes of dq or more.
    const u32 heads = params.heads, rows_padded = params.rows_padded;
    const u32 all = params.batch * rows_padded * heads;
    const u32 first = (blockIdx.x * PREPARE_THREADS + threadIdx.x) / LANES;
    const u32 stride = gridDim.x * PREPARE_THREADS / LANES;
    for (u32 at = first; at < all; at += stride) {  // heads innermost, as they lie in memory
        const u32 above = at / heads, batch = above / rows_padded;
        const int head = at - above * heads, row = above - batch * rows_padded;
        const i64 plane = batch * heads + head;
        const bool given = row < params.rows;
        // Asked for with the row, and not after its sum: a wait less for memory.
        const float natural = lane == 0 && given ? params.lse[plane * params.rows + row] : -infinity;
        float sum = 0.f;
        if (given) {
            const auto* out = static_cast<const uint4*>(params.out) +
                              ((static_cast<i64>(batch) * params.rows + row) * params.heads + head) * params.dim_v / VALUES;
            const auto* d_out = static_cast<const uint4*>(params.d_out) +
                                (batch * params.d_out_batch + row * params.d_out_row + head * params.d_out_head) / VALUES;
            for (int i = lane; i < params.dim_v / VALUES; i += LANES) {
                const uint4 a = out[i], b = d_out[i];
                const u32 left[] = {a.x, a.y, a.z, a.w}, right[] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float low, high, d_low, d_high;
                    ptx::unpack<T>(left[j], low, high);
                    ptx::unpack<T>(right[j], d_low, d_high);
                    sum += low * d_low + high * d_high;
                }
            }
        }
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) {
            const bool seen = natural != -infinity;
            if (!seen) {
                sum = 0.f;  // LSE passes no gradient on, even if what reaches it is not finite
            } else if (params.d_lse != nullptr) {
                sum -= params.d_lse[batch * params.d_lse_batch + head * params.d_lse_head + row * params.d_lse_row];
            }
            params.lse_log2[plane * params.rows_padded + row] = seen ? natural * LOG2_E : infinity;
            params.delta[plane * params.rows_padded + row] = sum;
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *params.ticket = 0;
    const i64 threads = static_cast<i64>(gridDim.x) * PREPARE_THREADS;
    for (i64 i = static_cast<i64>(blockIdx.x) * PREPARE_THREADS + threadIdx.x; i < params.dq_count; i += threads) {
        params.dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
}

/// Arguments of `finish`. target: dq as (batch, kv_heads, seqlen_q, group, dim).
struct FinishParams {
    ptx::TensorMap target;
    const tile::Floats* dq;
    int kv_heads, group, row_blocks;
    float scale;
};

/// A warpgroup for each unit of 64 x 64: scale, round, and store, clipped at the last row. The latest sums first, which
/// are still in the second-level cache.
template <class T, int ROWS, int DIM>
DEVICE void finish(const FinishParams& params) {
    __shared__ tile::Panels<tile::ROWS, tile::PANEL> staged;
    constexpr int ACROSS = DIM / tile::PANEL, UNITS = ROWS / tile::ROWS * ACROSS;
    const int index = gridDim.x - 1 - blockIdx.x;
    const int unit = index % UNITS;
    const int block = index / UNITS % params.row_blocks;
    const int plane = index / UNITS / params.row_blocks;
    const int heads = params.kv_heads * params.group;
    const int head = plane % heads;
    float values[tile::accumulators(tile::PANEL)];
    tile::load_floats(values, params.dq[index], threadIdx.x);
#pragma unroll
    for (float& value : values) value *= params.scale;
    tile::store_fragment<T, tile::PANEL>(staged, values, threadIdx.x);
    ptx::fence_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::store(params.target, staged.bytes, unit % ACROSS * tile::PANEL, head % params.group,
                   block * ROWS + unit / ACROSS * tile::ROWS, head / params.group, plane / heads);
        ptx::commit_stores();
        ptx::wait_stores_read<0>();
    }
}

}  // namespace backward
