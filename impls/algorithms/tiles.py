"""How a problem is cut into tiles, and blocks of rows brought from memory and written back.

Every access of the tiled algorithms to their operands goes through ``Heads``, so one place counts them when the
problem is posed on a modelled two-level memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnbench.harness.problem import Problem
from attnbench.harness.two_level import TwoLevelMemory
from attnbench.impls.algorithms.online_softmax import accumulator_dtype

BLOCK = {"cpu": 128, "cuda": 1024}
"""Tile edge. On a GPU every torch operation is a launch, so a tile is large enough to fill the device."""

SMALLEST_BLOCK = 64
"""Least tile edge under a block pattern, whose own blocks set the tile so that hidden ones can be skipped."""


@dataclass(frozen=True)
class Tiles:
    """How a problem is cut into (block_q x block_k) tiles, and what the mask leaves of each.

    visible, whole: numpy bool (tiles of Q, tiles of K): may the tile hold a visible pair, are all its pairs visible.
    first, last: the band of each row, int64 (seqlen_q,). blocks: the pattern (1 or heads, rows, columns) or None.
    memory: what counts accesses to operands, or None.
    """

    problem: Problem
    block_q: int
    block_k: int
    visible: np.ndarray
    whole: np.ndarray
    first: Tensor
    last: Tensor
    blocks: Tensor | None
    memory: TwoLevelMemory | None

    @classmethod
    def of(
        cls,
        problem: Problem,
        device: torch.device,
        block: tuple[int, int] | None = None,
        memory: TwoLevelMemory | None = None,
    ) -> Tiles:
        """Reads the mask's row bounds and block pattern; never a (seqlen_q, seqlen_k) array. block: rows of Q and of K
        in a tile; None for the device's own. ValueError where it cuts across the blocks of a pattern."""
        mask, rows, keys = problem.mask, problem.seqlen_q, problem.seqlen_k
        block_q, block_k = block or _usual_block(problem, device)
        if mask.blocks:
            edges = ((block_q, mask.blocks.block_q), (block_k, mask.blocks.block_k))
            if any(tile % own and own % tile for tile, own in edges):
                raise ValueError(
                    f"tiles of {block_q}x{block_k} cut across blocks of {mask.blocks.block_q}x{mask.blocks.block_k}"
                )
        # One loop over tiles serves all heads: a tile is visited if any head sees it.
        by_head = mask.tiles(problem.heads, rows, keys, block_q, block_k)
        visible, whole = np.logical_or.reduce(by_head[0]), np.logical_and.reduce(by_head[1])
        blocks = None
        if mask.blocks:
            blocks = torch.tensor(mask.blocks.blocks(problem.heads, rows, keys), device=device)
        first, last = mask.row_bounds(rows, keys)
        bounds = [torch.from_numpy(bound).to(device) for bound in (first, last)]
        return cls(problem, block_q, block_k, visible, whole, bounds[0], bounds[1], blocks, memory)

    def rows(self, i: int) -> slice:
        return slice(i * self.block_q, min((i + 1) * self.block_q, self.problem.seqlen_q))

    def keys(self, j: int) -> slice:
        return slice(j * self.block_k, min((j + 1) * self.block_k, self.problem.seqlen_k))

    def seen_by(self, i: int) -> list[int]:
        """Tiles of K that tile i of Q visits."""
        return np.flatnonzero(self.visible[i]).tolist()

    def seeing(self, j: int) -> list[int]:
        """Tiles of Q that visit tile j of K."""
        return np.flatnonzero(self.visible[:, j]).tolist()

    def heads(self, tensor: Tensor, *, written: bool = False) -> Heads:
        """Blocks of a BSHD tensor; written: it has just been filled, which is an access to all of it."""
        if written and self.memory:
            self.memory.write(tensor.numel())
        return Heads(tensor, self.problem.kv_heads, self.memory)

    def hide(self, scores: Tensor, i: int, j: int) -> Tensor:
        """Sets hidden pairs of tile (i, j), scores (batch, kv_heads, group * rows, keys), to -inf in place."""
        if self.whole[i, j]:
            return scores
        rows, keys = self.rows(i), self.keys(j)
        columns = torch.arange(keys.start, keys.stop, device=scores.device)
        visible = ((columns >= self.first[rows, None]) & (columns < self.last[rows, None]))[None]
        if self.blocks is not None and (pattern := self.problem.mask.blocks):
            lines = torch.arange(rows.start, rows.stop, device=scores.device)
            visible = visible & self.blocks[:, lines // pattern.block_q][:, :, columns // pattern.block_k]
        scores.view(self.problem.batch, self.problem.heads, *visible.shape[1:]).masked_fill_(
            ~visible, float("-inf")
        )
        return scores


def _usual_block(problem: Problem, device: torch.device) -> tuple[int, int]:
    if pattern := problem.mask.blocks:
        return (
            -(-SMALLEST_BLOCK // pattern.block_q) * pattern.block_q,
            -(-SMALLEST_BLOCK // pattern.block_k) * pattern.block_k,
        )
    return BLOCK[device.type], BLOCK[device.type]


class Heads:
    """A BSHD tensor seen as (batch, kv_heads, group, seqlen, dim), read and written by blocks of its rows.

    A block is (batch, kv_heads, group * rows, dim): the query heads of a group are more rows for one K/V head, so
    that grouped K and V are never repeated. A block of a score matrix is asked for by rows and columns.
    """

    def __init__(self, tensor: Tensor, kv_heads: int, memory: TwoLevelMemory | None = None) -> None:
        self.view = tensor.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        self.memory = memory

    def __getitem__(self, where: slice | tuple[slice, slice]) -> Tensor:
        block = self._at(where)
        if self.memory:
            self.memory.read(block.numel())
        return block.flatten(2, 3)

    def __setitem__(self, where: slice | tuple[slice, slice], block: Tensor) -> None:
        target = self._at(where)
        if self.memory:
            self.memory.write(target.numel())
        target.copy_(block.view(target.shape))

    def add(self, where: slice | tuple[slice, slice], block: Tensor) -> None:
        target = self._at(where)
        if self.memory:
            self.memory.read(target.numel())
            self.memory.write(target.numel())
        target.add_(block.view(target.shape))

    def _at(self, where: slice | tuple[slice, slice]) -> Tensor:
        rows, columns = where if isinstance(where, tuple) else (where, slice(None))
        return self.view[..., rows, columns]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (.., m, k) times b (.., k, n) of one dtype, accumulated and returned in fp32, or fp64 for fp64."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return out.unflatten(0, a.shape[:2])
    wide = accumulator_dtype(a)
    return a.to(wide) @ b.to(wide)


def by_row(statistic: Tensor) -> Tensor:
    """(batch, seqlen_q, heads, 1) to the contract's fp32 (batch, heads, seqlen_q)."""
    return statistic[..., 0].transpose(1, 2).to(torch.float32).contiguous()
