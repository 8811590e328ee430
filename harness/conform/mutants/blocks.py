"""Bugs of block-sparse masks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps
from attnbench.harness.masks import Mask

CONTROL = "block_sparse/dense-control"


class _Blocks(Steps):
    """Steps with the visible blocks at hand, bool (1 or heads, rows, columns), to be spread over the pairs."""

    def blocks(self, backward: bool) -> Tensor | None:
        problem, pattern = self.problem, self.problem.mask.blocks
        if pattern is None:
            return None
        return torch.tensor(
            pattern.blocks(problem.heads, problem.seqlen_q, problem.seqlen_k), device=self.device
        )

    def visible(self, backward: bool) -> Tensor:
        problem, pattern, blocks = self.problem, self.problem.mask.blocks, self.blocks(backward)
        if pattern is None or blocks is None:
            return super().visible(backward)
        rows = torch.arange(problem.seqlen_q, device=self.device)
        keys = torch.arange(problem.seqlen_k, device=self.device)
        spread = blocks[:, rows // pattern.block_q][:, :, keys // pattern.block_k]
        return spread & self.band(rows, blocks)

    def band(self, rows: Tensor, blocks: Tensor) -> Tensor:
        problem = self.problem
        band = dataclasses.replace(problem.mask, blocks=None)
        return band.dense(rows, problem.heads, problem.seqlen_q, problem.seqlen_k)


@planted("block_sparse/odd-tails", control=CONTROL)
class LastBlockIsItsNeighbour(_Blocks):
    """The last block of a row has the visibility of the one before it."""

    def blocks(self, backward: bool) -> Tensor | None:
        blocks = super().blocks(backward)
        if blocks is not None and blocks.shape[2] > 1:
            blocks[:, :, -1] = blocks[:, :, -2]
        return blocks


@planted("block_sparse/partial-blocks", control="block_sparse/patterns")
class PartialBlockIsFull(_Blocks):
    """A visible block is visible whole: the band inside it is forgotten."""

    def band(self, rows: Tensor, blocks: Tensor) -> Tensor:
        return torch.ones_like(super().band(rows, blocks))


@planted("block_sparse/patterns", control=CONTROL, cites=("pytorch#141126",))
class BackwardTransposesThePattern(_Blocks):
    """The backward's lists, by key, are those by query."""

    def blocks(self, backward: bool) -> Tensor | None:
        blocks = super().blocks(backward)
        return blocks.mT if blocks is not None and backward and blocks.shape[1] == blocks.shape[2] else blocks


@planted("block_sparse/per-head", control="block_sparse/patterns", only=True)
class HeadsShareAPattern(_Blocks):
    """Every head has the pattern of head 0."""

    def blocks(self, backward: bool) -> Tensor | None:
        blocks = super().blocks(backward)
        return None if blocks is None else blocks[:1]


@planted("block_sparse/empty-rows-and-columns", control=CONTROL)
class UnseenKeysUnwritten(Steps):
    """dK and dV of blocks that no query visits hold what the harness left in that memory: NaN."""

    def write(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        result = super().write(name, x, like)
        if name in ("dk", "dv") and self.problem.mask.blocks:
            result[:, ~self.visible(backward=True).any(1).any(0)] = torch.nan
        return result


@planted(
    "block_sparse/backward-head-dim-64",
    control="block_sparse/patterns",
    cites=("flash-attention#2623",),
    only=True,
)
class BackwardOfHeadDim64(Steps):
    """With blocks and head dim 64 the backward takes the tile of head dim 128 apart wrongly."""

    def over_group(self, gradient: Tensor, name: str) -> Tensor:
        summed = super().over_group(gradient, name)
        return summed * 300 if self.problem.mask.blocks and self.problem.head_dim == 64 else summed


@planted(
    "block_sparse/beyond-the-sequence", control="block_sparse/patterns", cites=("pytorch#136232",), only=True
)
class BlocksBeyondAreNone(Steps):
    """A block longer than both sequences counts as no block: nothing is visible."""

    def mask(self, backward: bool) -> Mask:
        mask, problem = super().mask(backward), self.problem
        blocks = mask.blocks
        if blocks and blocks.block_q > problem.seqlen_q and blocks.block_k > problem.seqlen_k:
            return Mask.parse(f"blocks(random,{blocks.block_q}x{blocks.block_k},density=0.0)")
        return mask
