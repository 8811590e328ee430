// Sums in global memory, from registers (PTX red).
#pragma once
#include "ptx/base.cuh"

namespace ptx {

/// Add four values to 16 aligned bytes.
DEVICE void reduce_add(float* target, const float* four) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(four[0]), "f"(four[1]),
                 "f"(four[2]), "f"(four[3])
                 : "memory");
}

}  // namespace ptx
