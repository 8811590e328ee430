// Block-sparse masks: the lists of visited blocks (flash_api/block_mask.py), walked in steps of a kernel's own size.
#pragma once
#include "attn/band.cuh"

namespace attn {

/// For each row of blocks the sorted blocks that it visits: partial ones, where the band applies, and full ones, where
/// it does not.
struct BlockLists {
    const i32 *partial_count, *partial_index, *full_count, *full_index;  // counts (rows), indices (rows, width)
    int batch_rows, head_rows, width;  // rows of a batch entry and of a head, 0 where all share them
    int size, listed_size;             // of a block: along the rows, and along what the lists name
};

/// The row of lists of a position.
PLAIN i64 list_row(const BlockLists& lists, int batch, int head, int position) {
    return static_cast<i64>(batch) * lists.batch_rows + head * lists.head_rows + position / lists.size;
}

/// What a row visits, in steps numbered from 0: first those of its full blocks, then those of its partial ones.
struct Steps {
    int whole;  // from this one on a mask is needed: by the end of the sequence,
    int full;   // and from this one on by the band
    int all;
};

/// Of the steps of the last block of a sorted list, how many reach past the end; of any other block none does.
template <int STEP>
PLAIN int steps_past(const BlockLists& lists, const i32* index, int count, int length) {
    if (count == 0) return 0;
    const int each = lists.listed_size / STEP;
    return each - min(each, (length - index[count - 1] * lists.listed_size) / STEP);
}

/// Steps of STEP positions, which divides a block; `length` is the sequence that the lists name blocks of. Without a
/// band partial blocks are full ones.
template <int STEP, bool BANDED>
PLAIN Steps steps_of(const BlockLists& lists, i64 row, int length) {
    const int each = lists.listed_size / STEP;
    const int full = lists.full_count[row], partial = lists.partial_count[row];
    Steps steps = {0, full * each, (full + partial) * each};
    steps.whole = steps.full - steps_past<STEP>(lists, lists.full_index + row * lists.width, full, length);
    if (!BANDED && steps.whole == steps.full) {
        steps.whole = steps.all - steps_past<STEP>(lists, lists.partial_index + row * lists.width, partial, length);
    }
    return steps;
}

/// First position of a step.
template <int STEP>
PLAIN int position_of(const BlockLists& lists, i64 row, const Steps& steps, int step) {
    const int each = lists.listed_size / STEP;
    const bool is_full = step < steps.full;
    const int within = is_full ? step : step - steps.full;
    const i32* index = (is_full ? lists.full_index : lists.partial_index) + row * lists.width;
    return index[within / each] * lists.listed_size + within % each * STEP;
}

}  // namespace attn
