// dQ in a settled order, so that its sums repeat bit for bit: tiles of keys add to a block of rows in turn.
//
// A tile waits only for tiles of its own head that were drawn before it, and all tiles are drawn from one counter, the
// first ones too. So nothing can wait forever: of all tiles that are not finished take the one drawn first. Its block
// runs, since it drew, and works on that tile, since a block finishes its tiles in the order in which it draws them; and
// whatever the tile waits for was drawn earlier, so it is finished. This holds for any number of blocks in flight.
#pragma once
#include "backward/plan.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace backward {

/// How many tiles of KEYS keys add to a block of ROWS rows before that of `key`, which does. They do so in the order in
/// which they are drawn.
template <int ROWS, int KEYS, bool HAS_LEFT, bool HAS_RIGHT, bool LAST_KEYS_FIRST>
PLAIN int turn_of(const attn::Band& band, int block, int key) {
    const int row = block * ROWS;
    const attn::Range keys =
        attn::keys_of_any<HAS_LEFT, HAS_RIGHT>(band, row, attn::min(row + ROWS, band.rows) - 1);
    return LAST_KEYS_FIRST ? (keys.end - 1) / KEYS - key / KEYS : key / KEYS - keys.begin / KEYS;
}

template <class C>
DEVICE u32 turn_of(const attn::Band& band, int block, int key) {
    return turn_of<C::ROWS, C::TILE_KEYS, C::HAS_LEFT, C::HAS_RIGHT, C::LAST_KEYS_FIRST>(band, block, key);
}

/// One thread for each consumer: add its units of dQ when their turn has come. Apart from the consumer, which goes on.
template <class Plan>
DEVICE void add_in_turn(const Params& params, Plan& plan, int consumer) {
    tile::RingBarriers<1>& barriers = plan.stage_barriers[consumer];
    for (tile::Cursor<1> at;; at.advance()) {
        barriers.wait_full(at);
        const Handed handed = plan.handed[consumer];
        if (handed.unit < 0) break;
        u32* turn = params.turns + handed.unit;
        ptx::wait_for(turn, handed.turn);
        ptx::fence_async_global();
        ptx::reduce_add(params.dq[handed.unit].values[0], &plan.stages.own[consumer].dq, sizeof(tile::Floats));
        ptx::commit_stores();
        ptx::wait_stores_read<0>();
        barriers.release(at, 0);
        ptx::wait_stores<0>();
        ptx::publish(turn, handed.turn + 1);
    }
}

}  // namespace backward
