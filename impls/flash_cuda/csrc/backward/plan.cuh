// What the backward kernels are told, how they are shaped, and where everything lies in shared memory.
#pragma once
#include "attn/band.cuh"
#include "attn/block_lists.cuh"
#include "attn/schedule.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/fragment.cuh"
#include "tile/panels.cuh"
#include "tile/ring.cuh"

namespace backward {

constexpr int CONSUMERS = 2;
constexpr int WARPGROUP = 128;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

/// Arguments of the main kernel, as `backward.py` packs them. q and d_out: (batch, kv_heads, seqlen_q, group, dim); k, v,
/// dk, dv: (batch, kv_heads, seqlen_k, dim).
struct Params {
    ptx::TensorMap q, d_out, k, v, dk, dv;
    const float* lse;    // (batch, heads, row_blocks * ROWS), in units of log2, +inf where no key is seen
    const float* delta;  // likewise, rowsum(d_out * out) - d_lse
    tile::Floats* dq;    // (batch, heads, row_blocks, units), fp32 sums without the softmax scale
    const i64* rng;      // (seed, offset) of dropout
    u32* ticket;         // 0; counts tiles handed out, and is 0 again when the last block leaves
    u32* turns;          // of each unit of dq: how many tiles have added to it, from 0 on; null unless DETERMINISTIC
    const i32* order;    // (batch, kv_heads, tiles): which tile of a plane is the n-th, by LISTS; else null
    attn::BlockLists lists;  // by key
    attn::Band band;
    attn::Work work;     // tiles of keys
    int kv_heads, group, row_blocks;
    float scale, scale_log2;
    float keep_scale;    // 1 / (the probability that dropout keeps a weight)
    int threshold;       // dropout keeps a weight iff its byte is below
    int keep_rows;       // whether q and d_out are to leave the second-level cache last
};

/// One compiled kernel: KEYS keys a tile, ROWS queries a step, SLOTS for Q and OUT_SLOTS for dO.
///
/// Up to head dim 128 a consumer owns 64 of a tile's 128 keys: all of their dK and dV. WIDE: both share 64 keys, which
/// above fill their registers, or of which a block of LISTS is made; each owns half of the columns of dK and dV, and
/// computes S^T and dP^T for half of the rows.
///
/// CLUSTER: two blocks share a tile, KEYS keys each, and walk the same rows in step. They exchange dS, and each adds half
/// of the columns of dQ, from the keys of both: half of the bytes, with which two blocks alone fill the way into L2.
template <class T_, int DIM_, int DIM_V_, int KEYS_, int ROWS_, int CLUSTER_, bool HAS_LEFT_, bool HAS_RIGHT_,
          bool DROPOUT_, bool DETERMINISTIC_, bool LISTS_>
struct Config {
    using T = T_;
    static constexpr int DIM = DIM_, DIM_V = DIM_V_, KEYS = KEYS_, ROWS = ROWS_;
    static constexpr int CLUSTER = CLUSTER_, TILE_KEYS = KEYS * CLUSTER;
    static constexpr bool HAS_LEFT = HAS_LEFT_, HAS_RIGHT = HAS_RIGHT_, DROPOUT = DROPOUT_;
    static constexpr bool DETERMINISTIC = DETERMINISTIC_;  // tiles add to dQ in a settled order
    static constexpr bool LISTS = LISTS_;                  // walk lists of blocks; tiles divide blocks
    static_assert(!(DETERMINISTIC && LISTS), "turns are counted under a band alone");
    static constexpr bool WIDE = KEYS == tile::ROWS;
    static_assert(WIDE || (KEYS == 2 * tile::ROWS && DIM <= 128 && DIM_V <= 128));
    static_assert(CLUSTER == 1 || (CLUSTER == 2 && WIDE && !LISTS));
    // dQ goes to its sums from registers, and dK and dV out through a slot of Q; else both through a stage of their own.
    static constexpr bool STAGED = CLUSTER == 1 || DETERMINISTIC;
    static constexpr bool ENDS_IN_SLOTS = !STAGED;  // the end of a tile takes a slot of Q and one of dO
    static constexpr int SLOTS = CLUSTER > 1 && STAGED ? 1 : 2, OUT_SLOTS = WIDE ? 1 : 2;
    // Where shared memory has room for it, to which dropout's bits bring it close.
    static constexpr bool APART = !WIDE && (!DROPOUT || DIM + DIM_V <= 128);
    // When the next tile is drawn: as this one begins, if all are as long; else later, see produce_keys.
    static constexpr bool DRAWN_AHEAD = !DETERMINISTIC && !LISTS && !(HAS_LEFT || HAS_RIGHT);
    static constexpr int KEY_TILES = KEYS / tile::ROWS;
    // A consumer's part.
    static constexpr int OWN_ROWS = WIDE ? ROWS / CONSUMERS : ROWS;
    static constexpr int OWN_DIM = WIDE ? DIM / CONSUMERS : DIM, OWN_DIM_V = WIDE ? DIM_V / CONSUMERS : DIM_V;
    static_assert(OWN_DIM % tile::PANEL == 0 && OWN_DIM_V % tile::PANEL == 0);
    // A block of dQ is UNITS of 64 x 64, ACROSS of them side by side, which the consumers share; a single one they
    // compute in turns.
    static constexpr int ACROSS = DIM / tile::PANEL, UNITS = ROWS / tile::ROWS * ACROSS;
    static constexpr bool IN_TURNS = UNITS == 1;
    static constexpr int OWN_UNITS = IN_TURNS ? 1 : UNITS / (CONSUMERS * CLUSTER);
    static_assert(IN_TURNS || UNITS == OWN_UNITS * CONSUMERS * CLUSTER);
    // The first keys are seen by the most rows, and go first: the last tiles should be short. But where tiles wait for
    // each other, the order is the other way: then a tile comes to rows that no earlier tile has to add to, and finds
    // its turn come wherever it walks on to, if all go at one pace.
    static constexpr bool LAST_KEYS_FIRST = DETERMINISTIC && HAS_RIGHT;
};

/// Named barriers; 0 is the whole block's.
/// FIRST_PAIR: of two warps, in the order of the consumers' warps.
enum Named : u32 { FIRST_CONSUMER = 1, BOTH_CONSUMERS = FIRST_CONSUMER + CONSUMERS, FIRST_PAIR };

/// A tile of keys, found once by the producer. No more: batch < 0.
struct Assignment {
    int batch, kv_head, key;
    attn::Range blocks;  // of ROWS; by LISTS any range that is not empty
};

/// By LISTS: the block of ROWS in a slot of Q. A tile that visits none has one with plane < 0, and nothing loaded.
struct Visit {
    enum : int { BANDED = 1, LAST = 2 };  // BANDED: listed as partial
    int plane, member, block;
    int flags;  // BANDED: the band applies to it; LAST: it is the tile's last

    __device__ __forceinline__ bool banded() const { return flags & BANDED; }
    __device__ __forceinline__ bool last() const { return flags & LAST; }
};

/// A unit of dQ that a consumer has ready for the thread that adds it, and its turn there. No more: unit < 0.
struct Handed {
    int unit;
    u32 turn;
};

/// In a CLUSTER, what comes from the other block: of its K the columns of dQ that are added here; dS^T, sent at a step by
/// either, for which two slots are enough: who sends the next but one has received the next, and that was sent when this
/// one had been read. And (below) the tile that the first block has drawn.
template <int CLUSTER, class Key, class Scores>
struct Exchange {
    Key k;
    Scores d_scores[2];
};
template <class Key, class Scores>
struct Exchange<1, Key, Scores> {};

/// That it has come; apart from the above, so that this stays aligned without gaps.
template <int CLUSTER>
struct Arrivals {
    ptx::Barrier tile_ready, tile_read, d_scores_ready[2];
    u32 tile;
};
template <>
struct Arrivals<1> {};

/// A unit of dQ on its way to the sums; at the end of a tile a consumer's dV and dK. APART: dK has a place of its own, so
/// that neither dK waits for the last dQ to leave nor dV for dK.
template <bool APART, class Dk, class Dv>
struct Stage {
    union {
        tile::Floats dq;
        Dv dv;
        Dk dk;
    };
};
template <class Dk, class Dv>
struct Stage<true, Dk, Dv> {
    union {
        tile::Floats dq;
        Dv dv;
    };
    Dk dk;
};

/// One for each consumer.
template <bool STAGED, class Stage>
struct Stages {
    alignas(1024) Stage own[CONSUMERS];
};
template <class Stage>
struct Stages<false, Stage> {};

template <class C>
struct SharedMemoryPlan {
    using Key = tile::Panels<tile::ROWS, C::DIM>;
    using Value = tile::Panels<tile::ROWS, C::DIM_V>;
    using Query = tile::Panels<C::ROWS, C::DIM>;
    using OutGrad = tile::Panels<C::ROWS, C::DIM_V>;
    using OthersKey = tile::Panels<tile::ROWS, C::OWN_UNITS * CONSUMERS * tile::PANEL>;
    using Scores = tile::Panels<tile::ROWS, C::ROWS>;  // 64 keys by the rows of a step
    static constexpr int SHARED_SCORES = C::WIDE ? 2 : CONSUMERS;

    using Stage = backward::Stage<C::APART, tile::Panels<tile::ROWS, C::OWN_DIM>, tile::Panels<tile::ROWS, C::OWN_DIM_V>>;
    Key k[C::KEY_TILES];
    Value v[C::KEY_TILES];
    Query q[C::SLOTS];
    OutGrad d_out[C::OUT_SLOTS];
    // What the consumers exchange: dS^T of either's keys, or WIDE P^T and dS^T. Two: one of them writes the next while
    // the other still reads this one.
    Scores scores[2][SHARED_SCORES];
    Exchange<C::CLUSTER, OthersKey, Scores> other;
    Stages<C::STAGED, Stage> stages;
    alignas(128) float lse[C::SLOTS][C::ROWS];
    alignas(128) float delta[C::OUT_SLOTS][C::ROWS];
    Visit visits[C::SLOTS];     // travel with q, by LISTS
    Assignment assignments[2];  // this tile's, which travels with k and v too, and the next one's
    Arrivals<C::CLUSTER> arrivals;
    Handed handed[CONSUMERS];   // travels with stage, if DETERMINISTIC
    u32 exchange[C::DROPOUT ? CONSUMERS : 1][WARPGROUP];  // of bits that say what is dropped
    tile::RingBarriers<1> kv_barriers;  // filled with both; emptied of K,
    ptx::Barrier v_empty;               // and of V, which the last step of a tile needs no more long before
    tile::RingBarriers<2> assignment_barriers;  // emptied by the thread that finds rows, unless DRAWN_AHEAD
    ptx::Barrier visit_ready[C::SLOTS];  // its slot is free
    tile::RingBarriers<C::SLOTS> q_barriers;
    tile::RingBarriers<C::OUT_SLOTS> d_out_barriers;
    tile::RingBarriers<1> stage_barriers[CONSUMERS];  // filled by a consumer
};

}  // namespace backward
