// What a forward kernel is told, how it is shaped, and where everything lies in shared memory.
#pragma once
#include "attn/band.cuh"
#include "attn/block_lists.cuh"
#include "attn/schedule.cuh"
#include "forward/dropout.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/fragment.cuh"
#include "tile/panels.cuh"
#include "tile/ring.cuh"

namespace forward {

/// Arguments of one launch, as `arguments.py` packs them. q and out: (batch, kv_heads, seqlen_q, group, dim), k and v:
/// (batch, kv_heads, seqlen_k, dim), the last one innermost.
struct Params {
    ptx::TensorMap q, k, v, out;
    float* lse;              // (batch, heads, seqlen_q), natural log; with splits (splits, batch, heads, seqlen_q)
    float* parts;            // with splits, in place of out: (splits, batch, heads, seqlen_q, DIM_V)
    const i64* rng;          // (seed, offset) of dropout
    u32* ticket;             // 0; counts tiles handed out, and is 0 again when the last block leaves (driver.py)
    attn::BlockLists lists;  // by query
    attn::Band band;
    attn::Work work;         // planes: (batch, heads); of DECODE (splits, batch, kv_heads)
    int kv_heads, group;     // query heads = kv_heads * group
    int batch, splits;       // of DECODE
    int queries;             // of DECODE: those of a tile, 64 / group
    float scale_log2;        // softmax scale * log2(e)
    int threshold;           // dropout keeps a weight iff its byte is below
};

/// One compiled kernel: T elements; head dims DIM and DIM_V as they lie in shared memory; CONSUMERS warpgroups of 64
/// rows; KEYS a step; SLOTS for K and for V, Q_SLOTS for Q.
template <class T_, int DIM_, int DIM_V_, int CONSUMERS_, int KEYS_, int SLOTS_, int Q_SLOTS_, bool HAS_LEFT_, bool HAS_RIGHT_,
          bool DROPOUT_, bool OUT_IN_Q_, bool LISTS_, bool DECODE_>
struct Config {
    using T = T_;
    static constexpr int DIM = DIM_, DIM_V = DIM_V_, CONSUMERS = CONSUMERS_, KEYS = KEYS_, SLOTS = SLOTS_,
                         Q_SLOTS = Q_SLOTS_;
    static constexpr bool HAS_LEFT = HAS_LEFT_, HAS_RIGHT = HAS_RIGHT_;
    static constexpr bool DROPOUT = DROPOUT_;
    static constexpr bool OUT_IN_Q = OUT_IN_Q_;  // the output is staged where Q lay, for want of room
    static constexpr int PARTS = 2;  // of a softmax's step
    static constexpr bool LISTS = LISTS_;        // walk lists of blocks; tiles divide blocks
    // Few queries: the rows of a tile are those of all heads of a group, query by query, and the keys of a tile may be
    // split among blocks of the grid (Flash-Decoding), whose results `merge` combines.
    static constexpr bool DECODE = DECODE_;
    static_assert(!DECODE || (CONSUMERS == 1 && !DROPOUT && !LISTS));
    static constexpr int WARPGROUP = 128;
    static constexpr int ROWS = tile::ROWS * CONSUMERS;
    static constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
    // Of the 65536 registers of a multiprocessor, in multiples of 8 a thread. Two warpgroups have all they can use.
    static constexpr bool MOVE_REGISTERS = CONSUMERS > 1;
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
};

/// Named barriers; 0 is the whole block's. Consumer c: all of it, and the two warps that share 32 rows.
constexpr u32 FIRST_CONSUMER_BARRIER = 1, FIRST_PAIR_BARRIER = 4;

/// A block's next tile, found once by the producer. No tile: plane < 0.
struct Assignment {
    int plane;  // row of `lse` and `parts`, in units of seqlen_q; of DECODE the first of the group's
    int row, kv_head, member, batch;
    attn::Range blocks;  // of KEYS; by LISTS the steps of `lists`, of which the last are walked first
    attn::Steps steps;
    i64 list_row;
};

/// COUNT of something, possibly none.
template <class Content, int COUNT>
struct Room {
    Content items[COUNT];
};
template <class Content>
struct Room<Content, 0> {};

template <class C>
struct SharedMemoryPlan {
    using Query = tile::Panels<tile::ROWS, C::DIM>;
    using Key = tile::Panels<C::KEYS, C::DIM>;
    using Value = tile::Panels<C::KEYS, C::DIM_V>;
    using Out = tile::Panels<tile::ROWS, C::DIM_V>;
    static_assert(!C::OUT_IN_Q || (sizeof(Out) <= sizeof(Query) && C::Q_SLOTS == 1));

    Query q[C::Q_SLOTS][C::CONSUMERS];
    Key k[C::SLOTS];
    Value v[C::SLOTS];
    Room<Out, C::OUT_IN_Q ? 0 : C::CONSUMERS> apart;
    Room<DropoutExchange, C::DROPOUT ? C::CONSUMERS : 0> dropout;
    Assignment assignment[C::Q_SLOTS][C::CONSUMERS];  // travels with q
    int first_key[C::SLOTS];                          // travels with k, by LISTS
    tile::RingBarriers<C::Q_SLOTS> q_barriers[C::CONSUMERS];
    tile::RingBarriers<C::SLOTS> k_barriers, v_barriers;

    __device__ __forceinline__ Out& out(int consumer) {
        if constexpr (C::OUT_IN_Q) {
            return reinterpret_cast<Out&>(q[0][consumer]);
        } else {
            return apart.items[consumer];
        }
    }
};

}  // namespace forward
