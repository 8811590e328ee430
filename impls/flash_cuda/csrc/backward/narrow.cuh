// A step of the backward where a consumer owns 64 keys (head dims up to 128).
//
// S^T = K Q^T and dP^T = V dO^T come out transposed, so that P^T and dS^T feed dV += P^T dO and dK += dS^T Q from
// registers. Only dS crosses shared memory: there the consumers exchange it, and each computes its part of dQ = dS K
// from all 128 keys, a step late: at the end of its own step dQ would wait for the other consumer's dS, with nothing
// for the tensor cores to do meanwhile.
#pragma once
#include "backward/consumer.cuh"

namespace backward {

template <class C>
struct NarrowConsumer : Consumer<NarrowConsumer<C>, C> {
    using Base = Consumer<NarrowConsumer<C>, C>;
    using typename Base::Operand;
    using typename Base::Plan;
    using typename Base::Statistics;
    using typename Base::T;
    using Base::Base, Base::consumer, Base::d_out_at, Base::d_scores, Base::dk, Base::dv, Base::lane,
        Base::plan, Base::q_at, Base::scores, Base::PART, Base::PARTS;

    /// How many parts' weights are ahead of their differences, for which parts of 64 leave no registers.
    static constexpr int AHEAD = PART < 64 && PARTS > 1;
    Operand p_operand[PARTS], ds_operand[PARTS];
    float dq[tile::accumulators(tile::PANEL)];
    tile::Cursor<2> dq_at;           // of plan.scores: where the latest dS lies, or is to lie
    int dq_plane = 0, dq_block = -1;  // the block of rows whose dQ is still to be computed; none: < 0

    /// Start a part's dV += P^T dO, and dK += dS^T Q.
    __device__ __forceinline__ void add_dv(int part) {
        if (part == 0) ptx::pin(dv);
        ptx::pin(p_operand[part]);
        ptx::begin_products();
        tile::multiply<T, C::DIM_V>(dv, p_operand[part], plan.d_out[d_out_at.slot], true, part * PART);
        ptx::commit_products();
    }
    __device__ __forceinline__ void add_dk(int part) {
        if (part == 0) ptx::pin(dk);
        ptx::pin(ds_operand[part]);
        ptx::begin_products();
        tile::multiply<T, C::DIM>(dk, ds_operand[part], plan.q[q_at.slot], true, part * PART);
        ptx::commit_products();
    }

    /// Whether this consumer has a part in the latest dQ, and the part.
    __device__ __forceinline__ bool has_late_dq() const {
        return dq_block >= 0 && (!C::IN_TURNS || dq_at.slot == consumer);
    }
    __device__ __forceinline__ int own_unit() const { return C::IN_TURNS ? 0 : consumer; }

    /// Start it; then the LATER groups of products that `then` starts; and leave it in the stage while these are computed.
    template <int LATER, class Then>
    __device__ __forceinline__ void stage_late_dq(Then then) {
        if (dq_block >= 0) ptx::wait(plan.scores_ready[dq_at.slot], dq_at.parity);  // of both consumers
        if (has_late_dq()) {
            ptx::pin(dq);
            ptx::begin_products();
#pragma unroll
            for (int c = 0; c < CONSUMERS; ++c) {
                tile::multiply_panels<T>(dq, plan.scores[dq_at.slot][c].panel(own_unit() / C::ACROSS),
                                         plan.k[c].panel(own_unit() % C::ACROSS), c > 0);
            }
            ptx::commit_products();
            then();
            this->begin_stage();
            ptx::wait_products<LATER>();
            ptx::pin(dq);
            tile::store_floats(plan.stages.own[consumer].dq, dq, this->thread);
        } else {
            then();
        }
    }
    /// And away from there. The slot of dS before that one has been read, and takes the next.
    __device__ __forceinline__ void send_late_dq() {
        if (has_late_dq()) this->send_stage(dq_plane, dq_block, own_unit());
        if (dq_block >= 0) dq_at.advance();
    }

    __device__ __forceinline__ void begin_tile() {}
    __device__ __forceinline__ void end_tile() {
        stage_late_dq<0>([] {});
        send_late_dq();
        dq_block = -1;
    }

    template <bool MASKED>
    __device__ __forceinline__ void step(int plane, int block) {
        plan.q_barriers.wait_full(q_at);
        stage_late_dq<1>([&] {
            ptx::pin(scores);
            ptx::begin_products();
            tile::multiply_transposed<T, C::ROWS>(scores, plan.k[consumer], plan.q[q_at.slot]);
            ptx::commit_products();
        });
        plan.d_out_barriers.wait_full(d_out_at);
        ptx::pin(d_scores);
        ptx::begin_products();
        tile::multiply_transposed<T, C::ROWS>(d_scores, plan.v[consumer], plan.d_out[d_out_at.slot]);
        ptx::commit_products();
        send_late_dq();
        dq_plane = plane;
        dq_block = block;

        constexpr int EARLY = PART < 64 ? PART : PART / 2;
        Statistics lse, delta;
        this->load_statistics(lse, plan.lse[q_at.slot]);
        this->draw(plane, block);
        ptx::wait_products<1>();
        ptx::pin(scores);
        if constexpr (MASKED) this->mask(block * C::ROWS);
        const int now = ptx::opaque(threadIdx.x) % WARPGROUP;  // addresses are not kept from step to step
#pragma unroll
        for (int part = 0; part < PARTS + AHEAD; ++part) {
            if (part < PARTS) {
                this->weigh(lse, part);
                this->round_weights(p_operand[part], part);
                add_dv(part);
                if (AHEAD && part + 1 < PARTS) this->load_statistics(lse, plan.lse[q_at.slot], part + 1);
            }
            const int late = part - AHEAD;
            if (late < 0) continue;

            // Of parts of 64 half of them here: for all there are no registers.
            this->template load_statistics<0, EARLY>(delta, plan.delta[d_out_at.slot], late);
            if (late == 0) {
                ptx::wait_products<1 + AHEAD>();
                ptx::pin(d_scores);
            }
            this->template load_statistics<EARLY, PART>(delta, plan.delta[d_out_at.slot], late);
            this->differentiate(delta, late);
            this->round(ds_operand[late], d_scores, late);
            tile::store_operand<PART>(plan.scores[dq_at.slot][consumer], ds_operand[late], now, late * PART);
            add_dk(late);
            if (!AHEAD && part + 1 < PARTS) this->load_statistics(lse, plan.lse[q_at.slot], part + 1);
        }
        ptx::fence_async_shared();
        __syncwarp();
        if (lane == 0) ptx::arrive(plan.scores_ready[dq_at.slot]);

        ptx::wait_products<1>();
        ptx::pin(dv);
#pragma unroll
        for (Operand& part : p_operand) ptx::pin(part);
        plan.d_out_barriers.release(d_out_at, lane);
        ptx::wait_products<0>();
        ptx::pin(dk);
#pragma unroll
        for (Operand& part : ds_operand) ptx::pin(part);
        plan.q_barriers.release(q_at, lane);
        q_at.advance();
        d_out_at = q_at;  // as many slots: the compiler keeps one count for both
    }
};

}  // namespace backward
