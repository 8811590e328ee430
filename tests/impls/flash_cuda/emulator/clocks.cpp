// Who knows of what: the order of events that barriers make, whatever order the scheduler drew.
#include <algorithm>

#include "state.h"

namespace emulator {

Clock clock_of(const Fiber& fiber) { return advanced(fiber.known, fiber.who, fiber.now); }

Clock advanced(const Clock& clock, unsigned who, std::uint32_t when) {
    auto copy = std::make_shared<std::vector<std::uint32_t>>(*clock);
    (*copy)[who] = when;
    return copy;
}

Clock joined(const Clock& a, const Clock& b) {
    if (a == b || !b) return a;
    if (!a) return b;
    // The lanes of a warp ask the same one after the other.
    static Clock last_a, last_b, last;
    if (a == last_a && b == last_b) return last;
    auto copy = std::make_shared<std::vector<std::uint32_t>>(*a);
    for (std::size_t i = 0; i < copy->size(); ++i) (*copy)[i] = std::max((*copy)[i], (*b)[i]);
    last_a = a;
    last_b = b;
    last = copy;
    return last;
}

void meet_clocks(const Fibers& fibers) {
    Clock all;
    const Clock* before = nullptr;
    for (const Fiber* fiber : fibers) {
        if (!before || *before != fiber->known) all = joined(all, fiber->known);
        before = &fiber->known;
    }
    auto met = std::make_shared<std::vector<std::uint32_t>>(*all);
    for (const Fiber* fiber : fibers) (*met)[fiber->who] = fiber->now;
    for (Fiber* fiber : fibers) {
        fiber->known = met;
        ++fiber->now;
    }
}

}  // namespace emulator
