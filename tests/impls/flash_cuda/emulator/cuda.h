// What nvcc would know by itself: CUDA's keywords, vector types, indices and intrinsics, for a host compiler.
//
// Everything that depends on other threads is a call into the machine (machine.h), where a thread may be suspended.
#pragma once
#include <cmath>
#include <cstring>

#include "machine.h"

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define threadIdx (::emulator::place->thread)
#define blockIdx (::emulator::place->block)
#define blockDim (::emulator::place->threads)
#define gridDim (::emulator::place->blocks)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

#define INTRINSIC static __forceinline__

INTRINSIC float2 make_float2(float x, float y) { return {x, y}; }
INTRINSIC float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
INTRINSIC uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
INTRINSIC uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
INTRINSIC int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

template <class To, class From>
INTRINSIC To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
INTRINSIC float __uint_as_float(unsigned x) { return bits_as<float>(x); }
INTRINSIC unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
INTRINSIC float __int_as_float(int x) { return bits_as<float>(x); }
INTRINSIC int __float_as_int(float x) { return bits_as<int>(x); }
INTRINSIC int __popc(unsigned x) { return __builtin_popcount(x); }
INTRINSIC int __ffs(int x) { return __builtin_ffs(x); }
INTRINSIC int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T>
INTRINSIC T __ldg(const T* pointer) {
    return *pointer;
}

INTRINSIC void __syncthreads() { ::emulator::sync_block(); }
INTRINSIC void __syncwarp(unsigned mask = 0xffffffffu) { ::emulator::exchange(mask, 0, 0); }
INTRINSIC void __threadfence() {}
INTRINSIC void __threadfence_block() {}
INTRINSIC void __nanosleep(unsigned) { ::emulator::poll(); }

/// Shuffles of 4 and 8 bytes. Lane numbers wrap within `width`, or, where they would leave it, the lane's own value
/// comes back, as the CUDA programming guide says.
template <class T>
INTRINSIC T shuffled(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    unsigned long long bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = ::emulator::exchange(mask, bits, source);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
INTRINSIC T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    const unsigned own = threadIdx.x % 32;
    return shuffled(mask, value, own / width * width + static_cast<unsigned>(lane) % width);
}
template <class T>
INTRINSIC T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    const unsigned own = threadIdx.x % 32, other = own ^ static_cast<unsigned>(lanes);
    return shuffled(mask, value, other < own / width * width + width ? other : own);
}
template <class T>
INTRINSIC T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    const unsigned own = threadIdx.x % 32, other = own + lanes;
    return shuffled(mask, value, other < own / width * width + width ? other : own);
}
template <class T>
INTRINSIC T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    const unsigned own = threadIdx.x % 32;
    return shuffled(mask, value, own % width >= lanes ? own - lanes : own);
}
INTRINSIC unsigned __ballot_sync(unsigned mask, int predicate) { return ::emulator::ballot(mask, predicate != 0); }
INTRINSIC int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
INTRINSIC int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Only one thread runs at a time: an atomic is a plain update before which the others may run.
template <class T>
INTRINSIC T atomicAdd(T* target, T value) {
    ::emulator::preempt();
    const T old = *target;
    *target = old + value;
    return old;
}
template <class T>
INTRINSIC T atomicExch(T* target, T value) {
    ::emulator::preempt();
    const T old = *target;
    *target = value;
    return old;
}
template <class T>
INTRINSIC T atomicCAS(T* target, T expected, T value) {
    ::emulator::preempt();
    const T old = *target;
    if (old == expected) *target = value;
    return old;
}
template <class T>
INTRINSIC T atomicMax(T* target, T value) {
    ::emulator::preempt();
    const T old = *target;
    if (value > old) *target = value;
    return old;
}
template <class T>
INTRINSIC T atomicMin(T* target, T value) {
    ::emulator::preempt();
    const T old = *target;
    if (value < old) *target = value;
    return old;
}
INTRINSIC unsigned atomicInc(unsigned* target, unsigned last) {
    ::emulator::preempt();
    const unsigned old = *target;
    *target = old >= last ? 0 : old + 1;
    return old;
}
