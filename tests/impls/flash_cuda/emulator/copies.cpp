// The copy engine: tiles of tensors and runs of bytes, to shared memory and from it.
//
// A copy in comes at a time that the scheduler draws; until then its place holds NaN and may not be touched. A copy out
// reads shared memory as late as it may, when its thread waits for that, and is seen in global memory later still: when
// its thread waits for that, or at a time that the scheduler draws.
#include <algorithm>
#include <cstring>
#include <memory>

#include "state.h"

namespace emulator {

namespace {

constexpr std::uint32_t SWIZZLED_ROW = 128;

struct Box {
    TensorMap map;
    int at[5];

    std::uint32_t row_bytes() const { return map.box[0] * map.element_bytes; }
    std::uint32_t bytes() const {
        std::uint32_t rows = 1;
        for (unsigned d = 1; d < map.rank; ++d) rows *= map.box[d];
        return rows * row_bytes();
    }

    /// Call with (offset in the unswizzled tile, address in global memory, bytes inside the tensor, at its begin) of every
    /// row, and how many elements before the inside lie outside.
    template <class Use>
    void each_row(Use use) const {
        std::uint32_t index[5] = {};
        for (std::uint32_t offset = 0; offset < bytes(); offset += row_bytes()) {
            std::uint64_t address = map.base;
            bool inside = true;
            for (unsigned d = 1; d < map.rank; ++d) {
                const std::int64_t coordinate = std::int64_t{at[d]} + index[d];
                inside = inside && 0 <= coordinate && coordinate < static_cast<std::int64_t>(map.sizes[d]);
                address += coordinate * map.strides[d - 1];
            }
            const std::int64_t begin = std::max<std::int64_t>(at[0], 0);
            const std::int64_t end = std::min<std::int64_t>(std::int64_t{at[0]} + map.box[0], map.sizes[0]);
            if (inside && begin < end) {
                use(offset + static_cast<std::uint32_t>(begin - at[0]) * map.element_bytes,
                    reinterpret_cast<std::uint8_t*>(address + begin * map.element_bytes),
                    static_cast<std::uint32_t>(end - begin) * map.element_bytes);
            }
            for (unsigned d = 1; d < map.rank && ++index[d] == map.box[d]; ++d) index[d] = 0;
        }
    }
};

Box box_of(const void* map, int rank, const int* coordinates, Address shared) {
    Box box;
    std::memcpy(&box.map, map, sizeof box.map);
    if (box.map.magic != TENSOR_MAP_MAGIC) fail("a copy by something that is no tensor map");
    if (static_cast<int>(box.map.rank) != rank) fail("%d coordinates for a tensor map of %u", rank, box.map.rank);
    if (box.row_bytes() != SWIZZLED_ROW) fail("a box's row of %u bytes, swizzled in rows of 128", box.row_bytes());
    if (shared % 128) fail("a tile at shared address 0x%x, which is not a multiple of 128", shared);
    std::memcpy(box.at, coordinates, rank * sizeof(int));
    return box;
}

/// Move bytes between an unswizzled run and a tile that is swizzled by its address.
template <class Move>
void each_chunk(Address tile, std::uint32_t offset, std::uint32_t bytes, Move move) {
    for (std::uint32_t done = 0; done < bytes;) {
        const std::uint32_t part = std::min(bytes - done, GRANULE - (offset + done) % GRANULE);
        move(swizzled(tile + offset + done), done, part);
        done += part;
    }
}

void load_later(Address target, std::uint32_t bytes, Address barrier, std::function<void(Block&)> write) {
    Block& block = *current->block;
    note_load(block, target, bytes, barrier_at(block, barrier));
    ++block.loads;
    give_way();
    auto event = std::make_shared<Happening>();
    event->act = [&block, target, bytes, barrier, write = std::move(write)] {
        write(block);
        --block.loads;
        arrive_bytes(block, barrier, bytes);
    };
    happen_later(std::move(event));
}

/// Into another block of the cluster, where who sees it arrive comes after all that the running thread has done or seen
/// done (its complete-tx is a release at cluster scope). `send`: what to write there, when it happens.
void send_later(Address target, std::uint32_t bytes, Address barrier, std::function<Bytes(Block& from)> send) {
    Block &from = *current->block, &to = block_of(target);
    if (&block_of(barrier) != &to) fail("a copy to one block of the cluster counts on a barrier of another");
    note_load(to, target, bytes, barrier_at(to, barrier));
    ++from.loads;
    ++to.loads;
    const Clock sent = clock_of(*current);
    ++current->now;
    give_way();
    auto event = std::make_shared<Happening>();
    event->act = [&from, &to, target, bytes, barrier, sent, send = std::move(send)] {
        std::memcpy(at(target, bytes, to, "copy"), send(from).data(), bytes);
        --from.loads;
        --to.loads;
        Barrier& arrived = barrier_at(to, barrier);
        arrived.gathering = joined(arrived.gathering, sent);
        arrive_bytes(to, barrier, bytes);
    };
    happen_later(std::move(event));
}

void store_later(Address source, Bytes bytes, std::function<void(const Bytes&)> write) {
    begin_store(source, static_cast<std::uint32_t>(bytes.size()));
    current->open_stores.push_back({source, std::move(bytes), std::move(write), current->pc});
}

Bytes bytes_at(Block& block, Address address, std::uint32_t bytes) {
    const std::uint8_t* begin = at(address, bytes, block, "copy out");
    return Bytes(begin, begin + bytes);
}

/// The shared memory of a group's stores is read; what it holds will be written.
void read_group(Block& block, StoreGroup& group) {
    for (Store& store : group.unread) {
        const std::uint32_t bytes = static_cast<std::uint32_t>(store.bytes.size());
        end_store(store.source, bytes);
        if (bytes_at(block, store.source, bytes) != store.bytes) {
            current->pc = store.pc;
            fail("race: shared address 0x%x was overwritten before this store had read it", store.source);
        }
        auto event = std::make_shared<Happening>();
        event->act = [write = std::move(store.write), kept = std::move(store.bytes)] { write(kept); };
        group.unwritten.push_back(event);
        happen_later(std::move(event));
    }
    group.unread.clear();
}

void check_run(Address shared, const void* global, std::uint32_t bytes) {
    if (shared % 16 || reinterpret_cast<std::uintptr_t>(global) % 16 || bytes % 16 || bytes == 0) {
        fail("a bulk copy of %u bytes between shared address 0x%x and %p: all must be multiples of 16", bytes, shared, global);
    }
}

}  // namespace

void load_tile(Address target, const void* map, Address barrier, int rank, const int* coordinates) {
    CALLED;
    const Box box = box_of(map, rank, coordinates, target);
    const std::uint32_t bytes = box.bytes();
    load_later(target, bytes, barrier, [box, target, bytes](Block& block) {
        std::memset(at(target, bytes, block, "copy"), 0, bytes);
        box.each_row([&](std::uint32_t offset, const std::uint8_t* source, std::uint32_t inside) {
            each_chunk(target, offset, inside, [&](Address to, std::uint32_t from, std::uint32_t part) {
                std::memcpy(at(to, part, block, "copy"), source + from, part);
            });
        });
    });
}

void load_bytes(Address target, const void* source, std::uint32_t bytes, Address barrier) {
    CALLED;
    check_run(target, source, bytes);
    load_later(target, bytes, barrier,
               [=](Block& block) { std::memcpy(at(target, bytes, block, "copy"), source, bytes); });
}

void store_remote(Address target, std::uint32_t value, Address barrier) {
    CALLED;
    send_later(target, sizeof value, barrier, [value](Block&) {
        Bytes bytes(sizeof value);
        std::memcpy(bytes.data(), &value, sizeof value);
        return bytes;
    });
}

void copy_remote(Address target, Address source, std::uint32_t bytes, Address barrier) {
    CALLED;
    if (target % 16 || source % 16 || bytes % 16 || bytes == 0) {
        fail("a copy of %u bytes from shared address 0x%x to 0x%x: all must be multiples of 16", bytes, source, target);
    }
    note_copied(source, bytes, barrier_at(block_of(barrier), barrier));
    send_later(target, bytes, barrier, [source, bytes, then = bytes_at(*current->block, source, bytes)](Block& from) {
        if (bytes_at(from, source, bytes) != then) {
            fail("race: shared address 0x%x was overwritten before it was copied to another block", source);
        }
        return then;
    });
}

void store_tile(const void* map, Address source, int rank, const int* coordinates) {
    CALLED;
    const Box box = box_of(map, rank, coordinates, source);
    store_later(source, bytes_at(*current->block, source, box.bytes()), [box, source](const Bytes& kept) {
        box.each_row([&](std::uint32_t offset, std::uint8_t* target, std::uint32_t inside) {
            each_chunk(source, offset, inside, [&](Address from, std::uint32_t to, std::uint32_t part) {
                std::memcpy(target + to, &kept[from - source], part);
            });
        });
    });
}

void store_bytes(void* target, Address source, std::uint32_t bytes, bool add_floats) {
    CALLED;
    check_run(source, target, bytes);
    store_later(source, bytes_at(*current->block, source, bytes), [target, add_floats](const Bytes& kept) {
        if (!add_floats) {
            std::memcpy(target, kept.data(), kept.size());
            return;
        }
        auto* sums = static_cast<float*>(target);
        for (std::size_t i = 0; i < kept.size() / sizeof(float); ++i) {
            float value;
            std::memcpy(&value, &kept[i * sizeof value], sizeof value);
            sums[i] += value;
        }
    });
}

void commit_stores() {
    CALLED;
    current->store_groups.push_back({std::move(current->open_stores), {}});
    current->open_stores.clear();
}

void wait_stores_read(int pending) {
    CALLED;
    give_way();
    auto& groups = current->store_groups;
    for (std::size_t i = 0; i + pending < groups.size(); ++i) read_group(*current->block, groups[i]);
    // Those that are written too need no wait.
    const auto done = [](const StoreGroup& group) {
        return group.unread.empty() &&
               std::all_of(group.unwritten.begin(), group.unwritten.end(), [](const Event& event) { return event->done; });
    };
    while (!groups.empty() && done(groups.front())) groups.pop_front();
    give_way();
}

void wait_stores(int pending) {
    CALLED;
    give_way();
    auto& groups = current->store_groups;
    while (groups.size() > static_cast<std::size_t>(pending)) {
        read_group(*current->block, groups.front());
        for (const Event& event : groups.front().unwritten) happen_now(event);
        groups.pop_front();
    }
    give_way();
}

void end_thread_stores() {
    bool reading = !current->open_stores.empty();
    for (StoreGroup& group : current->store_groups) reading = reading || !group.unread.empty();
    if (reading) fail("the thread ends while its stores have not read their shared memory");
}

}  // namespace emulator
