// A step of the backward where a consumer owns half of the columns (head dims above 128).
//
// Both consumers share 64 keys. Each computes S^T and dP^T for half of the rows, and they exchange P^T and dS^T through
// shared memory; then each computes its columns of dV += P^T dO, dK += dS^T Q and dQ = dS K. In a CLUSTER dS^T goes to
// the other block too, while dK and dV are computed; each computes half of the columns of dQ, from the keys of both.
#pragma once
#include "backward/consumer.cuh"

namespace backward {

template <class C>
struct WideConsumer : Consumer<WideConsumer<C>, C> {
    using Base = Consumer<WideConsumer<C>, C>;
    using typename Base::Plan;
    using typename Base::Statistics;
    using typename Base::T;
    using Base::Base, Base::buffer, Base::consumer, Base::d_out_at, Base::d_scores, Base::dk, Base::dv, Base::lane,
        Base::params, Base::plan, Base::q_at, Base::scores, Base::thread;

    // As much of K as registers have room for, as operand of S: at 64 x 32 a product, S reads twice as much of K as of Q.
    static constexpr int HELD = C::STAGED || C::DROPOUT ? 0 : 8;
    u32 k_operand[HELD ? 4 * HELD : 1];
    float dq[C::OWN_UNITS][tile::accumulators(tile::PANEL)];
    u32 received = 0;  // parity of what the other block sends to this `buffer`

    /// First of this consumer's units of dQ; of the other block's K the columns of this block's come first.
    __device__ __forceinline__ int own_unit() const { return consumer * C::OWN_UNITS; }
    static __device__ __forceinline__ int cluster_unit() {
        return C::CLUSTER > 1 ? ptx::cluster_rank() * C::OWN_UNITS * CONSUMERS : 0;
    }

    /// All of dS^T is in shared memory: one thread sends it to the other block, and makes ready for what comes from there.
    __device__ __forceinline__ void exchange(typename Plan::Scores& ds) {
        if (consumer == 0 && thread == 0) {
            const u32 to = ptx::cluster_rank() ^ 1;
            ptx::Barrier& ready = plan.arrivals.d_scores_ready[buffer];
            ptx::arrive_expecting(ready, sizeof ds.bytes);
            ptx::copy_remote(ptx::remote_address(&plan.other.d_scores[buffer], to), ds.bytes, sizeof ds.bytes,
                             ptx::remote_address(&ready, to));
        }
    }

    __device__ __forceinline__ void multiply_dq(typename Plan::Scores& ds) {
#pragma unroll
        for (int u = 0; u < C::OWN_UNITS; ++u) ptx::pin(dq[u]);
        ptx::begin_products();
#pragma unroll
        for (int u = 0; u < C::OWN_UNITS; ++u) {
            tile::multiply_panels<T>(dq[u], ds.bytes, plan.k[0].panel(cluster_unit() + own_unit() + u), false);
        }
        ptx::commit_products();
    }

    /// The other block's keys.
    __device__ __forceinline__ void multiply_others_dq() {
        auto& other = plan.other;
        ptx::wait(plan.arrivals.d_scores_ready[buffer], received);
        ptx::begin_products();
#pragma unroll
        for (int u = 0; u < C::OWN_UNITS; ++u) {
            tile::multiply_panels<T>(dq[u], other.d_scores[buffer].bytes, other.k.panel(own_unit() + u), true);
        }
        ptx::commit_products();
    }

    __device__ __forceinline__ void add_dq(int plane, int block) {
#pragma unroll
        for (int u = 0; u < C::OWN_UNITS; ++u) {
            ptx::pin(dq[u]);
            const int unit = cluster_unit() + own_unit() + u;
            if constexpr (!C::STAGED) {
                // Shared memory, which bounds this step, is spared both ways of a stage.
                tile::add_floats(params.dq[(plane * params.row_blocks + block) * C::UNITS + unit], dq[u], thread);
            } else {
                Base::add_dq(dq[u], plane, block, unit);
            }
        }
    }

    __device__ __forceinline__ void multiply_dk(typename Plan::Scores& ds) {
        ptx::pin(dk);
        ptx::begin_products();
        tile::multiply_shared<T, C::OWN_DIM>(dk, ds, plan.q[q_at.slot], consumer * C::OWN_DIM / tile::PANEL);
        ptx::commit_products();
    }
    __device__ __forceinline__ void end_dk() {
        ptx::pin(dk);
        plan.q_barriers.release(q_at, lane);
        q_at.advance();
    }

    __device__ __forceinline__ void multiply_dv(typename Plan::Scores& p) {
        ptx::pin(dv);
        ptx::begin_products();
        tile::multiply_shared<T, C::OWN_DIM_V>(dv, p, plan.d_out[d_out_at.slot], consumer * C::OWN_DIM_V / tile::PANEL);
        ptx::commit_products();
    }
    __device__ __forceinline__ void end_dv() {
        ptx::pin(dv);
        plan.d_out_barriers.release(d_out_at, lane);
        d_out_at.advance();
    }

    __device__ __forceinline__ void begin_tile() {
        if constexpr (HELD > 0) tile::load_operand<HELD>(k_operand, plan.k[0], thread);
    }

    __device__ __forceinline__ void multiply_scores() {
        const int first_row = this->own_row();
        ptx::pin(scores);
        if constexpr (HELD > 0) {
            ptx::pin(k_operand);
            ptx::begin_products();
            tile::multiply_transposed<T, C::OWN_ROWS>(scores, k_operand, plan.k[0], plan.q[q_at.slot], first_row);
        } else {
            ptx::begin_products();
            tile::multiply_transposed<T, C::OWN_ROWS>(scores, plan.k[0], plan.q[q_at.slot], false, first_row);
        }
        ptx::commit_products();
    }

    template <bool MASKED>
    __device__ __forceinline__ void step(int plane, int block, bool last) {
        const int first_row = this->own_row();
        plan.q_barriers.wait_full(q_at);
        multiply_scores();
        Statistics lse, delta;  // read under the products
        this->load_statistics(lse, plan.lse[q_at.slot]);
        ptx::pin(lse);
        plan.d_out_barriers.wait_full(d_out_at);
        ptx::pin(d_scores);
        ptx::begin_products();
        tile::multiply_transposed<T, C::OWN_ROWS>(d_scores, plan.v[0], plan.d_out[d_out_at.slot], false, first_row);
        ptx::commit_products();
        this->load_statistics(delta, plan.delta[d_out_at.slot]);
        ptx::pin(delta);

        u32 operand[tile::packed(C::OWN_ROWS)];
        auto& [p, ds] = plan.scores[buffer];
        this->draw(plane, block);
        ptx::wait_products<1>();
        ptx::pin(scores);
        this->template weigh<MASKED>(block, lse);
        this->round_weights(operand);
        tile::store_operand<C::OWN_ROWS>(p, operand, thread, first_row);
        ptx::wait_products<0>();
        ptx::pin(d_scores);
        if (last) this->release_v();
        this->differentiate(delta);
        tile::to_operand<T>(operand, d_scores);
        tile::store_operand<C::OWN_ROWS>(ds, operand, thread, first_row);
        ptx::fence_async_shared();
        ptx::sync_threads(BOTH_CONSUMERS, CONSUMERS * WARPGROUP);

        if constexpr (C::CLUSTER > 1) {
            // dV first, which frees the only slot of dO; meanwhile dS comes from the other block.
            exchange(ds);
            multiply_dv(p);
            multiply_dk(ds);
            multiply_dq(ds);
            ptx::wait_products<2>();
            end_dv();
            multiply_others_dq();
            ptx::wait_products<2>();
            end_dk();
            ptx::wait_products<0>();
            if (last) this->release_k();
            add_dq(plane, block);
        } else {
            // dV first, which frees the only slot of dO. dQ before dK, so that its sums leave under dK, was slower (NOTES.md).
            multiply_dv(p);
            multiply_dk(ds);
            multiply_dq(ds);
            ptx::wait_products<2>();
            end_dv();
            ptx::wait_products<1>();
            end_dk();
            ptx::wait_products<0>();
            if (last) this->release_k();
            add_dq(plane, block);
        }
        received ^= buffer;
        buffer ^= 1;
    }
};

}  // namespace backward
