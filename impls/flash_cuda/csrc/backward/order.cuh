// By LISTS tiles of keys differ in length: in which order they are worked on.
//
// Of a plane those that visit the most blocks go first, so that the last ones to end are short. In the order of their keys the
// busiest multiprocessor had 1.06 of the mean's work at a density of 0.25 and 16 heads of 16k keys (counted).
#pragma once
#include "attn/block_lists.cuh"

namespace backward {

/// How many blocks of queries the keys of a tile visit, in all heads of a group whose first is `head`.
PLAIN int count_listed(const attn::BlockLists& lists, int batch, int head, int group, int key) {
    int count = 0;
#pragma unroll 1  // of few registers
    for (int member = 0; member < group; ++member) {
        const i64 row = attn::list_row(lists, batch, head + member, key);
        count += lists.full_count[row] + lists.partial_count[row];
    }
    return count;
}

/// Arguments of `order_tiles`, by the names of backward::Params.
struct OrderParams {
    attn::BlockLists lists;
    i32* order;
    int tiles, planes, kv_heads, group;
};

/// A warp for each tile of KEYS keys: its place is how many of its plane go before it.
template <int KEYS>
DEVICE void order_tiles(const OrderParams& params) {
    const int lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    for (int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; at < params.planes * params.tiles; at += warps) {
        const int plane = at / params.tiles, tile = at - plane * params.tiles;
        const int batch = plane / params.kv_heads, head = (plane - batch * params.kv_heads) * params.group;
        const int own = count_listed(params.lists, batch, head, params.group, tile * KEYS);
        int before = 0;
        for (int other = lane; other < params.tiles; other += 32) {
            const int count = count_listed(params.lists, batch, head, params.group, other * KEYS);
            before += count > own || (count == own && other < tile);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(0xffffffffu, before, step);
        if (lane == 0) params.order[plane * params.tiles + before] = tile;
    }
}

}  // namespace backward
