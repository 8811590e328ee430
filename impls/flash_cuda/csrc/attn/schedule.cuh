// The order in which a persistent grid works through tiles. Plain arithmetic, evaluated by the compiler in the tests.
#pragma once
#include "attn/band.cuh"

namespace attn {

/// tiles of each plane (batch, head), and how many planes share a wave: as many as fit their K and V in cache.
/// total = tiles * planes, shared by `blocks` persistent blocks.
struct Work {
    int tiles, planes, planes_per_wave, total, blocks;
};

struct Place {
    int tile, plane;
};

/// The index-th piece of work: wave by wave, within a wave the last tiles (the longest of a causal mask) of all
/// its planes first.
PLAIN Place place_of(const Work& work, int index) {
    const int wave = index / (work.tiles * work.planes_per_wave);
    const int within = index - wave * work.tiles * work.planes_per_wave;
    const int planes = min(work.planes_per_wave, work.planes - wave * work.planes_per_wave);
    return {work.tiles - 1 - within / planes, wave * work.planes_per_wave + within % planes};
}

/// The index-th of `shares` nearly equal parts of a range.
PLAIN Range share_of(Range range, int index, int shares) {
    return {range.begin + range.size() * index / shares, range.begin + range.size() * (index + 1) / shares};
}

}  // namespace attn
