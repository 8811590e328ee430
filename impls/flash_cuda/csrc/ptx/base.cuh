// Fixed-width names (NVRTC brings no <cstdint>), and addresses as PTX wants them.
#pragma once

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEVICE static __device__ __forceinline__
/// Plain arithmetic, usable in constant expressions: the tests have the compiler evaluate it.
#define PLAIN static constexpr __device__ __forceinline__

namespace ptx {

/// A tensor map as cuTensorMapEncodeTiled fills it; it must reach the kernel as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

/// The block's shared memory.
extern __shared__ __align__(1024) u8 shared_memory[];

/// A pointer into shared memory as PTX wants it.
DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

/// The same value, which the compiler must compute here: it would keep what depends on it in registers across a loop.
DEVICE u32 opaque(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

/// Two floats of shared memory, read here and not earlier: the compiler would hold a whole tile's in registers.
DEVICE float2 load_pair(const float* pointer) {
    float2 pair;
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared_address(pointer)));
    return pair;
}

}  // namespace ptx
