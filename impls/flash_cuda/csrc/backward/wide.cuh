// A step of the backward where a consumer owns half of the columns (head dims above 128).
//
// Both consumers share 64 keys. Each computes S^T and dP^T for half of the rows, and they exchange P^T and dS^T through
// shared memory; then each computes its columns of dV += P^T dO, dK += dS^T Q and dQ = dS K.
#pragma once
#include "backward/consumer.cuh"

namespace backward {

template <class C>
struct WideConsumer : Consumer<WideConsumer<C>, C> {
    using Base = Consumer<WideConsumer<C>, C>;
    using typename Base::Plan;
    using typename Base::T;
    using Base::Base, Base::buffer, Base::consumer, Base::d_out_at, Base::d_scores, Base::dk, Base::dv, Base::lane,
        Base::plan, Base::q_at, Base::scores, Base::thread;

    float dq[C::OWN_UNITS][tile::accumulators(tile::PANEL)];

    template <bool MASKED>
    __device__ __forceinline__ void step(int plane, int block) {
        const int first_row = this->own_row();
        plan.q_barriers.wait_full(q_at);
        ptx::pin(scores);
        ptx::begin_products();
        tile::multiply_transposed<T, C::OWN_ROWS>(scores, plan.k[0], plan.q[q_at.slot], false, first_row);
        ptx::commit_products();
        plan.d_out_barriers.wait_full(d_out_at);
        ptx::pin(d_scores);
        ptx::begin_products();
        tile::multiply_transposed<T, C::OWN_ROWS>(d_scores, plan.v[0], plan.d_out[d_out_at.slot], false, first_row);
        ptx::commit_products();

        u32 operand[tile::packed(C::OWN_ROWS)];
        auto& [p, ds] = plan.scores[buffer];
        this->draw(plane, block);
        ptx::wait_products<1>();
        ptx::pin(scores);
        this->template weigh<MASKED>(block);
        this->round_weights(operand);
        tile::store_operand<C::OWN_ROWS>(p, operand, thread, first_row);
        ptx::wait_products<0>();
        ptx::pin(d_scores);
        this->differentiate();
        tile::to_operand<T>(operand, d_scores);
        tile::store_operand<C::OWN_ROWS>(ds, operand, thread, first_row);
        ptx::fence_async_shared();
        ptx::sync_threads(BOTH_CONSUMERS, CONSUMERS * WARPGROUP);

        // dV first, which frees the only slot of dO; dK last, under which the sums of dQ leave.
        ptx::pin(dv);
        ptx::pin(dk);
#pragma unroll
        for (int u = 0; u < C::OWN_UNITS; ++u) ptx::pin(dq[u]);
        ptx::begin_products();
        tile::multiply_shared<T, C::OWN_DIM_V>(dv, p, plan.d_out[d_out_at.slot], consumer * C::OWN_DIM_V / tile::PANEL);
        ptx::commit_products();
#pragma unroll
        for (int u = 0; u < C::OWN_UNITS; ++u) {
            tile::multiply_panels<T>(dq[u], ds.bytes, plan.k[0].panel(consumer * C::OWN_UNITS + u), false);
        }
        ptx::commit_products();
        tile::multiply_shared<T, C::OWN_DIM>(dk, ds, plan.q[q_at.slot], consumer * C::OWN_DIM / tile::PANEL);
        ptx::commit_products();
        ptx::wait_products<2>();
        ptx::pin(dv);
        plan.d_out_barriers.release(d_out_at, lane);
        d_out_at.advance();
        ptx::wait_products<1>();
#pragma unroll
        for (int u = 0; u < C::OWN_UNITS; ++u) {
            ptx::pin(dq[u]);
            this->add_dq(dq[u], plane, block, consumer * C::OWN_UNITS + u);
        }
        ptx::wait_products<0>();
        ptx::pin(dk);
        plan.q_barriers.release(q_at, lane);
        q_at.advance();
        buffer ^= 1;
    }
};

}  // namespace backward
