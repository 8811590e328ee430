"""Layouts of tensors, and the kernels' argument structs byte for byte as `csrc` declares them."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from attnbench.impls.flash_api.layout import Layout
from attnbench.impls.flash_cuda.configs import PANEL
from attnbench.impls.flash_cuda.driver import TensorMap

ROWS = 64
"""Query rows that one copy moves: those of a warpgroup."""

FORWARD_FIELDS = struct.Struct("<4Q4Q5i4x5i5i5ifi36x")
"""forward::Params after q, k, v, out: lse, parts, rng, ticket, lists, band, work, kv_heads, group, batch, splits,
queries, scale_log2, threshold."""

MERGE_FIELDS = struct.Struct("<4Q5i4x")
"""forward::MergeParams: parts, lse_parts, out, lse, splits, rows, heads, seqlen_q, dim_v."""

FORWARD_ADDRESSES = struct.Struct("<8Q")
"""Those that FORWARD_FIELDS begins with."""

NO_LISTS = (0,) * 5
"""The sizes of attn::BlockLists where there are none."""

NO_ADDRESSES = (0,) * 4
"""Their addresses."""

ROW_FIELDS = struct.Struct("<9Q6q5i4x4Q5i4xQ4i")
"""backward::RowParams: out, d_out, lse, d_lse, lse_log2, delta, dq, dq_count, ticket, strides of d_out and d_lse,
sizes; and of backward::OrderParams lists, order, tiles, planes, kv_heads, group."""

BACKWARD_FIELDS = struct.Struct("<7Q4Q5i4x5i5i3i3fii8x")
"""backward::Params after q, d_out, k, v, dk, dv: lse, delta, dq, rng, ticket, turns, order, lists, band, work,
kv_heads, group, row_blocks, scale, scale_log2, keep_scale, threshold, keep_rows."""

BACKWARD_ADDRESSES = struct.Struct("<11Q")
"""Those that BACKWARD_FIELDS begins with."""

FINISH_FIELDS = struct.Struct("<Q3if40x")
"""backward::FinishParams after dq's map: dq, kv_heads, group, row_blocks, scale."""


@lru_cache(maxsize=4096)
def addressable(layout: Layout, itemsize: int) -> bool:
    """Whether the copy engine can address such a tensor, once its base is 16-byte aligned."""
    shape, strides = layout
    unit = 16 // itemsize
    return strides[3] == 1 and all(
        n <= 1 or (s > 0 and s % unit == 0) for n, s in zip(shape[:3], strides[:3], strict=True)
    )


def readable(x: Tensor) -> tuple[Tensor, Layout]:
    """x if the copy engine can address it, or a contiguous copy; and the layout."""
    layout = x.shape, x.stride()
    if x.data_ptr() % 16 == 0 and addressable(layout, x.element_size()):
        return x, layout
    x = x.clone(memory_format=torch.contiguous_format)
    return x, (x.shape, x.stride())


def head_map(layout: Layout, dtype: torch.dtype, rows: int) -> TensorMap:
    """Map of a BSHD tensor as (batch, head, row, column), in boxes of `rows` x one panel."""
    batch, seqlen, heads, dim = layout[0]
    sb, ss, sh = _byte_strides(layout, dtype.itemsize)
    return TensorMap(dtype, (dim, seqlen, heads, batch), (ss, sh, sb), (PANEL, rows, 1, 1))


def grouped_map(
    layout: Layout, dtype: torch.dtype, kv_heads: int, rows: int = ROWS, members: int = 1
) -> TensorMap:
    """Map of a BSHD tensor as (batch, key head, row, head of the group, column), in boxes of `rows` x `members`."""
    batch, seqlen, heads, dim = layout[0]
    group = heads // kv_heads
    sb, ss, sh = _byte_strides(layout, dtype.itemsize)
    return TensorMap(
        dtype,
        (dim, group, seqlen, kv_heads, batch),
        (sh, ss, sh * group, sb),
        (PANEL, members, rows, 1, 1),
    )


def list_sizes(shape: tuple[int, ...], mask_block: tuple[int, int]) -> tuple[int, ...]:
    """The sizes of attn::BlockLists: rows of a batch entry and of a head, width, then what a block has along the rows
    of the lists and along what they name: (queries, keys) by query, (keys, queries) by key.

    shape: of the indices, (batch or 1, heads or 1, rows, width); a dimension of 1 is shared by all.
    """
    batch, heads, rows, width = shape
    return heads * rows if batch > 1 else 0, rows if heads > 1 else 0, width, *mask_block


def _byte_strides(layout: Layout, itemsize: int) -> tuple[int, ...]:
    # The stride of a dimension of size 1 means nothing, and the driver refuses an unaligned one.
    shape, strides = layout
    return tuple(s * itemsize if n > 1 else 16 for n, s in zip(shape[:3], strides[:3], strict=True))
