"""Bugs of scores, softmax, sums and the lse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps


@planted("numerics/scales", control="numerics/dtypes", only=True)
class ScaleOffByOnePercent(Steps):
    """A scale that is given is off by 1%."""

    def scale(self, backward: bool) -> float:
        scale = super().scale(backward)
        return scale if self.problem.scale is None else 1.01 * scale


@planted("numerics/scales", control="numerics/dtypes", cites=("cudnn-frontend#804",), only=True)
class ScaleLosesItsSign(Steps):
    """A negative scale counts as positive."""

    def scale(self, backward: bool) -> float:
        return abs(super().scale(backward))


@planted("numerics/large", control="numerics/all-equal")
class SoftmaxWithoutTheMax(Steps):
    """exp of the scores themselves: overflows from 89 on."""

    def softmax(self, s: Tensor) -> tuple[Tensor, Tensor]:
        e = s.exp()
        total = e.sum(-1, keepdim=True)
        return e / torch.where(total > 0, total, 1), total.log()[..., 0]


@planted("numerics/strongly-negative", control="numerics/all-equal", only=True)
class MaximumStartsAtZero(Steps):
    """The running maximum begins at 0, not -inf: rows of strongly negative scores underflow."""

    def softmax(self, s: Tensor) -> tuple[Tensor, Tensor]:
        top = s.amax(-1, keepdim=True).clamp(min=0) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
        e = (s - top).exp()
        total = e.sum(-1, keepdim=True)
        return e / torch.where(total > 0, total, 1), (top + total.log())[..., 0]


@planted("shapes/longer", control="shapes/head-dims")
class AccumulatorNotRescaled(Steps):
    """When a later tile of 64 keys raises the maximum, what was summed before is not scaled down."""

    def softmax(self, s: Tensor) -> tuple[Tensor, Tensor]:
        p, lse = super().softmax(s)
        if s.shape[-1] <= 64:
            return p, lse
        first, top = s[..., :64].amax(-1, keepdim=True), s.amax(-1, keepdim=True)
        unscaled = (top - first).nan_to_num(0.0, posinf=0.0).exp()
        return torch.cat([p[..., :64] * unscaled, p[..., 64:]], -1), lse


@planted(
    "numerics/fp16-overflow", control="numerics/dtypes", cites=("flash-linear-attention#1214",), only=True
)
class ScoresInFp16(Steps):
    """Products of fp16 are kept in fp16 before they are scaled."""

    def scores(self, q: Tensor, k: Tensor, backward: bool) -> Tensor:
        s = q @ k[:, self.kv_head(backward)].mT
        if self.problem.dtype == "fp16":
            s = torch.where(s.abs() > 65504, torch.inf, s)
        return (s * self.scale(backward)).masked_fill(~self.visible(backward), -torch.inf)


@planted("numerics/many-keys", control="numerics/all-equal", only=True)
class SumsInFp16(Steps):
    """P V of an fp16 problem is summed in fp16, 16 keys at a time."""

    def weigh(self, p: Tensor, v: Tensor) -> Tensor:
        if self.problem.dtype != "fp16":
            return super().weigh(p, v)
        v = v[:, self.kv_head(backward=False)]
        total = p.new_zeros((*p.shape[:-1], v.shape[-1]), dtype=torch.float16)
        for start in range(0, p.shape[-1], 16):
            total += (p[..., start : start + 16] @ v[..., start : start + 16, :]).half()
        return total.float()


@planted("numerics/dtypes", control="numerics/fp16-overflow")
class ProductsInTf32(Steps):
    """Products of fp32 keep 10 bits of each factor, as TF32 does."""

    def read(self, name: str, x: Tensor) -> Tensor:
        wide = super().read(name, x)
        if x.dtype != torch.float32:
            return wide
        bits = wide.contiguous().view(torch.int32)
        return (((bits + 0x1000) >> 13) << 13).view(torch.float32)


@planted("numerics/needles", control="shapes/value-head-dims")
class KeyAtTheEdgeDropped(Steps):
    """Key 64, the first of the second tile, is seen by no row."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        visible[..., 64:65] = False
        return visible


@planted("numerics/many-keys", control="numerics/needles", only=True)
class LastOfManyTilesDropped(Steps):
    """From 64 tiles of 64 keys on, the last is left out: 4 keys of 4100."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        visible[..., 64 * 64 :] = False
        return visible


@planted("numerics/lse", control="shapes/lengths", cites=("pytorch#181645",))
class LseInBaseTwo(Steps):
    """The lse is a logarithm to base 2."""

    def returned_lse(self, lse: Tensor) -> Tensor:
        return lse / math.log(2)


@planted("numerics/lse", control="shapes/lengths", cites=("pytorch#181645",))
class LseOffByLnTwo(Steps):
    """The lse is too large by ln 2."""

    def returned_lse(self, lse: Tensor) -> Tensor:
        return lse + math.log(2)


@planted("numerics/lse", control="shapes/lengths")
class LseRounded(Steps):
    """The lse has gone through bf16."""

    def returned_lse(self, lse: Tensor) -> Tensor:
        return lse.bfloat16().to(lse.dtype)
