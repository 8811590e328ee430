"""Bugs of sizes: grouped heads, lengths, head dims, and counts that run out of bits."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps

UNGROUPED = "gqa/ungrouped"


# ---- grouped heads ------------------------------------------------------------------------------------------


@planted("gqa/ratios", control=UNGROUPED, cites=("flash-linear-attention#1029",))
class GroupsInterleaved(Steps):
    """Query head h reads key head h mod kv_heads."""

    def kv_head(self, backward: bool) -> Tensor:
        return torch.arange(self.problem.heads, device=self.device) % self.problem.kv_heads


@planted("gqa/odd-groups", control=UNGROUPED)
class GroupsByShift(Steps):
    """The group of a head is found by a shift, right for powers of two alone."""

    def kv_head(self, backward: bool) -> Tensor:
        shift = max(0, (self.group - 1).bit_length())
        return torch.arange(self.problem.heads, device=self.device) >> shift


@planted("gqa/ratios", control=UNGROUPED)
class GradientOfTheNextGroup(Steps):
    """dK is summed over the query heads of the next group."""

    def over_group(self, gradient: Tensor, name: str) -> Tensor:
        summed = super().over_group(gradient, name)
        return summed.roll(1, dims=1) if name == "dk" and self.group > 1 else summed


@planted("gqa/ratios", control=UNGROUPED)
class GradientOfOneHead(Steps):
    """dV is that of the last query head of a group: the others' are written over."""

    def over_group(self, gradient: Tensor, name: str) -> Tensor:
        grouped = gradient.unflatten(1, (self.problem.kv_heads, self.group))
        return grouped[:, :, -1] if name == "dv" else grouped.sum(2)


@planted("gqa/ratios", control="gqa/masked", only=True)
class EightHeadsAGroup(Steps):
    """dK of a group sums over its first 8 query heads."""

    def over_group(self, gradient: Tensor, name: str) -> Tensor:
        return gradient.unflatten(1, (self.problem.kv_heads, self.group))[:, :, :8].sum(2)


# ---- lengths ------------------------------------------------------------------------------------------------


@planted("shapes/lengths", control="shapes/head-dims")
class LastTileDropped(Steps):
    """A last tile that is not whole is left out, where there are others."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        if self.problem.seqlen_k > 64:
            visible[..., self.problem.seqlen_k // 64 * 64 :] = False
        return visible


@planted("shapes/longer", control="shapes/lengths")
class FifthTileReadsTheFourth(Steps):
    """The ring of four tiles is not waited for: keys of the fifth are still those of the first."""

    def read(self, name: str, x: Tensor) -> Tensor:
        wide = super().read(name, x)
        if name == "k" and wide.shape[2] >= 320:
            wide = wide.clone()
            wide[:, :, 256:320] = wide[:, :, 0:64]
        return wide


@planted("shapes/one-query", control="shapes/one-key", cites=("cudnn-frontend#1072", "flash-attention#1537"))
class OneQueryIsNan(Steps):
    """dK and dV of a single query are NaN."""

    def over_group(self, gradient: Tensor, name: str) -> Tensor:
        summed = super().over_group(gradient, name)
        return summed * torch.nan if self.problem.seqlen_q == 1 else summed


@planted("shapes/no-keys", control="shapes/no-queries", only=True)
class NoKeysRaises(Steps):
    """Without keys the number of tiles is divided by."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        assert 64 // -(-self.problem.seqlen_k // 64) >= 0
        return super().forward(q, k, v, drawn)


@planted(
    "shapes/no-keys", control="shapes/no-queries", cites=("flash-attention#2470",), only=True, crashes=True
)
class NoKeysCrashes(Steps):
    """Without keys the process dies of a segmentation fault."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.problem.seqlen_k == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().forward(q, k, v, drawn)


@planted(
    "shapes/no-batch",
    control="shapes/no-queries",
    cites=("pytorch#133780", "flash-attention#1159"),
    only=True,
)
class NoBatchRaises(Steps):
    """A batch of none is a launch of no blocks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        if not q.shape[0]:
            raise RuntimeError("invalid configuration argument")
        return super().forward(q, k, v, drawn)


# ---- head dims ----------------------------------------------------------------------------------------------


@planted("shapes/odd-head-dims", control="shapes/head-dims", cites=("flash-attention#1347",), only=True)
class HeadDimInEights(Steps):
    """Columns of Q and K behind the last multiple of 8 are not read."""

    def scores(self, q: Tensor, k: Tensor, backward: bool) -> Tensor:
        columns = q.shape[-1] // 8 * 8
        return super().scores(q[..., :columns], k[..., :columns], backward)


@planted("shapes/value-head-dims", control="shapes/head-dims", cites=("flash-attention#2888",), only=True)
class ScaleOfTheValues(Steps):
    """The default scale follows V's head dim."""

    def scale(self, backward: bool) -> float:
        return self.problem.head_dim_v**-0.5 if self.problem.scale is None else self.problem.scale


@planted(
    "shapes/after-variants", control="shapes/head-dims", cites=("flash-attention#2566", "flashinfer#3857")
)
class CacheKeyWithoutScale(Steps):
    """Compiled code is kept by shape and mask; the scale that it was compiled with comes along."""

    def scale(self, backward: bool) -> float:
        problem = self.problem
        key = (problem.q_shape, problem.k_shape, problem.dtype, problem.mask)
        return float(self.shared.setdefault(key, super().scale(backward)))


@planted("shapes/after-variants", control="shapes/head-dims", cites=("flash-attention#2566",))
class CacheKeyWithoutMask(Steps):
    """Compiled code is kept by shape; the mask that it was compiled with comes along."""

    def visible(self, backward: bool) -> Tensor:
        problem = self.problem
        key = (problem.q_shape, problem.k_shape, problem.dtype, problem.scale)
        kept: Tensor = self.shared.setdefault(key, super().visible(backward))
        return kept


# ---- bits ---------------------------------------------------------------------------------------------------


@planted("scale/many-heads", control="scale/many-batches", only=True)
class HeadsInSevenBits(Steps):
    """The index of a head wraps at 128."""

    def kv_head(self, backward: bool) -> Tensor:
        return (torch.arange(self.problem.heads, device=self.device) & 127) // self.group


@planted("scale/many-batches", control="scale/many-heads", only=True)
class BatchesInEightBits(Steps):
    """The index of a batch entry wraps at 256."""

    def read(self, name: str, x: Tensor) -> Tensor:
        return super().read(name, x[torch.arange(x.shape[0], device=x.device) & 255])
