// The loading threads of a backward block: one draws tiles of keys and loads K and V, another loads Q and dO of the
// rows that see them; by LISTS a third finds out which these are.
#pragma once
#include "backward/order.cuh"
#include "backward/plan.cuh"
#include "ptx/cluster.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace backward {

/// Of block `rank` of the cluster, whose blocks visit the same rows.
template <class C>
DEVICE Assignment assign(const Params& params, int index, int rank) {
    const attn::Place place = attn::place_of(params.work, index);
    const int batch = place.plane / params.kv_heads;
    int tile = C::LAST_KEYS_FIRST ? place.tile : params.work.tiles - 1 - place.tile;
    if constexpr (C::LISTS) tile = params.order[place.plane * params.work.tiles + tile];
    const int key = tile * C::TILE_KEYS;
    attn::Range blocks = {0, 1};
    if constexpr (!C::LISTS) {
        const int last = attn::min(key + C::TILE_KEYS, params.band.keys) - 1;
        const attn::Range rows = attn::rows_of_any<C::HAS_LEFT, C::HAS_RIGHT>(params.band, key, last);
        blocks = rows.size() > 0 ? attn::blocks_touching<C::ROWS>(rows) : attn::Range{0, 0};
    }
    return {batch, place.plane - batch * params.kv_heads, key + rank * C::KEYS, blocks};
}

/// The block's or cluster's next piece of work; in all, they draw until the counter has wrapped to 0.
template <class C>
DEVICE int draw(const Params& params) {
    if constexpr (C::DETERMINISTIC) {  // every piece: see turns.cuh
        return atomicInc(params.ticket, params.work.total + params.work.blocks - 1);
    } else {  // the first is the block's by its number
        return params.work.blocks + atomicInc(params.ticket, params.work.total - 1);
    }
}

/// Row of lse, delta and dq where a query head's rows begin.
DEVICE int plane_of(const Params& params, const Assignment& work, int member) {
    return (work.batch * params.kv_heads + work.kv_head) * params.group + member;
}

/// What the first block of a cluster has drawn, in all of them. Before it tells of the next they have read this one.
template <class Plan>
DEVICE int agree(Plan& plan, int index, int rank, u32 parity) {
    auto& arrivals = plan.arrivals;
    if (rank == 0) {
        ptx::wait(arrivals.tile_read, parity ^ 1);
        ptx::store_remote(ptx::remote_address(&arrivals.tile, 1), index, ptx::remote_address(&arrivals.tile_ready, 1));
        return index;
    }
    ptx::arrive_expecting(arrivals.tile_ready, sizeof arrivals.tile);
    ptx::wait(arrivals.tile_ready, parity);
    index = arrivals.tile;
    ptx::arrive_remote(ptx::remote_address(&arrivals.tile_read, 0));
    return index;
}

/// One thread: draw tiles, and load K and V once a tile. A tile is drawn while the one before it is worked on; under a
/// band or by LISTS, which make tiles differ in length, when the last rows of that one are found: drawn earlier it would
/// stand behind more of it, while other blocks run out of work. Where tiles add in turn, when the block is free for it: all that
/// are drawn after it in its head wait for its turns.
template <class C, class Plan>
DEVICE void produce_keys(const Params& params, Plan& plan) {
    const int rank = C::CLUSTER > 1 ? ptx::cluster_rank() : 0;
    tile::Cursor<2> at;
    for (int index = blockIdx.x / C::CLUSTER;; at.advance()) {
        const u32 kv_parity = at.slot;  // of a ring of one
        if constexpr (C::DETERMINISTIC) {
            ptx::wait(plan.kv_barriers.empty[0], kv_parity ^ 1);
            if (rank == 0) index = draw<C>(params);
        }
        if constexpr (C::CLUSTER > 1) index = agree(plan, index, rank, kv_parity);
        const bool more = index < params.work.total;
        const Assignment work = more ? assign<C>(params, index, rank) : Assignment{-1};
        const bool any = more && work.blocks.size() > 0;
        plan.assignments[at.slot] = work;
        ptx::arrive(plan.assignment_barriers.full[at.slot]);
        if constexpr (!C::DETERMINISTIC) {
            if (!C::DRAWN_AHEAD && any) {  // out of DRAM while the tile before ends
                for (int c = 0; c < C::KEY_TILES; ++c) {
                    const int key = work.key + c * tile::ROWS;
                    for (int p = 0; p < Plan::Key::PANELS; ++p) {
                        ptx::prefetch(params.k, p * tile::PANEL, key, work.kv_head, work.batch);
                    }
                    for (int p = 0; p < Plan::Value::PANELS; ++p) {
                        ptx::prefetch(params.v, p * tile::PANEL, key, work.kv_head, work.batch);
                    }
                }
            }
        }
        ptx::wait(plan.v_empty, kv_parity ^ 1);
        ptx::Barrier& full = plan.kv_barriers.full[0];
        constexpr u32 OTHERS = C::CLUSTER > 1 ? Plan::OthersKey::BYTES : 0;
        ptx::arrive_expecting(full, any ? C::KEY_TILES * (Plan::Key::BYTES + Plan::Value::BYTES) + OTHERS : 0);
        if (!more) break;
        if (any) {
            for (int c = 0; c < C::KEY_TILES; ++c) {
                for (int p = 0; p < Plan::Value::PANELS; ++p) {
                    ptx::load(plan.v[c].panel(p), params.v, full, ptx::Keep::FIRST_OUT, p * tile::PANEL,
                              work.key + c * tile::ROWS, work.kv_head, work.batch);
                }
            }
        }
        ptx::wait(plan.kv_barriers.empty[0], kv_parity ^ 1);
        if (any) {
            for (int c = 0; c < C::KEY_TILES; ++c) {
                for (int p = 0; p < Plan::Key::PANELS; ++p) {
                    ptx::load(plan.k[c].panel(p), params.k, full, ptx::Keep::FIRST_OUT, p * tile::PANEL,
                              work.key + c * tile::ROWS, work.kv_head, work.batch);
                }
            }
            if constexpr (C::CLUSTER > 1) {
                using OthersKey = typename Plan::OthersKey;
                for (int p = 0; p < OthersKey::PANELS; ++p) {
                    ptx::load(plan.other.k.panel(p), params.k, full, ptx::Keep::FIRST_OUT,
                              (rank * OthersKey::PANELS + p) * tile::PANEL, work.key ^ C::KEYS, work.kv_head, work.batch);
                }
            }
        }
        // Its rows are on their way. The next but one takes its slot, after K was replaced: consumers have read it, and
        // where each tile has rows, or by LISTS an end that they are told, so have those who found and loaded these.
        if constexpr (!C::DRAWN_AHEAD) ptx::wait(plan.assignment_barriers.empty[at.slot], at.parity);
        if constexpr (!C::DETERMINISTIC) {
            if (rank == 0) index = draw<C>(params);
        }
    }
}

/// Another thread, of another warp: load the queries of every head of the group as slots come free, those of the next
/// tile while the last steps of this one are computed.
template <class C, class Plan>
DEVICE void produce_rows(const Params& params, Plan& plan) {
    constexpr u32 STATISTICS = C::ROWS * sizeof(float);
    u32 loaded = 0;  // blocks of rows
    const auto keep = [&] { return params.keep_rows ? ptx::Keep::LAST_OUT : ptx::Keep::NORMAL; };
    for (u32 tiles = 0;; ++tiles) {
        const auto tile_at = tile::Cursor<2>::after(tiles);
        plan.assignment_barriers.wait_full(tile_at);
        const Assignment work = plan.assignments[tile_at.slot];
        if (work.batch < 0) break;
        const auto load = [&](int first_block, int member, int block) {
            const int row = block * C::ROWS;
            const auto at = tile::Cursor<C::SLOTS>::after(loaded);
            const auto out_at = tile::Cursor<C::OUT_SLOTS>::after(loaded++);
            const i64 statistics = static_cast<i64>(first_block + block) * C::ROWS;
            ptx::Barrier& q_full = plan.q_barriers.begin_fill(at, Plan::Query::BYTES + STATISTICS);
            ptx::load_bytes(plan.lse[at.slot], params.lse + statistics, STATISTICS, q_full);
            for (int p = 0; p < Plan::Query::PANELS; ++p) {
                ptx::load(plan.q[at.slot].panel(p), params.q, q_full, keep(), p * tile::PANEL, member, row,
                          work.kv_head, work.batch);
            }
            ptx::Barrier& d_out_full = plan.d_out_barriers.begin_fill(out_at, Plan::OutGrad::BYTES + STATISTICS);
            ptx::load_bytes(plan.delta[out_at.slot], params.delta + statistics, STATISTICS, d_out_full);
            for (int p = 0; p < Plan::OutGrad::PANELS; ++p) {
                ptx::load(plan.d_out[out_at.slot].panel(p), params.d_out, d_out_full, keep(),
                          p * tile::PANEL, member, row, work.kv_head, work.batch);
            }
        };
        if constexpr (C::LISTS) {
            for (;;) {
                const auto at = tile::Cursor<C::SLOTS>::after(loaded);
                ptx::wait(plan.visit_ready[at.slot], at.parity);
                const Visit visit = plan.visits[at.slot];
                if (visit.plane < 0) {
                    plan.q_barriers.begin_fill(at, 0);
                    plan.d_out_barriers.begin_fill(tile::Cursor<C::OUT_SLOTS>::after(loaded++), 0);
                } else {
                    load(visit.plane * params.row_blocks, visit.member, visit.block);
                }
                if (visit.last()) break;
            }
        } else {
            for (int member = 0; member < params.group; ++member) {
                const int first_block = plane_of(params, work, member) * params.row_blocks;
                for (int block = work.blocks.begin; block < work.blocks.end; ++block) load(first_block, member, block);
            }
            if constexpr (!C::DRAWN_AHEAD) plan.assignment_barriers.release(tile_at, 0);
        }
        if constexpr (C::ENDS_IN_SLOTS) {
            plan.q_barriers.begin_fill(tile::Cursor<C::SLOTS>::after(loaded), 0);
            plan.d_out_barriers.begin_fill(tile::Cursor<C::OUT_SLOTS>::after(loaded++), 0);
        }
    }
}

/// Blocks that a tile has left to visit when the next one is drawn: four steps or more, as long as the draw takes, the
/// tile's place in the order, and the first of its lists, one after the other.
constexpr int DRAWN_LATE = 2;

/// A third thread, by LISTS: walk those of every head of the group, and leave in a slot of Q, as soon as it is free,
/// which block the second one is to load there.
template <class C, class Plan>
DEVICE void produce_visits(const Params& params, Plan& plan) {
    u32 announced = 0;
    const auto announce = [&](const Visit& visit) {
        const auto at = tile::Cursor<C::SLOTS>::after(announced++);
        ptx::wait(plan.q_barriers.empty[at.slot], at.parity ^ 1);
        plan.visits[at.slot] = visit;
        ptx::arrive(plan.visit_ready[at.slot]);
    };
    for (u32 tiles = 0;; ++tiles) {
        const auto tile_at = tile::Cursor<2>::after(tiles);
        plan.assignment_barriers.wait_full(tile_at);
        const Assignment& work = plan.assignments[tile_at.slot];  // left in shared memory, for want of registers
        if (work.batch < 0) break;
        int left = count_listed(params.lists, work.batch, work.kv_head * params.group, params.group, work.key);
        if (left <= DRAWN_LATE) plan.assignment_barriers.release(tile_at, 0);
        if (left == 0) announce({-1, 0, 0, Visit::LAST});
        for (int member = 0; left > 0; ++member) {
            const i64 row = attn::list_row(params.lists, work.batch, work.kv_head * params.group + member, work.key);
#pragma unroll 1
            for (int partial = 0; partial < 2; ++partial) {
                const i32* listed =
                    (partial ? params.lists.partial_index : params.lists.full_index) + row * params.lists.width;
                const i32* const stop =
                    listed + (partial ? params.lists.partial_count : params.lists.full_count)[row];
                for (; listed != stop; ++listed) {
                    const int begin = *listed * (params.lists.listed_size / C::ROWS);
                    const int end = attn::min(begin + params.lists.listed_size / C::ROWS, params.row_blocks);
                    if (left-- == DRAWN_LATE + 1) plan.assignment_barriers.release(tile_at, 0);
                    for (int block = begin; block < end; ++block) {
                        const int last = left == 0 && block + 1 == end ? Visit::LAST : 0;
                        announce({plane_of(params, work, member), member, block, partial | last});
                    }
                }
            }
        }
    }
}

/// An assignment in uniform registers, which the consumers have to spare.
DEVICE Assignment uniform(const Assignment& a) {
    return {ptx::uniform(a.batch), ptx::uniform(a.kv_head), ptx::uniform(a.key),
            {ptx::uniform(a.blocks.begin), ptx::uniform(a.blocks.end)}};
}
DEVICE Visit uniform(const Visit& a) { return {ptx::uniform(a.plane), 0, ptx::uniform(a.block), ptx::uniform(a.flags)}; }

}  // namespace backward
