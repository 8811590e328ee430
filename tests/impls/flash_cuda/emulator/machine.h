// What emulated device code asks of the machine that it runs on.
//
// A block's threads are fibers of one host thread: exactly one runs, until it waits for others. Every function here is
// opaque to the compiler of the device code, so that registers handed over by reference are really in memory meanwhile.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

using Address = std::uint32_t;  // of shared memory, as PTX has it

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
struct Place {
    Index thread, block, threads, blocks;
};
extern Place* place;  // of the thread that runs

// Scheduling.
void preempt();  // others may run here
void poll();     // nothing to do until others have changed memory

// Shared memory.
void* shared_memory();
Address shared_address(const void* pointer);
void read_shared(void* target, Address source, std::uint32_t bytes);
void write_shared(Address target, const void* source, std::uint32_t bytes);
void fence_async();

// Barriers of the block and the warp.
void sync_block();
void sync_named(std::uint32_t id, std::uint32_t threads);
std::uint64_t exchange(std::uint32_t mask, std::uint64_t value, std::uint32_t source);
std::uint32_t ballot(std::uint32_t mask, bool predicate);

// Barriers in shared memory.
void barrier_init(Address barrier, std::uint32_t arrivals);
void barrier_arrive(Address barrier, std::uint32_t bytes, bool expects);
void barrier_wait(Address barrier, std::uint32_t parity);
bool barrier_done(Address barrier, std::uint32_t parity);

// Clusters: blocks that reach into each other's shared memory.
std::uint32_t cluster_rank();
Address remote_address(Address address, std::uint32_t rank);
void sync_cluster();
void arrive_remote(Address barrier);
void store_remote(Address target, std::uint32_t value, Address barrier);
void copy_remote(Address target, Address source, std::uint32_t bytes, Address barrier);

// Copies.
/// A tensor as cuTensorMapEncodeTiled is told of it, in the place of what it makes of that. emulate.py packs it.
struct TensorMap {
    std::uint64_t base;
    std::uint64_t sizes[5];    // in elements, innermost first
    std::uint64_t strides[4];  // in bytes, of all but the innermost
    std::uint32_t box[5];      // in elements
    std::uint32_t rank, element_bytes, magic;
};
constexpr std::uint32_t TENSOR_MAP_MAGIC = 0x70414d54;

void load_tile(Address target, const void* map, Address barrier, int rank, const int* coordinates);
void load_bytes(Address target, const void* source, std::uint32_t bytes, Address barrier);
void store_tile(const void* map, Address source, int rank, const int* coordinates);
void store_bytes(void* target, Address source, std::uint32_t bytes, bool add_floats);
void commit_stores();
void wait_stores_read(int pending);
void wait_stores(int pending);

// The tensor cores.
float half_to_float(std::uint32_t bits);  // of fp16, in the lower half
struct ProductKind {
    int n;
    bool bf16, a_in_registers, a_transposed, b_transposed;
};
void begin_products();
void start_product(ProductKind kind, float* d, std::uint64_t a, const std::uint32_t* const* a_registers, std::uint64_t b,
                   bool accumulate);
void commit_products();
void wait_products(int pending);

// Fragments of a warp.
void store_matrices(Address row, const std::uint32_t (&registers)[4]);

}  // namespace emulator
