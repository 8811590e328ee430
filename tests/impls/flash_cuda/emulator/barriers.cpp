// Barriers: of a warp, of the block by name, and in shared memory (mbarrier) with arrivals, bytes and phases.
#include <cstring>

#include "state.h"

namespace emulator {

const std::uint64_t* meet(std::uint32_t mask, const char* what, std::uint64_t value, const std::function<void()>& act) {
    Warp& warp = *current->warp;
    const std::uint32_t own = 1u << current->lane;
    if (!(mask & own)) fail("%s among lanes 0x%08x, which this one is not among", what, mask);
    Meeting* meeting = nullptr;
    for (Meeting& known : warp.meetings) {
        if (known.mask == mask) meeting = &known;
    }
    if (!meeting) {
        meeting = &warp.meetings.emplace_back();
        meeting->mask = mask;
    }
    if (!meeting->arrived) meeting->what = what;
    if (std::strcmp(meeting->what, what) != 0) {
        fail("the warp's lanes have parted: this one is at %s, others at %s", what, meeting->what);
    }
    const std::uint32_t generation = meeting->generation;
    std::uint64_t* values = meeting->values[generation & 1];
    values[current->lane] = value;
    meeting->arrived |= own;
    if (meeting->arrived == mask) {
        meeting->arrived = 0;
        ++meeting->generation;
        Fibers lanes;
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (mask >> lane & 1) lanes.push_back(&warp.block->fibers[warp.index * WARP + lane]);
        }
        meet_clocks(lanes);
        if (act) {
            act();
            meet_clocks(lanes);  // now all know of what that accessed
        }
        std::erase(lanes, current);
        wake(lanes);
    } else {
        while (meeting->generation == generation) block_current(what);
    }
    return values;
}

std::uint64_t exchange(std::uint32_t mask, std::uint64_t value, std::uint32_t source) {
    CALLED;
    if (!(mask >> source & 1)) fail("shuffle from lane %u, which is not in the mask 0x%08x", source, mask);
    return meet(mask, "a shuffle or __syncwarp", value, nullptr)[source];
}

std::uint32_t ballot(std::uint32_t mask, bool predicate) {
    CALLED;
    const std::uint64_t* values = meet(mask, "a vote", predicate, nullptr);
    std::uint32_t found = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (mask >> lane & 1 && values[lane]) found |= 1u << lane;
    }
    return found;
}

void complete(NamedBarrier& barrier) {
    meet_clocks(barrier.arrived);
    barrier.arrived.clear();
    ++barrier.generation;
    wake(barrier.waiting);
}

namespace {

const char* const NAMES[16] = {
    "__syncthreads",    "named barrier 1",  "named barrier 2",  "named barrier 3",  "named barrier 4",  "named barrier 5",
    "named barrier 6",  "named barrier 7",  "named barrier 8",  "named barrier 9",  "named barrier 10", "named barrier 11",
    "named barrier 12", "named barrier 13", "named barrier 14", "named barrier 15",
};

void meet_named(NamedBarrier& barrier, const char* name, std::uint32_t threads) {
    if (!barrier.arrived.empty() && barrier.threads != threads) {
        fail("%s of %u threads, which others take to be of %u", name, threads, barrier.threads);
    }
    barrier.threads = threads;
    const std::uint32_t generation = barrier.generation;
    barrier.arrived.push_back(current);
    if (barrier.arrived.size() == threads) {
        complete(barrier);
    } else {
        while (barrier.generation == generation) {
            barrier.waiting.push_back(current);
            block_current(name);
        }
    }
}

void check_named(std::uint32_t id, std::uint32_t threads) {
    if (id < 1 || id > 15) fail("named barrier %u; there are 1 to 15", id);
    if (threads == 0 || threads % WARP) fail("named barrier %u of %u threads, which are not whole warps", id, threads);
}

}  // namespace

void sync_block() {
    CALLED;
    NamedBarrier& all = current->block->named[0];
    if (!all.arrived.empty()) all.threads = current->block->alive;  // some may have ended since
    meet_named(all, NAMES[0], current->block->alive);
}

namespace {

unsigned alive_in_cluster(const Block& block) {
    unsigned alive = 0;
    for (const Block* other : block.cluster) alive += other->alive;
    return alive;
}

}  // namespace

void sync_cluster() {
    CALLED;
    NamedBarrier& all = current->block->cluster[0]->whole_cluster;
    const unsigned alive = alive_in_cluster(*current->block);
    if (!all.arrived.empty()) all.threads = alive;
    meet_named(all, "barrier.cluster", alive);
}

void complete_without_ended(Block& block) {
    NamedBarrier &own = block.named[0], &all = block.cluster[0]->whole_cluster;
    if (!own.arrived.empty() && own.arrived.size() == block.alive) complete(own);
    if (!all.arrived.empty() && all.arrived.size() == alive_in_cluster(block)) complete(all);
}

void sync_named(std::uint32_t id, std::uint32_t threads) {
    CALLED;
    check_named(id, threads);
    meet_named(current->block->named[id], NAMES[id], threads);
}

namespace {

constexpr std::uint64_t SEAL = 0x7265697272616221;  // what memory holds where a barrier lies

}  // namespace

Barrier& barrier_at(Block& block, Address address) {
    std::uint64_t word;
    if (address % sizeof word) fail("barrier at shared address 0x%x, which is not a multiple of 8", address);
    std::memcpy(&word, at(address, sizeof word, block, "barrier"), sizeof word);
    const auto found = block.barriers.find(address);
    if (found == block.barriers.end()) fail("the barrier at shared address 0x%x was never initialised", address);
    if (word != (SEAL ^ address)) fail("the barrier at shared address 0x%x was overwritten", address);
    return found->second;
}

namespace {

void complete_if_due(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
    ++barrier.completed;
    barrier.gathering = advanced(barrier.gathering, barrier.who, barrier.completed);
    barrier.clock = barrier.gathering;
    wake(barrier.waiting);
}

}  // namespace

void barrier_init(Address address, std::uint32_t arrivals) {
    CALLED;
    Block& block = *current->block;
    const std::uint64_t word = SEAL ^ address;
    if (address % sizeof word) fail("barrier at shared address 0x%x, which is not a multiple of 8", address);
    if (arrivals == 0) fail("a barrier of no arrivals");
    std::memcpy(at(address, sizeof word, block, "barrier"), &word, sizeof word);
    if (block.barriers.count(address)) fail("the barrier at shared address 0x%x is initialised twice", address);
    if (block.barriers.size() == MAX_BARRIERS) fail("more than %u barriers", MAX_BARRIERS);
    Barrier barrier{};
    barrier.arrivals = barrier.pending = arrivals;
    barrier.who = block.rank * machine.launch.block_clock() + machine.launch.threads + block.barriers.size();
    barrier.initialiser = current->place.thread.x;
    barrier.fences = current->fences;
    barrier.clock = barrier.gathering = clock_of(*current);
    block.barriers[address] = barrier;
}

namespace {

void arrive_at(Block& block, Address address, std::uint32_t bytes, bool expects) {
    give_way();
    Barrier& barrier = barrier_at(block, address);
    if (expects) barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20) fail("a barrier cannot wait for %lld bytes", static_cast<long long>(barrier.bytes));
    if (barrier.pending == 0) fail("more arrivals than the %u of the barrier's phase", barrier.arrivals);
    --barrier.pending;
    barrier.gathering = joined(barrier.gathering, clock_of(*current));
    ++current->now;
    complete_if_due(barrier);
}

}  // namespace

void barrier_arrive(Address address, std::uint32_t bytes, bool expects) {
    CALLED;
    arrive_at(*current->block, address, bytes, expects);
}

void arrive_remote(Address address) {
    CALLED;
    Block& block = block_of(address);
    arrive_at(block, address, 0, false);
}

std::uint32_t cluster_rank() { return current->block->rank; }

Address remote_address(Address address, std::uint32_t rank) {
    CALLED;
    if (rank >= machine.launch.cluster) fail("block %u of a cluster of %u", rank, machine.launch.cluster);
    return (address & OFFSET_BITS) | rank << RANK_SHIFT;
}

Block& block_of(Address address) {
    const unsigned rank = address >> RANK_SHIFT;
    if (rank >= machine.launch.cluster) fail("0x%x is no address in the cluster", address);
    Block& block = *current->block->cluster[rank];
    if (!block.alive) fail("block %u of the cluster has ended", rank);
    return block;
}

void arrive_bytes(Block& block, Address address, std::uint32_t bytes) {
    Barrier& barrier = barrier_at(block, address);
    barrier.bytes -= bytes;
    complete_if_due(barrier);
}

bool barrier_done(Address address, std::uint32_t parity) {
    CALLED;
    const Barrier& barrier = barrier_at(*current->block, address);
    const bool done = barrier.phase != (parity & 1);
    if (done) current->known = joined(current->known, barrier.clock);
    return done;
}

void barrier_wait(Address address, std::uint32_t parity) {
    CALLED;
    Block& block = *current->block;
    if (parity > 1) fail("parity %u", parity);
    while (barrier_at(block, address).phase == parity) {
        barrier_at(block, address).waiting.push_back(current);
        block_current(parity ? "a barrier's phase 1" : "a barrier's phase 0");
    }
    current->known = joined(current->known, barrier_at(block, address).clock);
}

}  // namespace emulator
