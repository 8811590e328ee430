// A tile of 16-bit elements in shared memory, as the copy engine writes it and the tensor cores read it.
//
// A tile is cut into panels of 64 columns: rows of 128 bytes, whose 16-byte chunks are swizzled (chunk ^ row % 8), so
// that eight rows of one chunk lie in different banks.
#pragma once
#include "ptx/base.cuh"

namespace tile {

constexpr int PANEL = 64;       // columns of a panel
constexpr int ROW_BYTES = 128;  // of a panel
constexpr int SWIZZLE_ROWS = 8;

/// ROWS x COLS elements, element (r, c) in row r of panel c / 64.
template <int ROWS, int COLS>
struct alignas(1024) Panels {
    static_assert(ROWS % SWIZZLE_ROWS == 0 && COLS % PANEL == 0);
    static constexpr int PANELS = COLS / PANEL;
    static constexpr int PANEL_BYTES = ROWS * ROW_BYTES;
    static constexpr int BYTES = PANELS * PANEL_BYTES;
    u8 bytes[BYTES];

    __device__ __forceinline__ u8* panel(int index) { return bytes + index * PANEL_BYTES; }
};

/// Offset in bytes of the 16-byte chunk that holds column 8 * `chunk` of `row`, within a panel.
PLAIN u32 chunk_offset(u32 row, u32 chunk) { return row * ROW_BYTES + ((chunk ^ (row % SWIZZLE_ROWS)) << 4); }

// Matrix descriptors of wgmma (PTX ISA, "Matrix descriptor format"), as two words; addresses and strides in units of
// 16 bytes. Low: bits 0-13 start, 16-29 leading stride. High: bits 0-13 stride between groups of 8 rows, 30-31 swizzle
// (1: 128 bytes).
struct Operand {
    u32 low;
};
constexpr u32 OPERAND_HIGH = 1u << 30 | SWIZZLE_ROWS * ROW_BYTES >> 4;

/// Where an operand starts. In a cluster an address, of a block's own memory too, has the block's rank in bits 24 and up,
/// which would be added to the leading stride.
DEVICE u32 start_of(const void* tile) { return ptx::shared_address(tile) >> 4 & 0x3FFF; }

/// Operand whose depth is contiguous (Q and K of S = Q K^T). The leading stride has no meaning here.
DEVICE Operand along_rows(const void* tile) { return {ptx::opaque(start_of(tile) | 1u << 16)}; }

/// Operand whose M or N is contiguous (V of O = P V), beyond 64 of them in panels `panel_bytes` apart.
DEVICE Operand along_columns(const void* tile, u32 panel_bytes) {
    return {ptx::opaque(start_of(tile) | panel_bytes >> 4 << 16)};
}

/// Steps, in bytes, to the k-th slice of 16 along the depth of an operand.
template <class Tile>
PLAIN u32 slice_along_rows(int k) {
    return (k * 16 / PANEL) * Tile::PANEL_BYTES + (k * 16 % PANEL) * 2;
}
PLAIN u32 slice_along_columns(int k) { return k * 16 * ROW_BYTES; }

/// The descriptor of an operand's slice that begins `bytes` further on.
DEVICE u64 slice(const Operand& operand, u32 bytes) {
    return static_cast<u64>(OPERAND_HIGH) << 32 | (operand.low + (bytes >> 4));
}

}  // namespace tile
