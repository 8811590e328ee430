// The emulation of csrc/ptx/base.cuh.
#pragma once
#include "cuda.h"

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEVICE static __device__ __forceinline__
#define PLAIN static constexpr __device__ __forceinline__

namespace ptx {

struct alignas(64) TensorMap {
    u64 opaque[16];
};
static_assert(sizeof(::emulator::TensorMap) <= sizeof(TensorMap));

// Where csrc declares an array, every block here has memory of its own.
DEVICE u8* block_memory() { return static_cast<u8*>(::emulator::shared_memory()); }
#define shared_memory block_memory()

DEVICE u32 shared_address(const void* pointer) { return ::emulator::shared_address(pointer); }

DEVICE u32 opaque(u32 value) { return value; }

DEVICE float2 load_pair(const float* pointer) {
    float2 pair;
    ::emulator::read_shared(&pair, shared_address(pointer), sizeof pair);
    return pair;
}

}  // namespace ptx
