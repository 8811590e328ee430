// A step of the backward where a consumer owns 64 keys (head dims up to 128).
//
// S^T = K Q^T and dP^T = V dO^T come out transposed, so that P^T and dS^T feed dV += P^T dO and dK += dS^T Q from
// registers. Only dS crosses shared memory: there the consumers exchange it, and each computes its part of dQ = dS K
// from all 128 keys.
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
    using Base::Base, Base::buffer, Base::consumer, Base::d_out_at, Base::d_scores, Base::dk, Base::dv, Base::lane,
        Base::plan, Base::q_at, Base::scores, Base::PART, Base::PARTS;

    Operand p_operand[PARTS], ds_operand[PARTS];
    float dq[tile::accumulators(tile::PANEL)];

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

    __device__ __forceinline__ void begin_tile() {}

    template <bool MASKED>
    __device__ __forceinline__ void step(int plane, int block, bool last) {
        plan.q_barriers.wait_full(q_at);
        ptx::pin(scores);
        ptx::begin_products();
        tile::multiply_transposed<T, C::ROWS>(scores, plan.k[consumer], plan.q[q_at.slot]);
        ptx::commit_products();
        Statistics lse, delta;
        this->load_statistics(lse, plan.lse[q_at.slot]);
        plan.d_out_barriers.wait_full(d_out_at);
        ptx::pin(d_scores);
        ptx::begin_products();
        tile::multiply_transposed<T, C::ROWS>(d_scores, plan.v[consumer], plan.d_out[d_out_at.slot]);
        ptx::commit_products();

        this->draw(plane, block);
        ptx::wait_products<1>();
        ptx::pin(scores);
        if constexpr (MASKED) this->mask(block * C::ROWS);
        const int now = ptx::opaque(threadIdx.x) % WARPGROUP;  // addresses are not kept from step to step
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            this->weigh(lse, part);
            this->round_weights(p_operand[part], part);
            add_dv(part);

            // Half of them here: for all there are no registers.
            this->template load_statistics<0, PART / 2>(delta, plan.delta[d_out_at.slot], part);
            if (part == 0) {
                ptx::wait_products<1>();
                ptx::pin(d_scores);
                if (last) this->release_v();
            }
            this->template load_statistics<PART / 2, PART>(delta, plan.delta[d_out_at.slot], part);
            this->differentiate(delta, part);
            this->round(ds_operand[part], d_scores, part);
            if (part + 1 < PARTS) {
                add_dk(part);
                this->load_statistics(lse, plan.lse[q_at.slot], part + 1);
            }
            tile::store_operand<PART>(plan.scores[buffer][consumer], ds_operand[part], now, part * PART);
        }
        ptx::fence_async_shared();
        ptx::sync_threads(BOTH_CONSUMERS, CONSUMERS * WARPGROUP);

        // dQ before the last of dK: its way through shared memory then runs under that.
        const bool own = !C::IN_TURNS || buffer == consumer;
        const int unit = C::IN_TURNS ? 0 : consumer;
        if (own) {
            ptx::pin(dq);
            ptx::begin_products();
#pragma unroll
            for (int c = 0; c < CONSUMERS; ++c) {
                tile::multiply_panels<T>(dq, plan.scores[buffer][c].panel(unit / C::ACROSS),
                                         plan.k[c].panel(unit % C::ACROSS), c > 0);
            }
            ptx::commit_products();
        }
        buffer ^= 1;
        add_dk(PARTS - 1);
        if (own) this->begin_stage();
        ptx::wait_products<1>();
        ptx::pin(dv);
#pragma unroll
        for (Operand& part : p_operand) ptx::pin(part);
        plan.d_out_barriers.release(d_out_at, lane);
        if (last) this->release_k();
        if (own) {
            ptx::pin(dq);
            this->send_dq(dq, plane, block, unit);
        }
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
