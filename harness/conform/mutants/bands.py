"""Bugs of causal masks and windows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps
from attnbench.harness.masks import Mask


@planted("causal/fewer-queries", control="causal/as-many", cites=("flash-attention#282",))
class AlignsTopLeft(Steps):
    """Aligns every band top left, whatever was asked."""

    def mask(self, backward: bool) -> Mask:
        return dataclasses.replace(super().mask(backward), alignment="top_left")


@planted("causal/fewer-queries", control="causal/as-many", cites=("cutlass#2336", "flash-attention#517"))
class AlignsBottomRight(Steps):
    """Aligns every band bottom right, whatever was asked."""

    def mask(self, backward: bool) -> Mask:
        return dataclasses.replace(super().mask(backward), alignment="bottom_right")


@planted("causal/windows", control="causal/no-mask", cites=("transformers#39408",))
class WindowWithoutItsEdge(Steps):
    """A window of n keys to the left sees n - 1."""

    def mask(self, backward: bool) -> Mask:
        mask = super().mask(backward)
        return dataclasses.replace(mask, left=mask.left - 1) if mask.left else mask


@planted("causal/windows", control="causal/no-mask", cites=("flash-attention#1133",))
class WindowCountsItself(Steps):
    """A window's right side sees one key too many."""

    def mask(self, backward: bool) -> Mask:
        mask = super().mask(backward)
        if mask.left is None or mask.right is None:
            return mask
        return dataclasses.replace(mask, right=mask.right + 1)


@planted("causal/more-queries", control="causal/fewer-queries", cites=("pytorch#103963", "pytorch#41508"))
class EmptyRowIsNan(Steps):
    """A row that sees nothing is 0 / 0."""

    def exp_minus(self, s: Tensor, lse: Tensor) -> Tensor:
        return (s - lse[..., None]).exp()


@planted("causal/more-queries", control="causal/fewer-queries", cites=("flash-attention#978",))
class EmptyRowLseIsInf(Steps):
    """The lse of a row that sees nothing is +inf."""

    def returned_lse(self, lse: Tensor) -> Tensor:
        return lse.masked_fill(lse == -torch.inf, torch.inf)


@planted("causal/more-queries", control="causal/fewer-queries", cites=("flashinfer#4452",))
class EmptyRowLseIsLarge(Steps):
    """The lse of a row that sees nothing is a large finite number."""

    def returned_lse(self, lse: Tensor) -> Tensor:
        return lse.masked_fill(lse == -torch.inf, -1e30)


@planted("causal/more-queries", control="causal/fewer-queries", cites=("pytorch#109517",))
class EmptyRowIsTheMean(Steps):
    """A row that sees nothing averages V, as a softmax over equal large negative scores does."""

    def softmax(self, s: Tensor) -> tuple[Tensor, Tensor]:
        p, lse = super().softmax(s)
        empty = (lse == -torch.inf)[..., None]
        return torch.where(empty, 1 / max(1, s.shape[-1]), p), lse


@planted("causal/whole-tiles-empty", control="causal/more-queries", cites=("flash-attention#443",))
class EmptyTilesUnwritten(Steps):
    """A whole tile of rows that see nothing is skipped, and holds what the harness left in that memory: NaN."""

    def write(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        result = super().write(name, x, like)
        seeing = self.visible(backward=False).any(-1).any(0)
        if name in ("out", "dq"):
            for start in range(0, len(seeing) - 63, 64):
                if not seeing[start : start + 64].any():
                    result[:, start : start + 64] = torch.nan
        return result


@planted(
    "gradients/mask-in-the-backward", control="gradients/forward-control", cites=("flash-attention#2424",)
)
class BackwardForgetsTheMask(Steps):
    """The backward recomputes P without the mask."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        return torch.ones_like(visible) if backward else visible


@planted("causal/windows-beyond", control="causal/windows", cites=("flash-attention#1133",), only=True)
class BandWrapsInInt32(Steps):
    """A window's side is added to the row in 32 bits: the largest one wraps, and hides every key."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        right = self.mask(backward).right
        wraps = right is not None and right + self.problem.seqlen_q > 2**31
        return torch.zeros_like(visible) if wraps else visible


@planted("causal/no-mask", control="causal/as-many", cites=("triton#4174",))
class BackwardWrongWithoutMask(Steps):
    """Without a mask, and only then, the backward's loop ends one tile of 64 keys early."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        if backward and self.problem.mask.kind == "full" and self.problem.seqlen_k > 64:
            visible[..., (self.problem.seqlen_k - 1) // 64 * 64 :] = False
        return visible


@planted(
    "gradients/mask-in-the-backward", control="gradients/forward-control", cites=("flash-attention#443",)
)
class BackwardAlignsTopLeft(Steps):
    """The forward aligns as asked, the backward top left."""

    def mask(self, backward: bool) -> Mask:
        mask = super().mask(backward)
        return dataclasses.replace(mask, alignment="top_left") if backward else mask
