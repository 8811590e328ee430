// What both kinds of consumer do: walk the queries, mask, and send dQ, dK and dV away.
#pragma once
#include "attn/softmax.cuh"
#include "backward/dropout.cuh"
#include "backward/load.cuh"
#include "backward/turns.cuh"
#include "tile/product.cuh"

namespace backward {

/// A warpgroup. Names as in the paper, transposed: rows of a fragment are keys, its columns are queries.
/// Self computes one step: template <bool MASKED> step(plane, block, last). The last one of a tile gives V and K back.
template <class Self, class C>
struct Consumer {
    using T = typename C::T;
    using Plan = SharedMemoryPlan<C>;
    /// Rows that are weighed at a time: registers are short, and products of one part run while the next is weighed.
    static constexpr int PART = C::OWN_ROWS < 64 ? C::OWN_ROWS : 64, PARTS = C::OWN_ROWS / PART;
    static constexpr int VALUES = tile::accumulators(PART);
    using Statistics = float[PART / 4];  // of a part's columns that a thread has values in
    using Operand = u32[tile::packed(PART)];

    const Params& params;
    Plan& plan;
    const int consumer, thread, lane;
    tile::Cursor<1> kv_at;
    tile::Cursor<C::SLOTS> q_at;
    tile::Cursor<C::OUT_SLOTS> d_out_at;
    tile::Cursor<1> stage_at;  // of plan.handed, in the thread that hands over
    int buffer = 0;            // of plan.scores
    bool banded;               // by LISTS: whether the band applies to this step

    Assignment work;
    float dk[tile::accumulators(C::OWN_DIM)];
    float dv[tile::accumulators(C::OWN_DIM_V)];
    float scores[tile::accumulators(C::OWN_ROWS)];    // S, then P
    float d_scores[tile::accumulators(C::OWN_ROWS)];  // dP, then dS
    Dropped<PART> dropped;

    __device__ __forceinline__ Consumer(const Params& params_, Plan& plan_, int consumer_)
        : params(params_),
          plan(plan_),
          consumer(consumer_),
          thread(threadIdx.x % WARPGROUP),
          lane(threadIdx.x % 32) {}

    __device__ __forceinline__ void run() {
        for (;; kv_at.advance()) {
            plan.kv_barriers.wait_full(kv_at);
            work = uniform(plan.assignments[kv_at.parity]);
            if (work.batch < 0) break;
#pragma unroll
            for (float& value : dk) value = 0.f;
#pragma unroll
            for (float& value : dv) value = 0.f;
            if constexpr (C::LISTS) {
                walk_lists();
            } else if (work.blocks.size() > 0) {
                static_cast<Self&>(*this).begin_tile();
                walk();
            } else {
                pass_over();
            }
#pragma unroll
            for (float& value : dk) value *= params.scale;
            if constexpr (C::DROPOUT) {
#pragma unroll
                for (float& value : dv) value *= params.keep_scale;
            }
            auto& stage = begin_results();
            store_result<C::OWN_DIM>(stage.dk, dk, params.dk);
            store_result<C::OWN_DIM_V>(stage.dv, dv, params.dv);
            end_results();
        }
        if (thread == 0) {
            if constexpr (C::DETERMINISTIC) {
                wait_added();
                hand_over({-1, 0});
            }
            ptx::wait_stores_read<0>();
        }
    }

    /// Blocks that the band leaves whole: rows past the last have lse = +inf, and weigh nothing.
    __device__ __forceinline__ attn::Range whole_blocks() const {
        attn::Range whole = attn::blocks_within<C::ROWS>(
            attn::rows_of_all<C::HAS_LEFT, C::HAS_RIGHT>(params.band, work.key, work.key + C::KEYS - 1));
        if (!C::HAS_LEFT) whole.end = params.row_blocks;
        return whole;
    }
    __device__ __forceinline__ bool past_last_key() const { return work.key + C::KEYS > params.band.keys; }

    /// The tile's V, and K, are not needed any more.
    __device__ __forceinline__ void release_v() {
        if (lane == 0) ptx::arrive(plan.v_empty);
    }
    __device__ __forceinline__ void release_k() { plan.kv_barriers.release(kv_at, lane); }
    __device__ __forceinline__ void pass_over() {
        __syncwarp();
        release_v();
        release_k();
    }

    /// All that the lists name, of all heads of the group.
    __device__ __forceinline__ void walk_lists() {
        Self& self = static_cast<Self&>(*this);
        for (bool last = false; !last;) {
            plan.q_barriers.wait_full(q_at);
            const Visit visit = uniform(plan.visits[q_at.slot]);
            if (visit.plane < 0) {
                plan.d_out_barriers.wait_full(d_out_at);
                pass_over();
                plan.q_barriers.release(q_at, lane);
                plan.d_out_barriers.release(d_out_at, lane);
                q_at.advance();
                d_out_at.advance();
                break;
            }
            last = visit.last();
            const attn::Range whole = whole_blocks();
            banded = visit.banded();
            if (past_last_key() || (banded && (visit.block < whole.begin || visit.block >= whole.end))) {
                self.template step<true>(visit.plane, visit.block, last);
            } else {
                self.template step<false>(visit.plane, visit.block, last);
            }
        }
    }

    /// All queries of the group's heads, masked blocks apart from the long run between them.
    __device__ __forceinline__ void walk() {
        attn::Range whole = whole_blocks();
        if (past_last_key()) whole.begin = whole.end = work.blocks.end;
        const int begin = attn::min(attn::max(whole.begin, work.blocks.begin), work.blocks.end);
        const int end = attn::max(attn::min(whole.end, work.blocks.end), begin);
        Self& self = static_cast<Self&>(*this);
        for (int member = 0; member < params.group; ++member) {
            const int plane = plane_of(params, work, member);
            const auto last = [&](int block) { return block + 1 == work.blocks.end && member + 1 == params.group; };
            int block = work.blocks.begin;
            for (; block < begin; ++block) self.template step<true>(plane, block, last(block));
            for (; block < end; ++block) self.template step<false>(plane, block, last(block));
            if constexpr (C::HAS_LEFT) {
                for (; block < work.blocks.end; ++block) self.template step<true>(plane, block, last(block));
            }
        }
    }

    /// First of a step's rows whose S and dP are this warpgroup's, and first of its keys in a tile.
    __device__ __forceinline__ int own_row() const { return C::WIDE ? consumer * C::OWN_ROWS : 0; }
    __device__ __forceinline__ int own_key() const { return C::WIDE ? 0 : consumer * tile::ROWS; }

    /// Find out what dropout drops of this step, while its products run.
    __device__ __forceinline__ void draw(int plane, int block) {
        if constexpr (C::DROPOUT) {
            const attn::Dropout state(params.rng, params.threshold);
            const int now = ptx::opaque(threadIdx.x) % WARPGROUP;  // what follows from it is not kept from step to step
            dropped.draw(state, block * C::ROWS + own_row() + tile::first_column(now),
                         work.key + own_key() + tile::first_row(now), plane, plan.exchange[consumer], now,
                         FIRST_PAIR + 2 * consumer + now / 64);
            ptx::pin(dropped.flags);
        }
    }

    /// P = exp2(S - lse) of a part.
    __device__ __forceinline__ void weigh(const Statistics& lse, int part = 0) {
        each_value(part, [&](int i, int column) {
            scores[i] = ptx::exp2(scores[i] * params.scale_log2 - lse[column]);
        });
    }
    /// The same of all, rows that do not see a key apart.
    template <bool MASKED>
    __device__ __forceinline__ void weigh(int block, const Statistics& lse) {
        static_assert(PARTS == 1);
        if constexpr (MASKED) mask(block * C::ROWS + own_row());
        weigh(lse);
    }

    /// P as the operand of dV, without what is dropped; dV is scaled for it at the end.
    __device__ __forceinline__ void round_weights(Operand& operand, int part = 0) {
        round(operand, scores, part);
        if constexpr (C::DROPOUT) dropped.drop(operand);
    }

    /// dS = P * (dP - delta): dropout acts on dP as on P, and not on the P that dS is made of.
    __device__ __forceinline__ void differentiate(const Statistics& delta, int part = 0) {
        each_value(part, [&](int i, int column) {
            if constexpr (C::DROPOUT) {
                d_scores[i] = scores[i] * (dropped.kept(d_scores[i], i) * params.keep_scale - delta[column]);
            } else {
                d_scores[i] = scores[i] * (d_scores[i] - delta[column]);
            }
        });
    }

    /// A part of a product as an operand.
    static __device__ __forceinline__ void round(Operand& operand, const float (&values)[tile::accumulators(C::OWN_ROWS)],
                                                 int part) {
#pragma unroll
        for (int i = 0; i < VALUES / 2; ++i) {
            operand[i] = ptx::pack<T>(values[part * VALUES + 2 * i], values[part * VALUES + 2 * i + 1]);
        }
    }

    /// The thread's columns of a part of a row statistic, in order: all, or those from BEGIN to END of the part.
    template <int BEGIN = 0, int END = PART>
    __device__ __forceinline__ void load_statistics(Statistics& values, const float* statistics, int part = 0) {
        const float* own = statistics + own_row() + part * PART + tile::first_column(thread);
#pragma unroll
        for (int g = BEGIN / 8; g < END / 8; ++g) {
            const float2 pair = ptx::load_pair(own + 8 * g);
            values[2 * g] = pair.x;
            values[2 * g + 1] = pair.y;
        }
    }

    /// Call with the index of every value of a part, and that of its column among the part's own.
    template <class Use>
    static __device__ __forceinline__ void each_value(int part, Use use) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) use(part * VALUES + i, i / 4 * 2 + i % 2);
    }

    /// Each half's key is seen by a range of rows, in a full block of LISTS by all, by none if it lies past the last key.
    __device__ __forceinline__ void mask(int first_row) {
        const int from = first_row + tile::first_column(thread);
        const int key = work.key + own_key() + tile::first_row(thread);
        attn::Range limits[tile::HALVES];
#pragma unroll
        for (int h = 0; h < tile::HALVES; ++h) {
            const attn::Range seen =
                !C::LISTS || banded
                    ? attn::rows_of_any<C::HAS_LEFT, C::HAS_RIGHT>(params.band, key + 8 * h, key + 8 * h)
                    : attn::Range{0, params.band.rows};
            limits[h] = {seen.begin - from, key + 8 * h < params.band.keys ? seen.end - from : 0};
        }
        attn::mask_scores<true>(scores, limits);
    }

    __device__ __forceinline__ typename Plan::Stage& begin_results() {
        if constexpr (C::ENDS_IN_SLOTS) {
            plan.d_out_barriers.wait_full(d_out_at);
            __syncwarp();  // a lane that is late would find the slot filled again
            plan.d_out_barriers.release(d_out_at, lane);
            d_out_at.advance();
        }
        if constexpr (C::STAGED) {
            return plan.stages.own[consumer];
        } else {
            plan.q_barriers.wait_full(q_at);
            return reinterpret_cast<typename Plan::Stage*>(plan.q[q_at.slot].bytes)[consumer];
        }
    }
    __device__ __forceinline__ void end_results() {
        if constexpr (!C::STAGED) {
            begin_stage();
            plan.q_barriers.release(q_at, lane);
            q_at.advance();
        }
    }

    /// The stage is free again: what was sent from it has left, all but the last PENDING.
    template <int PENDING = 0>
    __device__ __forceinline__ void begin_stage() {
        if (thread == 0) {
            if constexpr (C::DETERMINISTIC) wait_added();
            ptx::wait_stores_read<PENDING>();
        }
        ptx::sync_threads(FIRST_CONSUMER + consumer, WARPGROUP);
    }

    /// All of the warpgroup's writes to the stage are visible to the copy engine.
    __device__ __forceinline__ void end_stage() {
        ptx::fence_async_shared();
        ptx::sync_threads(FIRST_CONSUMER + consumer, WARPGROUP);
    }

    /// What was handed over before has left the stage.
    __device__ __forceinline__ void wait_added() {
        ptx::wait(plan.stage_barriers[consumer].empty[0], stage_at.parity ^ 1);
    }

    __device__ __forceinline__ void hand_over(Handed next) {
        plan.handed[consumer] = next;
        ptx::arrive(plan.stage_barriers[consumer].full[0]);
        stage_at.advance();
    }

    /// Add one unit of dQ to the sums in global memory, or have it added in its turn.
    __device__ __forceinline__ void add_dq(const float (&dq)[tile::accumulators(tile::PANEL)], int plane, int block,
                                           int unit) {
        begin_stage();
        send_dq(dq, plane, block, unit);
    }

    /// The same from a stage that is free.
    __device__ __forceinline__ void send_dq(const float (&dq)[tile::accumulators(tile::PANEL)], int plane, int block,
                                            int unit) {
        tile::store_floats(plan.stages.own[consumer].dq, dq, thread);
        end_stage();
        if (thread == 0) {
            const int sums = (plane * params.row_blocks + block) * C::UNITS + unit;
            if constexpr (C::DETERMINISTIC) {
                hand_over({sums, turn_of<C>(params.band, block, work.key)});
            } else {
                ptx::reduce_add(params.dq[sums].values[0], &plan.stages.own[consumer].dq, sizeof(tile::Floats));
                ptx::commit_stores();
            }
        }
    }

    template <int DIM>
    __device__ __forceinline__ void store_result(tile::Panels<tile::ROWS, DIM>& staged,
                                                 const float (&values)[tile::accumulators(DIM)],
                                                 const ptx::TensorMap& target) {
        begin_stage<C::APART>();  // dK follows a dQ or dV, from where dV is to leave, and dV a dK
        tile::store_fragment<T, DIM>(staged, values, thread);
        end_stage();
        if (thread == 0) {
            const int key = work.key + own_key();
            const int column = C::WIDE ? consumer * DIM : 0;
            for (int p = 0; p < DIM / tile::PANEL; ++p) {
                ptx::store(target, staged.panel(p), column + p * tile::PANEL, key, work.kv_head, work.batch);
            }
            ptx::commit_stores();
        }
    }
};

}  // namespace backward
