// Fragments of a warp to rows of shared memory (PTX stmatrix).
#pragma once
#include "ptx/base.cuh"

namespace ptx {

/// Store four 8x8 matrices of 16-bit elements; lane l addresses row l % 8 of matrix l / 8.
DEVICE void store_matrices(u32 row_address, u32 m0, u32 m1, u32 m2, u32 m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(m0), "r"(m1),
                 "r"(m2), "r"(m3)
                 : "memory");
}

}  // namespace ptx
