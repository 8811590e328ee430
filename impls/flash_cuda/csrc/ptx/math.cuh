// Single instructions of arithmetic, and conversions to packed 16-bit pairs.
#pragma once
#include "ptx/base.cuh"

/// Element types of q, k, v: tags that choose instructions.
struct BF16 {};
struct FP16 {};

namespace ptx {

/// 2^x by the special function unit; 2 ulp, denormal results become 0.
DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// log2(x) by the special function unit.
DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// 1/x, 1 ulp.
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Two floats rounded to nearest even, `low` in the low half.
template <class T>
DEVICE u32 pack(float low, float high);

template <>
__device__ __forceinline__ u32 pack<BF16>(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <>
__device__ __forceinline__ u32 pack<FP16>(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// Four bytes of (a, b), one for each nibble of `selector`: 0 to 3 of a, 4 to 7 of b, and 8 more for its sign in all bits.
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

/// Both words of a product.
struct Wide {
    u32 low, high;
};

/// One instruction for both: in C++ the compiler goes on in 64 bits, and adds zeros to the high word.
DEVICE Wide wide_product(u32 a, u32 b) {
    Wide product;
    asm("{\n\t.reg .b64 both;\n\tmul.wide.u32 both, %2, %3;\n\tmov.b64 {%0, %1}, both;\n\t}"
        : "=r"(product.low), "=r"(product.high)
        : "r"(a), "r"(b));
    return product;
}

/// The sign of byte `byte` of `low` in all bits of the low half, that of `high` in the high half.
DEVICE u32 spread_signs(u32 low, u32 high, u32 byte) {
    return permute(low, high, (8 + byte) * 0x0011u + (12 + byte) * 0x1100u);
}

/// The two floats of a packed pair.
template <class T>
DEVICE void unpack(u32 pair, float& low, float& high);

template <>
__device__ __forceinline__ void unpack<BF16>(u32 pair, float& low, float& high) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xFFFF0000u);
}

template <>
__device__ __forceinline__ void unpack<FP16>(u32 pair, float& low, float& high) {
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}

}  // namespace ptx
