// The tensor cores' asynchronous product of a warpgroup (PTX wgmma), one wrapper for each width and operand source.
//
// D (64 x N, fp32 in registers) += A (64 x 16) B (16 x N). B lies in shared memory, A there or in registers. The
// instruction only starts the product: between `begin` and `wait` its accumulators, and A if in registers, belong to
// the tensor cores.
#pragma once
#include "ptx/base.cuh"
#include "ptx/math.cuh"

namespace ptx {

/// Pins registers in program order: what was computed into them is computed, and nothing is read ahead of here.
template <int COUNT>
DEVICE void pin(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int COUNT>
DEVICE void pin(u32 (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

/// Orders register and shared-memory writes before the products that follow.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Closes a group of products.
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until all but the last PENDING groups are done. `pin` what they wrote before reading it.
template <int PENDING>
DEVICE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/// One product of depth 16: `shared` takes A from a descriptor, `registers` from four packed registers.
/// A_TRANSPOSED and B_TRANSPOSED: the operand's rows (M or N) are contiguous in shared memory, not its depth.
template <class T, int N>
struct Product;

// Lists of register names and operands, so that the instructions below can be spelled for any N.
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define NAMES_16 TEN() ", %10, %11, %12, %13, %14, %15"
#define NAMES_32 TEN() ", " TEN(1) ", " TEN(2) ", %30, %31"
#define NAMES_40 TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3)
#define NAMES_48 NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_40 ", " TEN(4) ", " TEN(5) ", %60, %61, %62, %63"
#define NAMES_80 NAMES_40 ", " TEN(4) ", " TEN(5) ", " TEN(6) ", " TEN(7)
#define NAMES_96 NAMES_80 ", " TEN(8) ", %90, %91, %92, %93, %94, %95"
#define NAMES_128 NAMES_80 ", " TEN(8) ", " TEN(9) ", " TEN(10) ", " TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_2(i) "+f"(d[i]), "+f"(d[i + 1])
#define SUMS_8(i) SUMS_2(i), SUMS_2(i + 2), SUMS_2(i + 4), SUMS_2(i + 6)
#define SUMS_16_FROM(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_16 SUMS_16_FROM(0)
#define SUMS_32_FROM(i) SUMS_16_FROM(i), SUMS_16_FROM(i + 16)
#define SUMS_32 SUMS_32_FROM(0)
#define SUMS_40 SUMS_32, SUMS_8(32)
#define SUMS_48 SUMS_32, SUMS_16_FROM(32)
#define SUMS_64 SUMS_32, SUMS_32_FROM(32)
#define SUMS_96 SUMS_64, SUMS_32_FROM(64)
#define SUMS_128 SUMS_96, SUMS_32_FROM(96)

// R is N / 2, the number of accumulators; i0 to i6 are R, R + 1, ..., the names of the operands after them.
#define PRODUCT(TYPE, SPELLED, N, R, i0, i1, i2, i3, i4, i5, i6)                                                    \
    template <>                                                                                                     \
    struct Product<TYPE, N> {                                                                                       \
        template <bool A_TRANSPOSED = false, bool B_TRANSPOSED = false>                                             \
        static __device__ __forceinline__ void shared(float (&d)[R], u64 a, u64 b, bool accumulate) {               \
            asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %" #i2 ", 0;\n\t"                                \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." SPELLED "." SPELLED " {" NAMES_##R "}, " \
                         "%" #i0 ", %" #i1 ", add, 1, 1, %" #i3 ", %" #i4 ";\n\t}"                                  \
                         : SUMS_##R                                                                                 \
                         : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED)); \
        }                                                                                                           \
        template <bool B_TRANSPOSED = false>                                                                        \
        static __device__ __forceinline__ void registers(float (&d)[R], u32 a0, u32 a1, u32 a2, u32 a3, u64 b,      \
                                                         bool accumulate) {                                         \
            asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %" #i5 ", 0;\n\t"                                \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." SPELLED "." SPELLED " {" NAMES_##R "}, " \
                         "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", add, 1, 1, %" #i6 ";\n\t}"            \
                         : SUMS_##R                                                                                 \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<u32>(accumulate)),           \
                           "n"(B_TRANSPOSED));                                                                      \
        }                                                                                                           \
    };

#define PRODUCTS(N, R, ...)                     \
    PRODUCT(BF16, "bf16", N, R, __VA_ARGS__) \
    PRODUCT(FP16, "f16", N, R, __VA_ARGS__)

PRODUCTS(32, 16, 16, 17, 18, 19, 20, 21, 22)
PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37, 38)
PRODUCTS(80, 40, 40, 41, 42, 43, 44, 45, 46)
PRODUCTS(96, 48, 48, 49, 50, 51, 52, 53, 54)
PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69, 70)
PRODUCTS(192, 96, 96, 97, 98, 99, 100, 101, 102)
PRODUCTS(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef PRODUCTS
#undef PRODUCT

}  // namespace ptx
