// The emulation of csrc/ptx/reduce.cuh.
#pragma once
#include "ptx/base.cuh"

namespace ptx {

DEVICE void reduce_add(float* target, const float* four) {
    ::emulator::preempt();  // only one thread runs at a time
    for (int i = 0; i < 4; ++i) target[i] += four[i];
}

}  // namespace ptx
