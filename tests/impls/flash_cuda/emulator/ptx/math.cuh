// The emulation of csrc/ptx/math.cuh: exact to the last bits of float, denormals flushed as documented.
#pragma once
#include "ptx/base.cuh"

struct BF16 {
    static constexpr bool BRAIN = true;
};
struct FP16 {
    static constexpr bool BRAIN = false;
};

namespace ptx {

DEVICE float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

DEVICE float exp2(float x) { return flushed(::exp2f(flushed(x))); }

DEVICE float log2(float x) { return ::log2f(flushed(x)); }

DEVICE float reciprocal(float x) { return flushed(1.f / flushed(x)); }

/// Round to nearest even, as cvt.rn does; every NaN becomes 0x7FFF.
DEVICE u32 rounded(BF16, float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 rounded(FP16, float x) {
    if (x != x) return 0x7FFF;
    const u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    const float size = __uint_as_float(magnitude);
    if (size >= 65520.f) return sign | 0x7C00;
    if (size < 0x1p-14f) return sign | static_cast<u32>(std::nearbyint(size * 0x1p24f));  // denormal
    return sign | (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
}

template <class T>
DEVICE u32 pack(float low, float high) {
    return rounded(T{}, high) << 16 | rounded(T{}, low);
}

/// prmt.b32: four bytes of (a, b), one for each nibble of `selector`; 8 more for the byte's sign in all bits.
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 nibble = selector >> 4 * i & 15;
        const u32 byte = both >> 8 * (nibble & 7) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}

struct Wide {
    u32 low, high;
};

DEVICE Wide wide_product(u32 a, u32 b) {
    const u64 both = static_cast<u64>(a) * b;
    return {static_cast<u32>(both), static_cast<u32>(both >> 32)};
}

DEVICE u32 spread_signs(u32 low, u32 high, u32 byte) {
    return permute(low, high, (8 + byte) * 0x0011u + (12 + byte) * 0x1100u);
}

template <class T>
DEVICE void unpack(u32 pair, float& low, float& high);

template <>
__device__ __forceinline__ void unpack<BF16>(u32 pair, float& low, float& high) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xFFFF0000u);
}

template <>
__device__ __forceinline__ void unpack<FP16>(u32 pair, float& low, float& high) {
    low = ::emulator::half_to_float(pair);
    high = ::emulator::half_to_float(pair >> 16);
}

}  // namespace ptx
