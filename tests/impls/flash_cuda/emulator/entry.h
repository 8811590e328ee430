// How Python finds a kernel, its parameters' size, and the shared memory that it declares in functions.
#pragma once
#include "cuda.h"

extern "C" const char* emulator_launch(void (*kernel)(const void*), const void* params, unsigned grid, unsigned threads,
                                       unsigned shared_bytes, unsigned resident, unsigned cluster,
                                       std::uint64_t seed);
extern "C" void emulator_fixed_memory(void* begin, void* end);

// From the linker: what begins as 0.
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

extern "C" const char* emulator_run(void (*kernel)(const void*), const void* params, unsigned grid, unsigned threads,
                                    unsigned shared_bytes, unsigned resident, unsigned cluster,
                                    std::uint64_t seed) {
    emulator_fixed_memory(__bss_start, _end);
    return emulator_launch(kernel, params, grid, threads, shared_bytes, resident, cluster, seed);
}

template <class Params>
struct Entry {
    static constexpr std::size_t BYTES = sizeof(Params);
    static void call(void (*kernel)(Params), const void* params) {
        alignas(Params) unsigned char copy[sizeof(Params)];  // Python aligns nothing
        std::memcpy(copy, params, sizeof copy);
        kernel(*reinterpret_cast<Params*>(copy));
    }
};
template <class Params>
Entry<Params> entry_of(void (*)(Params)) {
    return {};
}

#define ENTRY(name)                                                                               \
    extern "C" void emulated_##name(const void* params) { entry_of(name).call(name, params); }    \
    extern "C" const std::size_t emulated_##name##_bytes = decltype(entry_of(name))::BYTES;
