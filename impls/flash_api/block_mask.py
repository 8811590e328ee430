"""Block-sparse masks: lists of visited blocks, checked once, by query and by key."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each row of blocks, which blocks of the other side it visits: counts (B, H, rows), indices (B, H,
    rows, width)."""

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor

    def tensors(self) -> list[Tensor]:
        """The four tensors in a fixed order."""
        return [self.partial_count, self.partial_index, self.full_count, self.full_index]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of the score matrix are visited; the rest count as masked.

    Names as in torch's FlexAttention: kv_num_blocks int32 (B or 1, H or 1, query blocks) and kv_indices int32
    (..., query blocks, width) list the *partial* blocks of each query block, where causal and window of the call apply
    element by element; full_kv_num_blocks and full_kv_indices list the *full* ones, whose every element is
    visible and to which causal and window do not apply. H counts query heads. block_size is (queries, keys)
    of a block.

    Raises ValueError if shapes disagree, or counts or indices are out of range, unsorted or repeated, or a
    block is in both lists. These checks read the tensors once, here, and never during attention.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None = None
    full_kv_indices: Tensor | None = None
    block_size: tuple[int, int] = (128, 128)
    by_query: BlockLists = field(init=False, repr=False)
    by_key: BlockLists = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.block_size) != 2 or any(b < 32 or b % 32 for b in self.block_size):
            raise ValueError(f"block_size: got {self.block_size}, allowed are two positive multiples of 32")
        partial = _dense_of_lists("kv", self.kv_num_blocks, self.kv_indices)
        if (self.full_kv_num_blocks is None) != (self.full_kv_indices is None):
            raise ValueError("full_kv_num_blocks and full_kv_indices: give both or neither")
        full = torch.zeros_like(partial)
        if self.full_kv_num_blocks is not None and self.full_kv_indices is not None:
            full = _dense_of_lists("full_kv", self.full_kv_num_blocks, self.full_kv_indices)
            if full.shape != partial.shape:
                raise ValueError(
                    f"full_kv_indices: got {tuple(full.shape)}, kv_indices has {tuple(partial.shape)}"
                )
        if bool((partial & full).any()):
            raise ValueError("full_kv_indices: a block is listed both as partial and as full")
        object.__setattr__(self, "by_query", _lists_of_dense(partial, full))
        object.__setattr__(self, "by_key", _lists_of_dense(partial.transpose(2, 3), full.transpose(2, 3)))

    @classmethod
    def from_dense(
        cls, blocks: Tensor, block_size: tuple[int, int] = (128, 128), *, full: Tensor | None = None
    ) -> BlockMask:
        """From bool matrices (query blocks, key blocks), optionally with leading (batch, heads): `blocks`
        are visited, and those also in `full` skip causal and window."""
        if blocks.ndim not in (2, 4) or blocks.dtype != torch.bool:
            raise ValueError(
                f"blocks: got {blocks.dtype} {tuple(blocks.shape)}, allowed is bool with 2 or 4 dimensions"
            )
        if full is not None and (full.shape != blocks.shape or full.dtype != torch.bool):
            raise ValueError(
                f"full: got {full.dtype} {tuple(full.shape)}, allowed is bool {tuple(blocks.shape)}"
            )
        lead = (1,) * (4 - blocks.ndim)
        visited = blocks.reshape(lead + blocks.shape)
        skip = torch.zeros_like(visited) if full is None else visited & full.reshape(visited.shape)
        lists = _lists_of_dense(visited & ~skip, skip)
        return cls(
            lists.partial_count,
            lists.partial_index,
            lists.full_count,
            lists.full_index,
            block_size=block_size,
        )

    @classmethod
    def from_bsr(
        cls, crow: Tensor, col: Tensor, key_blocks: int, block_size: tuple[int, int] = (128, 128)
    ) -> BlockMask:
        """From the row pointers and column indices of a block-sparse-row matrix, as torch's sparse BSR
        stores them."""
        rows = crow.numel() - 1
        counts = crow.diff()
        if rows < 1 or int(crow[0]) != 0 or bool((counts < 0).any()) or int(crow[-1]) != col.numel():
            raise ValueError(
                "crow: row pointers must start at 0, never fall, and end at the number of column indices"
            )
        if col.numel() and not (int(col.min()) >= 0 and int(col.max()) < key_blocks):
            raise ValueError(f"col: indices must lie in [0, {key_blocks})")
        dense = torch.zeros((rows, key_blocks), dtype=torch.int32, device=col.device)
        row_of = torch.repeat_interleave(torch.arange(rows, device=col.device), counts.to(col.device))
        dense.index_put_((row_of, col.long()), torch.ones_like(row_of, dtype=torch.int32), accumulate=True)
        if bool((dense > 1).any()):
            raise ValueError("col: a row lists a block twice")
        return cls.from_dense(dense.bool(), block_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch or 1, heads or 1, query blocks, key blocks)."""
        batch, heads, rows, width = self.by_query.partial_index.shape
        return batch, heads, rows, width

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> None:
        """Raise ValueError unless this mask covers exactly a problem of these sizes."""
        rows, cols = (-(-n // b) for n, b in zip((seqlen_q, seqlen_k), self.block_size, strict=True))
        got = self.shape
        if got[0] not in (1, batch) or got[1] not in (1, heads) or got[2:] != (rows, cols):
            raise ValueError(
                f"block_mask: covers (batch, heads, query blocks, key blocks) {got}, allowed is"
                f" ({batch} or 1, {heads} or 1, {rows}, {cols}) for seqlen_q={seqlen_q}, seqlen_k={seqlen_k},"
                f" block_size={self.block_size}"
            )
        if self.by_query.partial_index.device != device:
            raise ValueError(f"block_mask: on {self.by_query.partial_index.device}, q is on {device}")


def _dense_of_lists(name: str, counts: Tensor, indices: Tensor) -> Tensor:
    """Bool (B, H, rows, width) of checked lists; the width of the index tensor is the number of key blocks."""
    if indices.ndim != 4 or counts.shape != indices.shape[:3]:
        raise ValueError(
            f"{name}_indices: got {tuple(indices.shape)} with {name}_num_blocks {tuple(counts.shape)},"
            " allowed is (B, H, query blocks, key blocks) with (B, H, query blocks)"
        )
    width = indices.shape[3]
    if bool(((counts < 0) | (counts > width)).any()):
        raise ValueError(f"{name}_num_blocks: counts must lie in [0, {width}]")
    listed = torch.arange(width, device=indices.device) < counts[..., None]
    if bool((listed & ((indices < 0) | (indices >= width))).any()):
        raise ValueError(f"{name}_indices: indices must lie in [0, {width})")
    if bool((listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])).any()):
        raise ValueError(f"{name}_indices: the indices of a row must be sorted and unique")
    at = torch.where(listed, indices, width).long()
    dense = torch.zeros((*indices.shape[:3], width + 1), dtype=torch.bool, device=indices.device)
    return dense.scatter_(3, at, True)[..., :width]


def _lists_of_dense(partial: Tensor, full: Tensor) -> BlockLists:
    """Counts and sorted indices of two bool block matrices (B, H, rows, cols)."""

    def of(dense: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort((~dense).to(torch.int8), dim=3, stable=True)
        return dense.sum(3, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()

    return BlockLists(*of(partial), *of(full))
