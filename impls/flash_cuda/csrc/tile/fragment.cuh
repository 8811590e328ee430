// The part of a warpgroup's 64 x N product that one thread holds, and its way to operands and to shared memory.
//
// Thread t of warp w holds, of every group of 8 columns, columns 2 (t % 4) and + 1 in rows 16 w + t / 4 and + 8:
// value 4 g + 2 h + e lies in row 16 w + t / 4 + 8 h and column 8 g + 2 (t % 4) + e.
#pragma once
#include "ptx/math.cuh"
#include "ptx/reduce.cuh"
#include "ptx/stmatrix.cuh"
#include "tile/panels.cuh"

namespace tile {

constexpr int ROWS = 64;  // of a warpgroup's product
constexpr int HALVES = 2;  // rows a thread holds

/// Registers a thread needs for 64 x N accumulators, and for the same as packed 16-bit operand.
PLAIN int accumulators(int n) { return n / 2; }
PLAIN int packed(int n) { return n / 4; }

/// Row of half h, and first column, of a thread of the warpgroup.
PLAIN int first_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
PLAIN int first_column(int thread) { return 2 * (thread % 4); }

/// Half and column (relative to the thread's first) of value i.
PLAIN int half_of(int i) { return i >> 1 & 1; }
PLAIN int column_of(int i) { return (i >> 2) * 8 + (i & 1); }

/// Round accumulators to packed pairs, in the order in which wgmma takes an A operand from registers: an accumulator
/// becomes an operand without moving between threads.
template <class T, int COUNT>
DEVICE void to_operand(u32 (&operand)[COUNT / 2], const float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) operand[i] = ptx::pack<T>(values[2 * i], values[2 * i + 1]);
}

/// Write a warpgroup's 64 x COLS operand to panels of 64 rows, from column `first` on, a multiple of 8.
template <int COLS, int TARGET_COLS>
DEVICE void store_operand(Panels<ROWS, TARGET_COLS>& target, const u32 (&operand)[packed(COLS)], int thread,
                          int first = 0) {
    const u32 row = thread / 32 * 16 + thread % 16;
    const u32 right = thread % 32 / 16;
    const u32 base = ptx::shared_address(target.bytes);
#pragma unroll
    for (int k = 0; k < COLS / 16; ++k) {
        const u32 chunk = first / 8 + 2 * k + right;
        const u32 address = base + chunk / 8 * target.PANEL_BYTES + chunk_offset(row, chunk % 8);
        ptx::store_matrices(address, operand[4 * k], operand[4 * k + 1], operand[4 * k + 2], operand[4 * k + 3]);
    }
}

/// Read a warpgroup's 64 x (16 SLICES) operand: of a panel's rows the first columns, in the order of `to_operand`.
template <int SLICES, class Source>
DEVICE void load_operand(u32 (&operand)[4 * SLICES], Source& source, int thread) {
    const u32 row = first_row(thread);
#pragma unroll
    for (int i = 0; i < 4 * SLICES; ++i) {
        const u32 chunk = i / 4 * 2 + i / 2 % 2;
        const u8* words = source.panel(chunk / 8) + chunk_offset(row + i % 2 * 8, chunk % 8);
        operand[i] = reinterpret_cast<const u32*>(words)[thread % 4];
    }
}

/// Write a warpgroup's 64 x COLS product, rounded.
template <class T, int COLS>
DEVICE void store_fragment(Panels<ROWS, COLS>& target, const float (&values)[accumulators(COLS)], int thread) {
    u32 operand[packed(COLS)];
    to_operand<T>(operand, values);
    store_operand<COLS>(target, operand, thread);
}

/// A fragment of 64 x 64 floats as it travels through memory: group g of 8 columns of every thread, 16 bytes a thread.
struct alignas(128) Floats {
    float values[PANEL / 8][4 * 128];
};
constexpr int FLOATS = PANEL / 8 * 4 * 128;

DEVICE void store_floats(Floats& target, const float (&values)[accumulators(PANEL)], int thread) {
#pragma unroll
    for (int g = 0; g < PANEL / 8; ++g) {
        reinterpret_cast<float4*>(target.values[g])[thread] =
            make_float4(values[4 * g], values[4 * g + 1], values[4 * g + 2], values[4 * g + 3]);
    }
}

/// Add to global memory, to which others add too.
DEVICE void add_floats(Floats& target, const float (&values)[accumulators(PANEL)], int thread) {
#pragma unroll
    for (int g = 0; g < PANEL / 8; ++g) ptx::reduce_add(&target.values[g][4 * thread], &values[4 * g]);
}

DEVICE void load_floats(float (&values)[accumulators(PANEL)], const Floats& source, int thread) {
#pragma unroll
    for (int g = 0; g < PANEL / 8; ++g) {
        const float4 four = reinterpret_cast<const float4*>(source.values[g])[thread];
        values[4 * g] = four.x;
        values[4 * g + 1] = four.y;
        values[4 * g + 2] = four.z;
        values[4 * g + 3] = four.w;
    }
}

/// Reductions over the four threads that share a row.
DEVICE float maximum_of_row(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

DEVICE float sum_of_row(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

}  // namespace tile
