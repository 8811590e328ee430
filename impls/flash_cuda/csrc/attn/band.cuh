// Who sees whom: query row i sees key j iff i + shift - left <= j <= i + shift + right and 0 <= j < keys.
// Plain arithmetic, evaluated by the compiler in the tests.
#pragma once
#include "ptx/base.cuh"

namespace attn {

PLAIN int min(int a, int b) { return a < b ? a : b; }
PLAIN int max(int a, int b) { return a > b ? a : b; }
PLAIN int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// A half-open range.
struct Range {
    int begin, end;
    constexpr __device__ __forceinline__ int size() const { return end > begin ? end - begin : 0; }
};

/// The band of a call. An unbounded side is left out at compile time, and its value is not read.
struct Band {
    int rows, keys, shift, left, right;
};

/// Keys that row i sees.
template <bool HAS_LEFT, bool HAS_RIGHT>
PLAIN Range visible_keys(const Band& band, int row) {
    return {HAS_LEFT ? max(0, row + band.shift - band.left) : 0,
            HAS_RIGHT ? min(band.keys, row + band.shift + band.right + 1) : band.keys};
}

/// Keys that some row of [first, last] sees.
template <bool HAS_LEFT, bool HAS_RIGHT>
PLAIN Range keys_of_any(const Band& band, int first, int last) {
    return {visible_keys<HAS_LEFT, HAS_RIGHT>(band, first).begin, visible_keys<HAS_LEFT, HAS_RIGHT>(band, last).end};
}

/// Keys that every row of [first, last] sees.
template <bool HAS_LEFT, bool HAS_RIGHT>
PLAIN Range keys_of_all(const Band& band, int first, int last) {
    return {visible_keys<HAS_LEFT, HAS_RIGHT>(band, last).begin, visible_keys<HAS_LEFT, HAS_RIGHT>(band, first).end};
}

/// Rows that see some key of [first, last].
template <bool HAS_LEFT, bool HAS_RIGHT>
PLAIN Range rows_of_any(const Band& band, int first, int last) {
    return {HAS_RIGHT ? max(0, first - band.shift - band.right) : 0,
            HAS_LEFT ? min(band.rows, last - band.shift + band.left + 1) : band.rows};
}

/// Rows that see every key of [first, last].
template <bool HAS_LEFT, bool HAS_RIGHT>
PLAIN Range rows_of_all(const Band& band, int first, int last) {
    return {HAS_RIGHT ? max(0, last - band.shift - band.right) : 0,
            HAS_LEFT ? min(band.rows, first - band.shift + band.left + 1) : band.rows};
}

/// Blocks of SIZE that touch a range.
template <int SIZE>
PLAIN Range blocks_touching(Range range) {
    const int begin = range.begin / SIZE;
    return {begin, max(begin, ceil_div(max(range.end, 0), SIZE))};
}

/// Blocks of SIZE that lie within a range; possibly none, with end < begin.
template <int SIZE>
PLAIN Range blocks_within(Range range) {
    return {ceil_div(range.begin, SIZE), max(range.end, 0) / SIZE};
}

}  // namespace attn
