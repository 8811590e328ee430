"""Bugs of memory: strides, what lies outside of a tensor, what fresh memory held, and races."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps


def _fits(x: Tensor, strides: tuple[int, ...], offset: int) -> bool:
    """Whether a view of x's shape with these strides lies inside its storage."""
    last = offset + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return x.numel() > 0 and last < x.untyped_storage().nbytes() // x.element_size()


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    _, s, h, d = x.shape
    return (s * h * d, h * d, d, 1)


def _reread(x: Tensor, strides: tuple[int, ...], offset: int | None = None) -> Tensor:
    """x's memory read with other strides; NaN where that would leave the storage."""
    begin = int(x.storage_offset()) if offset is None else offset
    if not x.numel() or (x.stride() == strides and begin == x.storage_offset()):
        return x
    return x.detach().as_strided(x.shape, strides, begin) if _fits(x, strides, begin) else x * torch.nan


# ---- strides ------------------------------------------------------------------------------------------------

CONTIGUOUS = "layout/contiguous"


@planted("layout/sliced", control=CONTIGUOUS, only=True)
class AssumesDenseRows(Steps):
    """Strides are not looked at: every operand is read as if it were dense."""

    def read(self, name: str, x: Tensor) -> Tensor:
        return super().read(name, _reread(x, _dense_strides(x)))


@planted(
    "layout/key-and-value-differ", control=CONTIGUOUS, cites=("pytorch#119500", "FlagGems#5896"), only=True
)
class ValuesByTheKeysStrides(Steps):
    """V is read with K's strides."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, _reread(v, k.stride()) if k.shape == v.shape else v, drawn)


@planted("layout/dout-differs", control=CONTIGUOUS, cites=("aotriton#236", "flash-attention#355"), only=True)
class DoutByTheStridesOfOut(Steps):
    """dO is read with O's strides."""

    def read(self, name: str, x: Tensor) -> Tensor:
        return super().read(name, _reread(x, _dense_strides(x)) if name == "dout" else x)


@planted("layout/unaligned-start", control=CONTIGUOUS)
class StartsAtTheStorage(Steps):
    """Where a tensor begins in its storage is not looked at."""

    def read(self, name: str, x: Tensor) -> Tensor:
        return super().read(name, _reread(x, x.stride(), 0))


# ---- outside of a tensor --------------------------------------------------------------------------------------


def _behind(x: Tensor) -> Tensor | None:
    """The element behind x's last one; None where its storage ends there."""
    last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    inside = x.numel() > 0 and (last + 1) * x.element_size() < x.untyped_storage().nbytes()
    return x.detach().as_strided((1,), (1,), last + 1) if inside else None


@planted("memory_safety/guard-bands", control="memory_safety/unguarded", only=True)
class ReadsPastTheKeys(Steps):
    """The last tile reads one element past K's end, and masks it by a product with 0."""

    def read(self, name: str, x: Tensor) -> Tensor:
        behind = _behind(x) if name == "k" else None
        return super().read(name, x) + (0 if behind is None else 0 * behind.float())


@planted("memory_safety/guard-bands", control="memory_safety/unguarded")
class WritesPastTheKeys(Steps):
    """The padding behind K is set to 0 for a vector load, whoever it belongs to."""

    def read(self, name: str, x: Tensor) -> Tensor:
        if name == "k" and (behind := _behind(x)) is not None:
            behind.zero_()
        return super().read(name, x)


@planted("memory_safety/guard-bands", control="shapes/no-queries")
class ScalesQInPlace(Steps):
    """Q is scaled where it lies."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        q.data.mul_(1.5)
        return super().forward(q, k, v, drawn)


# ---- fresh memory ---------------------------------------------------------------------------------------------


@planted("memory_safety/fresh-memory", control="layout/contiguous", cites=("flash-attention#2324",))
class TailLeftAsItWas(Steps):
    """Rows past the last whole tile of 64 are not written, where there are no more than 64 keys."""

    def write(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        result = super().write(name, x, like)
        whole = x.shape[2] // 64 * 64
        if name != "out" or not whole or self.problem.seqlen_k > 64:
            return result
        fresh = torch.empty_like(result)
        fresh[:, :whole] = result[:, :whole]
        return fresh


@planted("memory_safety/fresh-memory", control="layout/contiguous", cites=("TransformerEngine#2186",))
class DeltaUninitialised(Steps):
    """Delta of a single query is never computed: it is what its memory held."""

    def delta(self, dout: Tensor, out: Tensor) -> Tensor:
        delta = super().delta(dout, out)
        return torch.empty_like(delta) if self.problem.seqlen_q == 1 else delta


@planted("memory_safety/own-results", control="memory_safety/unguarded", only=True)
class WorkspaceIsTheResult(Steps):
    """Without gradients out is a workspace, which the next call of the problem writes over."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(q, k, v)
        if torch.is_grad_enabled() or self.problem.dropout_p:
            return out
        self.workspace = getattr(self, "workspace", out)
        return self.workspace.copy_(out)


@planted("memory_safety/own-results", control="memory_safety/unguarded")
class AnswersFromMemory(Steps):
    """Without gradients the second call answers what the first did."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.problem.dropout_p:
            return super().attend(q, k, v)
        if not hasattr(self, "answer"):
            self.answer = super().attend(q, k, v)
        return self.answer.clone()


# ---- races ----------------------------------------------------------------------------------------------------


@planted(
    "determinism/hundreds",
    control="determinism/twice",
    cites=("flash-attention#1344", "flash-attention#2756"),
    only=True,
)
class RaceInOneOf200(Steps):
    """In one call of 200 the epilogue stores a tile before its last product is in."""

    def weigh(self, p: Tensor, v: Tensor) -> Tensor:
        out = super().weigh(p, v)
        if self.calls % 200 == 0:
            out[..., -8:, :] *= 0.9
        return out


@planted(
    "determinism/hundreds",
    control="determinism/twice",
    cites=("flash-attention#2244", "flash-attention#2510"),
    only=True,
)
class SumsInAnyOrder(Steps):
    """dQ is summed by atomics, in another order at every call, and declared to repeat."""

    def over_group(self, gradient: Tensor, name: str) -> Tensor:
        summed = super().over_group(gradient, name)
        return summed * (1 + (self.calls % 3) * 2.0**-23) if self.problem.dtype == "fp32" else summed


@planted("determinism/twice", control="determinism/once", cites=("flash-attention#2643",), only=True)
class EverySecondCallDiffers(Steps):
    """Split over the keys in every second call: the last bit of a row sum differs."""

    def weigh(self, p: Tensor, v: Tensor) -> Tensor:
        out = super().weigh(p, v)
        return out * (1 + (self.calls % 2) * 2.0**-23) if self.problem.dtype == "fp32" else out
