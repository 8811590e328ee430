// The machine from inside: blocks of warps of fibers, their memory, and what is under way beside them.
#pragma once
#include <csetjmp>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr unsigned WARP = 32, WARPGROUP_WARPS = 4;
constexpr std::uint32_t ALL_LANES = 0xffffffffu;
constexpr std::uint32_t GRANULE = 16;  // bytes of shared memory that are watched as one

struct Block;
struct Warp;

/// Something asynchronous that will happen at some time.
struct Happening {
    std::function<void()> act;
    bool done = false;
};
using Event = std::shared_ptr<Happening>;

using Bytes = std::vector<std::uint8_t>;

/// A copy from shared to global memory, by the thread that asked for it.
struct Store {
    Address source;
    Bytes bytes;  // as they lay there when it was asked for
    std::function<void(const Bytes&)> write;  // to global memory
    const void* pc;
};

/// A group of stores: first their shared memory is read, then what was read is written.
struct StoreGroup {
    std::vector<Store> unread;
    std::vector<Event> unwritten;
};

struct Fiber {
    enum class State { READY, BLOCKED, POLLING, DONE };
    Place place;
    Block* block;
    Warp* warp;
    unsigned lane;
    State state = State::READY;
    jmp_buf context;
    bool started = false;
    std::uint8_t* stack;
    const void* pc = nullptr;         // where it called the machine last
    const char* waits_for = nullptr;  // what, where BLOCKED
    std::uint32_t fences = 1;         // proxy fences so far
    std::vector<Store> open_stores;
    std::deque<StoreGroup> store_groups;
};

using Fibers = std::vector<Fiber*>;

/// Lanes that come together for one instruction.
struct Meeting {
    std::uint32_t mask, arrived = 0, generation = 0;
    const char* what = nullptr;
    std::uint64_t values[2][WARP];  // of this generation, and of the one that lanes may still be reading
};

/// Accumulators that belong to the tensor cores: a count of floats in every lane.
struct Claim {
    float* registers[WARP] = {};
    int count = 0;
    int products = 0;  // that will still change them
    std::vector<float> values;  // lane by lane
};

/// A product that was started.
struct Product {
    ProductKind kind;
    std::uint64_t a, b;
    bool accumulate;
    std::shared_ptr<Claim> claim;
    const std::uint32_t* registers[WARP][4] = {};
    std::uint32_t operand[WARP][4];  // what they held when it was started
    std::uint32_t lanes = 0;  // that have started it
    std::vector<std::uint16_t> a_tile, b_tile;  // 16 x 16 by row, 16 x n by depth: shared memory when it was started
    const void* pc;
};

struct Warp {
    Block* block;
    unsigned index;
    std::uint32_t ready = 0;  // lanes
    std::uint32_t priority = 0;
    std::deque<Meeting> meetings;
    // The tensor cores.
    std::deque<Product> products;  // not done
    std::uint64_t done = 0;        // before these
    std::uint64_t started[WARP] = {};
    std::deque<std::uint64_t> groups;  // not done: where each ends
    bool fenced = false;  // since the last wait
    std::uint64_t history = 0;  // of all products, as a hash
    std::vector<std::shared_ptr<Claim>> claims;
};

/// What happened last to a granule of shared memory.
struct Mark {
    std::uint16_t writer = 0;  // thread + 1, if by a thread
    std::uint16_t loads = 0, stores = 0;  // copies into and out of it, under way
    std::uint32_t fences = 0;  // the writer's, before it wrote
};

struct Region {
    std::uint8_t* base = nullptr;
    std::uint32_t size = 0;
    Address address = 0;
    std::vector<Mark> marks;
};

struct Barrier {
    std::uint32_t arrivals, pending;
    std::int64_t bytes = 0;
    std::uint32_t phase = 0;
    Fibers waiting;
};

struct NamedBarrier {
    std::uint32_t threads = 0, arrived = 0, generation = 0;
    Fibers waiting;
};

struct Block {
    unsigned index;
    Region dynamic, fixed;  // shared memory: of the launch, and declared in functions
    std::deque<Fiber> fibers;
    std::deque<Warp> warps;
    unsigned alive;
    unsigned loads = 0;  // under way
    std::unordered_map<Address, Barrier> barriers;
    NamedBarrier named[16];
    unsigned slot;
};

struct Launch {
    void (*kernel)(const void*);
    const void* params;
    unsigned grid, threads, shared_bytes, resident;
};

struct Machine {
    std::mt19937_64 random;
    Launch launch;
    std::vector<std::unique_ptr<Block>> blocks;  // resident
    unsigned next_block;
    std::vector<Event> events;
    unsigned haste;  // one decision in so many lands an event; 0: only when nothing else can happen
    bool progress;   // since the pollers last looked
    jmp_buf scheduler, failed;
    std::string error;

    /// A number below `end`.
    unsigned draw(unsigned end) { return random() % end; }
};

extern Machine machine;
extern Fiber* current;

/// Ends the launch with an error, told with where the running thread is.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// Suspends the running thread until `wake`.
void block_current(const char* what);
void wake(Fibers& waiting);
/// Others may run here.
void give_way();

void happen_later(Event event);
void happen_now(const Event& event);

/// The 128-byte swizzle: bits 4 to 6 of a shared address, by bits 7 to 9.
inline Address swizzled(Address address) { return address ^ (address >> 7 & 7) << 4; }

// memory.cpp
void begin_memory(Block& block, unsigned slot);
std::uint8_t* at(Address address, std::uint32_t bytes, Block& block, const char* what);
void note_write(Address address, std::uint32_t bytes);
void note_read(Address address, std::uint32_t bytes);
/// Fails if what an asynchronous reader will find is not what threads have written.
void check_visible(Address address, std::uint32_t bytes, const char* what);
void begin_load(Address address, std::uint32_t bytes);
void end_load(Block& block, Address address, std::uint32_t bytes);
void begin_store(Address address, std::uint32_t bytes);
void end_store(Block& block, Address address, std::uint32_t bytes);

// barriers.cpp
void arrive_bytes(Block& block, Address barrier, std::uint32_t bytes);
/// Lanes of `mask` come together; the last one calls `act`. Returns every lane's value, until its next meeting.
const std::uint64_t* meet(std::uint32_t mask, const char* what, std::uint64_t value, const std::function<void()>& act);

// copies.cpp, products.cpp
void end_thread_stores();
void end_warps(Block& block);

/// To be the first line of what device code calls.
#define CALLED ::emulator::current->pc = __builtin_return_address(0)

}  // namespace emulator
