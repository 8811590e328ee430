// Shared memory: poisoned, watched, and fenced off.
//
// The device code is compiled with the calls of the thread sanitizer and finds them here: so every access to shared
// memory is seen, and remembered with the time at which it was by its thread's clock: two that conflict must be ordered by
// barriers, in whatever order this run had them (a race detector as FastTrack is one: Flanagan & Freund 2009).
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "state.h"

namespace emulator {

namespace {

constexpr std::uint32_t SLOT = 1 << 20;          // of host memory a block, its arena in the middle
constexpr std::uint32_t MARGIN = 1 << 18;        // on both sides, where an access is an error
constexpr Address FIRST = 1024;                  // as on the device, where the system has the first KB
constexpr Address FIXED = 1 << 20;               // variables declared __shared__, which this machine keeps elsewhere
constexpr unsigned SLOTS = 64;

std::uint8_t* arenas() {
    static auto* memory = static_cast<std::uint8_t*>(
        mmap(nullptr, std::size_t{SLOT} * SLOTS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return memory;
}

std::uintptr_t arenas_begin = 0, fixed_begin = 0, fixed_size = 0;

Region* region_of(Address address, Block& block) {
    return (address & OFFSET_BITS) < FIXED ? &block.dynamic : &block.fixed;
}

/// Call with every granule that a range touches, and the words of it, a bit for each.
template <class Use>
void each_granule(Region& region, Address address, std::uint32_t bytes, Use use) {
    const std::uint32_t begin = address - region.address, end = begin + bytes;
    for (std::uint32_t i = begin / GRANULE; i * GRANULE < end; ++i) {
        const std::uint32_t first = i * GRANULE < begin ? (begin - i * GRANULE) / 4 : 0;
        const std::uint32_t last = (std::min(end - i * GRANULE, GRANULE) - 1) / 4;
        use(region.granules[i], static_cast<std::uint8_t>((2u << last) - (1u << first)));
    }
}

void check_range(const Region& region, Address address, std::uint32_t bytes, const char* what) {
    if (address < region.address || bytes > region.size || address - region.address > region.size - bytes) {
        fail("%s of %u bytes at shared address 0x%x: the block's shared memory is [0x%x, 0x%x)", what, bytes, address,
             region.address, region.address + region.size);
    }
}

std::string name_of(const Access& access) {
    const unsigned threads = machine.launch.threads, each = machine.launch.block_clock(), who = access.who % each;
    std::string name;
    if (who < threads) {
        name = std::string(access.writes ? "the write" : "the read") + " of thread " + std::to_string(who);
    } else {
        name = std::string(access.writes ? "a copy into it" : "a copy of it") + " (barrier " + std::to_string(who - threads) + " of the block)";
    }
    return machine.launch.cluster > 1 ? name + " of the cluster's block " + std::to_string(access.who / each) : name;
}

[[noreturn]] void report_race(const Access& before, Address address, const char* what) {
    fail("race: %s shared address 0x%x, and no barrier puts that after %s", what, address, name_of(before).c_str());
}

/// Adds an access of the running thread to a history, where it comes after all that conflict with it.
void add(History& history, const Access& access, Address address, const char* what) {
    auto& known = history.accesses;
    if (access.writes && history.stores) {
        fail("race: %s shared address 0x%x, from which a store is still to read", what, address);
    }
    for (std::size_t i = 0; i < known.size();) {
        const Access& before = known[i];
        const bool conflicts = before.words & access.words && (before.writes || access.writes);
        // What comes after this access comes after that one too.
        const bool covered = !(before.words & ~access.words) && (access.writes || !before.writes);
        const bool ordered = (conflicts || covered) && knows(*current, before);
        if (conflicts && !ordered) report_race(before, address, what);
        if (ordered && covered) {
            known[i] = known.back();
            known.pop_back();
        } else {
            ++i;
        }
    }
    known.push_back(access);
}

void write_seen(Region& region, Address address, std::uint32_t bytes) {
    each_granule(region, address, bytes, [&](History& history, std::uint8_t words) {
        add(history, {static_cast<std::uint16_t>(current->who), words, true, current->now, current->fences},
            address, "writes");
    });
}

void read_seen(Region& region, Address address, std::uint32_t bytes) {
    each_granule(region, address, bytes, [&](History& history, std::uint8_t words) {
        add(history, {static_cast<std::uint16_t>(current->who), words, false, current->now, 0}, address,
            "reads");
    });
}

/// What an asynchronous access, started by the running thread, comes after: writes that it knows of, each with its
/// thread's proxy fence.
void check_start(const History& history, Address address, std::uint8_t words, const char* what) {
    for (const Access& before : history.accesses) {
        if (!before.writes || !(before.words & words)) continue;
        const unsigned each = machine.launch.block_clock(), thread = before.who % each;
        if (thread < machine.launch.threads &&
            current->block->cluster[before.who / each]->fibers[thread].fences == before.fences) {
            fail("%s shared address 0x%x, which thread %u wrote without a proxy fence since (fence.proxy.async)", what,
                 address, thread);
        }
        if (!knows(*current, before)) report_race(before, address, what);
    }
}

/// What the compiler put before an access of the device code.
inline __attribute__((always_inline)) void seen(std::uintptr_t pointer, std::uint32_t bytes, bool writes) {
    if (pointer - arenas_begin < std::uintptr_t{SLOT} * SLOTS) {
        current->pc = __builtin_return_address(0);
        const std::uintptr_t base = reinterpret_cast<std::uintptr_t>(current->block->dynamic.base);
        const std::int64_t offset = static_cast<std::int64_t>(pointer - base);
        Region& region = current->block->dynamic;
        if (offset < 0 || offset + bytes > region.size) {
            fail("%s of %u bytes at offset %lld of %u bytes of shared memory", writes ? "write" : "read", bytes,
                 static_cast<long long>(offset), region.size);
        }
        const Address address = region.address + static_cast<std::uint32_t>(offset);
        writes ? write_seen(region, address, bytes) : read_seen(region, address, bytes);
    } else if (pointer - fixed_begin < fixed_size) {
        current->pc = __builtin_return_address(0);
        // There is one of it, while the launch's shared memory is each block's own.
        if (machine.launch.resident > 1) fail("a variable declared __shared__, beside shared memory of the launch");
        Region& region = current->block->fixed;
        const Address address = region.address + static_cast<std::uint32_t>(pointer - fixed_begin);
        writes ? write_seen(region, address, bytes) : read_seen(region, address, bytes);
    }
}

}  // namespace

void begin_memory(Block& block, unsigned slot) {
    arenas_begin = reinterpret_cast<std::uintptr_t>(arenas());
    if (slot >= SLOTS) fail("more resident blocks than this machine has room for");
    const auto fill = [](Region& region) {
        region.granules.assign((region.size + GRANULE - 1) / GRANULE, {});
        std::memset(region.base, 0xFF, region.size);  // NaN
    };
    const Address rank = block.rank << RANK_SHIFT;
    block.dynamic = {arenas() + std::size_t{slot} * SLOT + MARGIN, machine.launch.shared_bytes, rank | FIRST, {}};
    fill(block.dynamic);
    const Address fixed_address = rank | (FIXED + fixed_begin % 1024);  // as aligned as it is
    block.fixed = {reinterpret_cast<std::uint8_t*>(fixed_begin), static_cast<std::uint32_t>(fixed_size), fixed_address, {}};
    fill(block.fixed);
}

std::uint8_t* at(Address address, std::uint32_t bytes, Block& block, const char* what) {
    Region& region = *region_of(address, block);
    check_range(region, address, bytes, what);
    return region.base + (address - region.address);
}

void note_write(Address address, std::uint32_t bytes) {
    at(address, bytes, *current->block, "write");
    write_seen(*region_of(address, *current->block), address, bytes);
}

void note_read(Address address, std::uint32_t bytes) {
    at(address, bytes, *current->block, "read");
    read_seen(*region_of(address, *current->block), address, bytes);
}

void start_async_read(Address address, std::uint32_t bytes, const char* what) {
    at(address, bytes, *current->block, what);
    each_granule(*region_of(address, *current->block), address, bytes,
                 [&](History& history, std::uint8_t words) { check_start(history, address, words, what); });
}

void end_async_read(Address address, std::uint32_t bytes, const char* what) {
    each_granule(*region_of(address, *current->block), address, bytes, [&](History& history, std::uint8_t words) {
        add(history, {static_cast<std::uint16_t>(current->who), words, false, current->now, 0}, address, what);
    });
}

void note_load(Block& block, Address address, std::uint32_t bytes, const Barrier& barrier) {
    std::uint8_t* target = at(address, bytes, block, "a copy into");
    if (block.fibers[barrier.initialiser].fences == barrier.fences) {
        fail("a copy counts on a barrier that thread %u initialised without a fence since", barrier.initialiser);
    }
    const auto who = static_cast<std::uint16_t>(barrier.who);
    each_granule(*region_of(address, block), address, bytes, [&](History& history, std::uint8_t words) {
        check_start(history, address, words, "a copy writes");
        add(history, {who, words, true, barrier.completed + 1, 0}, address, "a copy writes");
    });
    std::memset(target, 0xFF, bytes);  // it may come at once, piece by piece: nothing there can be relied on
}

void note_copied(Address address, std::uint32_t bytes, const Barrier& barrier) {
    start_async_read(address, bytes, "a copy reads");
    each_granule(*region_of(address, *current->block), address, bytes, [&](History& history, std::uint8_t words) {
        add(history, {static_cast<std::uint16_t>(barrier.who), words, false, barrier.completed + 1, 0}, address,
            "a copy reads");
    });
}

void begin_store(Address address, std::uint32_t bytes) {
    start_async_read(address, bytes, "a copy reads");
    each_granule(*region_of(address, *current->block), address, bytes,
                 [&](History& history, std::uint8_t) { ++history.stores; });
}

void end_store(Address address, std::uint32_t bytes) {
    each_granule(*region_of(address, *current->block), address, bytes,
                 [&](History& history, std::uint8_t) { --history.stores; });
    end_async_read(address, bytes, "a copy reads");
}

void* shared_memory() { return current->block->dynamic.base; }

Address shared_address(const void* pointer) {
    CALLED;
    const auto value = reinterpret_cast<std::uintptr_t>(pointer);
    if (value - fixed_begin < fixed_size) {
        return current->block->fixed.address + static_cast<Address>(value - fixed_begin);
    }
    const Region& region = current->block->dynamic;
    const std::intptr_t offset = value - reinterpret_cast<std::uintptr_t>(region.base);
    // One past the end is a pointer too.
    if (offset < 0 || offset > region.size) fail("the shared address of %p, which is not in shared memory", pointer);
    return region.address + static_cast<Address>(offset);
}

void read_shared(void* target, Address source, std::uint32_t bytes) {
    CALLED;
    note_read(source, bytes);
    std::memcpy(target, at(source, bytes, *current->block, "read"), bytes);
}

void write_shared(Address target, const void* source, std::uint32_t bytes) {
    CALLED;
    note_write(target, bytes);
    std::memcpy(at(target, bytes, *current->block, "write"), source, bytes);
}

void fence_async() {
    CALLED;
    ++current->fences;
}

}  // namespace emulator

/// Where a kernel's library keeps the variables that it declares __shared__ (with everything else that begins as 0).
extern "C" void emulator_fixed_memory(void* begin, void* end) {
    emulator::fixed_begin = reinterpret_cast<std::uintptr_t>(begin);
    emulator::fixed_size = static_cast<std::uint8_t*>(end) - static_cast<std::uint8_t*>(begin);
}

#define SEEN(bytes)                                                                                                    \
    extern "C" void __tsan_read##bytes(void* p) { emulator::seen(reinterpret_cast<std::uintptr_t>(p), bytes, false); } \
    extern "C" void __tsan_write##bytes(void* p) { emulator::seen(reinterpret_cast<std::uintptr_t>(p), bytes, true); } \
    extern "C" void __tsan_unaligned_read##bytes(void* p) {                                                            \
        emulator::seen(reinterpret_cast<std::uintptr_t>(p), bytes, false);                                             \
    }                                                                                                                  \
    extern "C" void __tsan_unaligned_write##bytes(void* p) {                                                           \
        emulator::seen(reinterpret_cast<std::uintptr_t>(p), bytes, true);                                              \
    }                                                                                                                  \
    extern "C" void __tsan_volatile_read##bytes(void* p) {                                                             \
        emulator::seen(reinterpret_cast<std::uintptr_t>(p), bytes, false);                                             \
    }                                                                                                                  \
    extern "C" void __tsan_volatile_write##bytes(void* p) {                                                            \
        emulator::seen(reinterpret_cast<std::uintptr_t>(p), bytes, true);                                              \
    }
SEEN(1)
SEEN(2)
SEEN(4)
SEEN(8)
SEEN(16)
extern "C" void __tsan_read_range(void* p, unsigned long bytes) {
    emulator::seen(reinterpret_cast<std::uintptr_t>(p), static_cast<std::uint32_t>(bytes), false);
}
extern "C" void __tsan_write_range(void* p, unsigned long bytes) {
    emulator::seen(reinterpret_cast<std::uintptr_t>(p), static_cast<std::uint32_t>(bytes), true);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
