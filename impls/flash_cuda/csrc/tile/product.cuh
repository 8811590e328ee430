// Products of whole tiles: loops of wgmma over the depth. They start the work; see ptx/wgmma.cuh for when it is done.
#pragma once
#include "ptx/wgmma.cuh"
#include "tile/fragment.cuh"
#include "tile/panels.cuh"

namespace tile {

/// out (64 x N) = or += a (64 x DEPTH) b^T, both with contiguous depth; b is (N x DEPTH), of a taller tile the rows from
/// `first` on, a multiple of 8.
template <class T, int N, class A, class B>
DEVICE void multiply_transposed(float (&out)[accumulators(N)], A& a, B& b, bool accumulate = false, int first = 0) {
    static_assert(A::PANELS == B::PANELS);
    const Operand left = along_rows(a.bytes);
    const Operand right = along_rows(b.bytes + first * ROW_BYTES);
#pragma unroll
    for (int k = 0; k < A::PANELS * PANEL / 16; ++k) {
        ptx::Product<T, N>::shared(out, slice(left, slice_along_rows<A>(k)), slice(right, slice_along_rows<B>(k)),
                                   accumulate || k > 0);
    }
}

/// The same, of a's depth the first slices of 16 from registers.
template <class T, int N, int COUNT, class A, class B>
DEVICE void multiply_transposed(float (&out)[accumulators(N)], const u32 (&first_slices)[COUNT], A& a, B& b, int first) {
    static_assert(A::PANELS == B::PANELS);
    constexpr int HELD = COUNT / 4;
    const Operand left = along_rows(a.bytes);
    const Operand right = along_rows(b.bytes + first * ROW_BYTES);
#pragma unroll
    for (int k = 0; k < A::PANELS * PANEL / 16; ++k) {
        const u64 from_b = slice(right, slice_along_rows<B>(k));
        if (k < HELD) {
            const u32* held = first_slices + 4 * k;
            ptx::Product<T, N>::registers(out, held[0], held[1], held[2], held[3], from_b, k > 0);
        } else {
            ptx::Product<T, N>::shared(out, slice(left, slice_along_rows<A>(k)), from_b, k > 0);
        }
    }
}

/// out (64 x N) = or += a (64 x DEPTH, packed registers) b (DEPTH x N), N contiguous; of a deeper b the rows from `first`
/// on, a multiple of 8.
template <class T, int N, int COUNT, class B>
DEVICE void multiply(float (&out)[accumulators(N)], const u32 (&a)[COUNT], B& b, bool accumulate, int first = 0) {
    const Operand right = along_columns(b.bytes + first * ROW_BYTES, B::PANEL_BYTES);
#pragma unroll
    for (int k = 0; k < COUNT / 4; ++k) {
        ptx::Product<T, N>::template registers<true>(out, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                                     slice(right, slice_along_columns(k)), accumulate || k > 0);
    }
}

/// out (64 x N) += a (64 x 64, one panel) b, of which the columns from panel `first` on; N contiguous.
template <class T, int N, class A, class B>
DEVICE void multiply_shared(float (&out)[accumulators(N)], A& a, B& b, int first) {
    static_assert(A::PANELS == 1);
    const Operand left = along_rows(a.bytes);
    const Operand right = along_columns(b.panel(first), B::PANEL_BYTES);
#pragma unroll
    for (int k = 0; k < PANEL / 16; ++k) {
        ptx::Product<T, N>::template shared<false, true>(out, slice(left, slice_along_rows<A>(k)),
                                                         slice(right, slice_along_columns(k)), true);
    }
}

/// out (64 x 64) = or += a^T b over the 64 rows of two panels: a holds depth x M, b depth x N.
template <class T>
DEVICE void multiply_panels(float (&out)[accumulators(PANEL)], const u8* a, const u8* b, bool accumulate) {
    const Operand left = along_columns(a, 0);
    const Operand right = along_columns(b, 0);
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        ptx::Product<T, PANEL>::template shared<true, true>(out, slice(left, slice_along_columns(k)),
                                                            slice(right, slice_along_columns(k)), accumulate || k > 0);
    }
}

}  // namespace tile
