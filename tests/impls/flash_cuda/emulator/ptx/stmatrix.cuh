// The emulation of csrc/ptx/stmatrix.cuh.
#pragma once
#include "ptx/base.cuh"

namespace ptx {

DEVICE void store_matrices(u32 row_address, u32 m0, u32 m1, u32 m2, u32 m3) {
    ::emulator::store_matrices(row_address, {m0, m1, m2, m3});
}

}  // namespace ptx
