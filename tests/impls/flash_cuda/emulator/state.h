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
constexpr std::uint32_t GRANULE = 16;  // bytes of shared memory that are watched together
constexpr unsigned MAX_BARRIERS = 128;  // in shared memory

struct Block;
struct Fiber;
struct Warp;

using Fibers = std::vector<Fiber*>;

/// How far each thread of a cluster, and each barrier's copies, have come by what somebody knows: a vector clock (Lamport
/// 1978; Mattern 1989). Threads that came together share one.
using Clock = std::shared_ptr<const std::vector<std::uint32_t>>;

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
    unsigned who;  // in clocks
    State state = State::READY;
    jmp_buf context;
    bool started = false;
    std::uint8_t* stack;
    const void* pc = nullptr;         // where it called the machine last
    const char* waits_for = nullptr;  // what, where BLOCKED
    std::uint32_t fences = 1;         // proxy fences so far
    std::uint32_t now = 1;            // own time: steps from one release to the next
    Clock known;                      // of the others
    std::vector<Store> open_stores;
    std::deque<StoreGroup> store_groups;
};

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

/// An access to some words of a granule of shared memory.
struct Access {
    std::uint16_t who;  // of a block's part of a clock a thread, or behind the threads a barrier: its copies
    std::uint8_t words;  // a bit for each
    bool writes;
    std::uint32_t when;  // by the clock of who
    std::uint32_t fences;  // of the thread, before it
};

/// A granule: accesses that nobody is known to have come after, and stores that are still to read it.
struct History {
    std::vector<Access> accesses;
    std::uint16_t stores = 0;
};

struct Region {
    std::uint8_t* base = nullptr;
    std::uint32_t size = 0;
    Address address = 0;
    std::vector<History> granules;
};

struct Barrier {
    std::uint32_t arrivals, pending;
    std::int64_t bytes = 0;
    std::uint32_t phase = 0;
    unsigned who = 0;            // in clocks
    unsigned initialiser = 0;    // thread, and its proxy fences before
    std::uint32_t fences = 0;
    std::uint32_t completed = 0;  // phases
    Clock clock, gathering;      // of what came before the last completed phase, and the running one
    Fibers waiting;
};

struct NamedBarrier {
    std::uint32_t threads = 0, generation = 0;
    Fibers arrived, waiting;
};

struct Block {
    unsigned index, rank;         // in the grid, in the cluster
    std::vector<Block*> cluster;  // by rank; they stay until all have ended
    NamedBarrier whole_cluster;   // of the first one
    Region dynamic, fixed;  // shared memory: of the launch, and declared in functions
    std::deque<Fiber> fibers;
    std::deque<Warp> warps;
    unsigned alive;
    unsigned loads = 0;  // under way, and copies to other blocks
    std::unordered_map<Address, Barrier> barriers;
    NamedBarrier named[16];
    unsigned slot;
};

struct Launch {
    void (*kernel)(const void*);
    const void* params;
    unsigned grid, threads, shared_bytes, resident, cluster;

    /// Of clocks, what belongs to one block.
    unsigned block_clock() const { return threads + MAX_BARRIERS; }
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

/// Within a cluster a shared address, a block's own too, has the block's rank above the offset. Matrix descriptors do not.
constexpr unsigned RANK_SHIFT = 24;
constexpr Address OFFSET_BITS = (1u << RANK_SHIFT) - 1;

/// The 128-byte swizzle: bits 4 to 6 of a shared address, by bits 7 to 9.
inline Address swizzled(Address address) { return address ^ (address >> 7 & 7) << 4; }

// memory.cpp
void begin_memory(Block& block, unsigned slot);
std::uint8_t* at(Address address, std::uint32_t bytes, Block& block, const char* what);
/// Accesses of the running thread. Each fails if another one of the same words, either of them a write, is not known to
/// have come before: if no barrier orders them.
void note_write(Address address, std::uint32_t bytes);
void note_read(Address address, std::uint32_t bytes);
/// The same of an asynchronous reader that the running thread starts, or has waited for.
void start_async_read(Address address, std::uint32_t bytes, const char* what);
void end_async_read(Address address, std::uint32_t bytes, const char* what);
/// A copy that writes; its place is known to be written when the barrier's running phase is complete.
void note_load(Block& block, Address address, std::uint32_t bytes, const Barrier& barrier);
/// A copy that reads until then.
void note_copied(Address address, std::uint32_t bytes, const Barrier& barrier);
void begin_store(Address address, std::uint32_t bytes);
void end_store(Address address, std::uint32_t bytes);

// clocks.cpp
Clock clock_of(const Fiber& fiber);  // with its own time
Clock joined(const Clock& a, const Clock& b);
Clock advanced(const Clock& clock, unsigned who, std::uint32_t when);
/// These threads have met.
void meet_clocks(const Fibers& fibers);
inline bool knows(const Fiber& fiber, const Access& access) {
    return access.who == fiber.who || (*fiber.known)[access.who] >= access.when;
}

// barriers.cpp
void complete(NamedBarrier& barrier);
/// Completes the barriers of all threads that only wait for some that have ended.
void complete_without_ended(Block& block);
/// The block of the running thread's cluster that an address is of.
Block& block_of(Address address);
Barrier& barrier_at(Block& block, Address barrier);
void arrive_bytes(Block& block, Address barrier, std::uint32_t bytes);
/// Lanes of `mask` come together; the last one calls `act`. Returns every lane's value, until its next meeting.
const std::uint64_t* meet(std::uint32_t mask, const char* what, std::uint64_t value, const std::function<void()>& act);

// copies.cpp, products.cpp
void end_thread_stores();
void end_warps(Block& block);

/// To be the first line of what device code calls.
#define CALLED ::emulator::current->pc = __builtin_return_address(0)

}  // namespace emulator
