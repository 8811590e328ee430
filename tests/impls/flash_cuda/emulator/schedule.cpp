// Threads as fibers, and the order in which they run: drawn from the seed, so that a run repeats.
//
// Every warp has a random priority, redrawn now and then, and the warp of the highest priority that can run does (Burckhardt
// et al. 2010, "A randomized scheduler with probabilistic guarantees of finding bugs"). Asynchronous events come when
// nothing else can happen, or in between, as the seed has it.
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

#include "state.h"

namespace emulator {

Machine machine;
Fiber* current;
Place* place;

namespace {

constexpr std::size_t STACK = 128 * 1024, POISONED_STACK = 12 * 1024;
constexpr unsigned PRIORITY_REDRAWN = 64;  // decisions, on average

std::string where(const void* pc) {
    Dl_info info;
    char text[64] = "?";
    if (pc && dladdr(pc, &info)) {
        // One less: a return address may already belong to the next line.
        const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
        std::snprintf(text, sizeof text, "{0x%zx}", static_cast<std::size_t>(offset));
    }
    return text;
}

/// Stacks of the resident blocks' threads, kept from launch to launch, an unreadable page below each.
std::uint8_t* stack_of(std::size_t index) {
    static std::vector<std::uint8_t*> stacks;
    while (stacks.size() <= index) {
        void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for stacks");
        mprotect(memory, 4096, PROT_NONE);
        stacks.push_back(static_cast<std::uint8_t*>(memory));
    }
    return stacks[index];
}

[[noreturn]] void leave() { _longjmp(machine.scheduler, 1); }

void run_thread() {
    machine.launch.kernel(machine.launch.params);
    end_thread_stores();
    current->state = Fiber::State::DONE;
    leave();
}

/// Runs a thread until it suspends itself. Returns after the longjmp of `leave`.
__attribute__((noinline)) void resume(Fiber& fiber) {
    current = &fiber;
    place = &fiber.place;
    fiber.state = Fiber::State::READY;
    if (_setjmp(machine.scheduler)) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    // What no instruction has set is not 0: as floats all ones are NaN.
    std::memset(fiber.stack + STACK - POISONED_STACK, 0xFF, POISONED_STACK);
    static ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = fiber.stack;
    first.uc_stack.ss_size = STACK;
    first.uc_link = nullptr;
    makecontext(&first, run_thread, 0);
    setcontext(&first);
}

__attribute__((noinline)) void suspend() {
    current->warp->ready &= ~(1u << current->lane);
    if (_setjmp(current->context) == 0) leave();
}

void make_ready(Fiber& fiber) {
    fiber.state = Fiber::State::READY;
    fiber.warp->ready |= 1u << fiber.lane;
}

void start_block(unsigned slot, unsigned rank) {
    auto block = std::make_unique<Block>();
    const Launch& launch = machine.launch;
    block->index = machine.next_block++;
    block->slot = slot;
    block->rank = rank;
    block->alive = launch.threads;
    begin_memory(*block, slot);
    const auto nothing = std::make_shared<std::vector<std::uint32_t>>(launch.cluster * launch.block_clock());
    for (unsigned t = 0; t < launch.threads; ++t) {
        if (t % WARP == 0) {
            Warp& warp = block->warps.emplace_back();
            warp.block = block.get();
            warp.index = t / WARP;
            warp.priority = machine.random();
        }
        Fiber& fiber = block->fibers.emplace_back();
        fiber.place = {{t}, {block->index}, {launch.threads, 1, 1}, {launch.grid, 1, 1}};
        fiber.block = block.get();
        fiber.warp = &block->warps.back();
        fiber.lane = t % WARP;
        fiber.who = rank * launch.block_clock() + t;
        fiber.known = nothing;
        fiber.stack = stack_of(slot * launch.threads + t);
        make_ready(fiber);
    }
    machine.blocks.push_back(std::move(block));
}

/// The next blocks of the grid, in slots that are free.
void start_cluster() {
    std::vector<Block*> started;
    for (unsigned rank = 0; rank < machine.launch.cluster; ++rank) {
        unsigned slot = 0;
        while (std::any_of(machine.blocks.begin(), machine.blocks.end(), [&](auto& b) { return b->slot == slot; })) ++slot;
        start_block(slot, rank);
        started.push_back(machine.blocks.back().get());
    }
    for (Block* block : started) block->cluster = started;
}

void end_block(Block& block) {
    current = &block.fibers.back();
    if (block.loads) fail("the block ends while %u copies into its shared memory are under way", block.loads);
    end_warps(block);
}

/// A thread that can run, or null.
Fiber* choose() {
    Warp* best = nullptr;
    for (auto& block : machine.blocks) {
        for (Warp& warp : block->warps) {
            if (warp.ready && (!best || warp.priority > best->priority)) best = &warp;
        }
    }
    if (!best) return nullptr;
    if (machine.draw(PRIORITY_REDRAWN) == 0) best->priority = machine.random();
    const unsigned turn = machine.draw(WARP);
    const std::uint32_t turned = best->ready >> turn | (turn ? best->ready << (WARP - turn) : 0);
    const unsigned lane = (__builtin_ctz(turned) + turn) % WARP;
    return &best->block->fibers[best->index * WARP + lane];
}

bool land_event() {
    if (machine.events.empty()) return false;
    happen_now(machine.events[machine.draw(machine.events.size())]);
    return true;
}

/// Whether there are threads that look at memory again and again; they get another look.
bool wake_pollers() {
    bool any = false;
    for (auto& block : machine.blocks) {
        for (Fiber& fiber : block->fibers) {
            if (fiber.state == Fiber::State::POLLING) {
                make_ready(fiber);
                any = true;
            }
        }
    }
    return any;
}

[[noreturn]] void report_deadlock() {
    std::string text = "deadlock:";
    for (auto& block : machine.blocks) {
        std::map<std::pair<std::string, std::string>, std::vector<unsigned>> stuck;
        for (Fiber& fiber : block->fibers) {
            if (fiber.state == Fiber::State::DONE) continue;
            const char* what = fiber.state == Fiber::State::POLLING ? "memory to change" : fiber.waits_for;
            stuck[{what ? what : "?", where(fiber.pc)}].push_back(fiber.place.thread.x);
        }
        for (auto& [reason, threads] : stuck) {
            text += "\n  block " + std::to_string(block->index) + ", " + std::to_string(threads.size()) + " threads (" +
                    std::to_string(threads.front()) + " to " + std::to_string(threads.back()) + ") wait for " +
                    reason.first + " at " + reason.second;
        }
    }
    machine.error = text;
    _longjmp(machine.failed, 1);
}

void run_blocks() {
    const Launch& launch = machine.launch;
    unsigned idle = 0;
    for (;;) {
        while (machine.blocks.size() + launch.cluster <= launch.resident && machine.next_block < launch.grid) start_cluster();
        if (machine.blocks.empty()) break;
        if (machine.haste && machine.draw(machine.haste) == 0) land_event();
        if (machine.draw(256) == 0) wake_pollers();
        Fiber* next = choose();
        if (!next) {
            if (land_event()) continue;
            // Nothing can happen unless a poller sees something new; one may need several looks.
            idle = machine.progress ? 0 : idle + 1;
            machine.progress = false;
            if (idle == 100 || !wake_pollers()) report_deadlock();
            continue;
        }
        resume(*next);
        if (next->state == Fiber::State::DONE) {
            next->warp->ready &= ~(1u << next->lane);
            machine.progress = true;
            Block& block = *next->block;
            --block.alive;
            complete_without_ended(block);
            if (block.alive == 0) end_block(block);
            const std::vector<Block*> cluster = block.cluster;
            if (std::all_of(cluster.begin(), cluster.end(), [](Block* b) { return b->alive == 0; })) {
                const unsigned first = cluster.front()->index;
                std::erase_if(machine.blocks, [&](auto& b) { return b->index - first < cluster.size(); });
            }
        }
    }
    while (land_event()) {
    }
}

}  // namespace

void fail(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    machine.error = text;
    if (current) {
        machine.error += "\n  by block " + std::to_string(current->place.block.x) + ", thread " +
                         std::to_string(current->place.thread.x) + " at " + where(current->pc);
    }
    _longjmp(machine.failed, 1);
}

void block_current(const char* what) {
    machine.progress = true;
    current->state = Fiber::State::BLOCKED;
    current->waits_for = what;
    suspend();
}

void wake(Fibers& waiting) {
    for (Fiber* fiber : waiting) make_ready(*fiber);
    waiting.clear();
}

void preempt() {
    CALLED;
    give_way();
}

void give_way() {
    machine.progress = true;
    if (machine.draw(8)) return;
    // Stays ready, and gives way to whoever is chosen.
    current->warp->priority = machine.random();
    if (_setjmp(current->context) == 0) leave();
}

void poll() {
    CALLED;
    current->state = Fiber::State::POLLING;
    suspend();
}

void happen_later(Event event) { machine.events.push_back(std::move(event)); }

void happen_now(const Event& event) {
    const Event kept = event;
    if (kept->done) return;
    kept->done = true;
    machine.events.erase(std::find(machine.events.begin(), machine.events.end(), kept));
    machine.progress = true;
    Fiber* const running = current;
    current = nullptr;
    kept->act();
    kept->act = nullptr;  // and what it holds
    current = running;
}

}  // namespace emulator

/// One launch, called from Python. Returns null, or what went wrong; {0x...} is an offset into the kernel's library.
extern "C" const char* emulator_launch(void (*kernel)(const void*), const void* params, unsigned grid, unsigned threads,
                                       unsigned shared_bytes, unsigned resident, unsigned cluster,
                                       std::uint64_t seed) {
    using namespace emulator;
    machine.random.seed(seed);
    machine.launch = {kernel, params, grid, threads, shared_bytes, std::max(resident, cluster), cluster};
    machine.blocks.clear();
    machine.events.clear();
    machine.next_block = 0;
    machine.progress = true;
    const unsigned tempers[] = {0, 4, 64, 512};
    machine.haste = tempers[machine.draw(4)];
    machine.error.clear();
    current = nullptr;
    if (_setjmp(machine.failed) == 0) {
        if (grid % cluster) fail("a grid of %u blocks in clusters of %u", grid, cluster);
        run_blocks();
    }
    current = nullptr;
    return machine.error.empty() ? nullptr : machine.error.c_str();
}
