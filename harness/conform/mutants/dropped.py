"""Bugs of dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps

CONTROL = "dropout/none"


@planted("dropout/under-its-mask", control=CONTROL, cites=("xformers#755",), only=True)
class BackwardDropsBySeedOfItsOwn(Steps):
    """The backward draws its mask from another seed than the forward."""

    def keep(self, drawn: Tensor, backward: bool) -> Tensor:
        return super().keep(drawn + 1 if backward else drawn, backward)


@planted("dropout/under-its-mask", control=CONTROL, cites=("pytorch#102038",), only=True)
class BackwardDropsByOtherTiles(Steps):
    """Past the first 64 keys the backward counts its random numbers by other tiles than the forward."""

    def keep(self, drawn: Tensor, backward: bool) -> Tensor:
        keep = super().keep(drawn, backward)
        if not backward:
            return keep
        return torch.cat([keep[..., :64], keep[..., 64:].roll(1, dims=-2)], dim=-1)


@planted("dropout/under-its-mask", control=CONTROL, cites=("flash-attention#2424",), only=True)
class BackwardOfDvAlone(Steps):
    """The backward drops where it computes dV, and forgets to where it computes dP."""

    def drop(self, p: Tensor, drawn: Tensor | None, backward: bool) -> Tensor:
        weights = bool((p >= 0).all())  # P, not dP
        return super().drop(p, drawn, backward) if weights else p


@planted("dropout/under-its-mask", control=CONTROL, only=True)
class MaskForgottenUnderDropout(Steps):
    """The kernel that drops was built without the causal mask."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        return torch.ones_like(visible) if self.problem.dropout_p else visible


@planted("dropout/under-its-mask", control=CONTROL, only=True)
class DropsBeforeNormalising(Steps):
    """Rows are divided by the sum of the weights that were kept."""

    def drop(self, p: Tensor, drawn: Tensor | None, backward: bool) -> Tensor:
        if drawn is None:
            return p
        kept = p * self.keep(drawn, backward)
        return kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)


@planted("dropout/under-its-mask", control=CONTROL, only=True)
class KeptWeightsUnscaled(Steps):
    """What is kept is not scaled up: out is too small by 1 - p."""

    def kept_scale(self, backward: bool) -> float:
        return 1.0


@planted("dropout/under-its-mask", control=CONTROL, only=True)
class ScalesForwardAlone(Steps):
    """The backward leaves out the scale of what was kept."""

    def kept_scale(self, backward: bool) -> float:
        return 1.0 if backward else super().kept_scale(backward)


@planted("dropout/rate", control="dropout/under-its-mask", only=True)
class DropsTooRarely(Steps):
    """Drops with probability 0.97 p, as a rounded threshold does, and declares p."""

    def keep(self, drawn: Tensor, backward: bool) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(int(drawn))
        keep = super().keep(drawn, backward)
        return (
            torch.rand(keep.shape, generator=generator, device=self.device) >= 0.97 * self.problem.dropout_p
        )


@planted("dropout/rate", control="dropout/under-its-mask", only=True)
class NeverDropsTheLastKey(Steps):
    """The last key of an odd tail is kept whatever is drawn."""

    def keep(self, drawn: Tensor, backward: bool) -> Tensor:
        keep = super().keep(drawn, backward)
        keep[..., -1:] = True
        return keep


@planted("dropout/rate", control="dropout/under-its-mask", cites=("flash-attention#314",), only=True)
class HeadsShareAMask(Steps):
    """Every head drops the same weights."""

    def keep(self, drawn: Tensor, backward: bool) -> Tensor:
        keep = super().keep(drawn, backward)
        return keep[:, :1].expand_as(keep)


@planted("dropout/rate", control="dropout/under-its-mask", only=True)
class RowsRepeatTheirMask(Steps):
    """The mask of a row is that of the row 64 above: the counter wraps at a tile."""

    def keep(self, drawn: Tensor, backward: bool) -> Tensor:
        keep = super().keep(drawn, backward)
        return keep[:, :, torch.arange(keep.shape[2], device=keep.device) % 64]


@planted("dropout/state", control="dropout/under-its-mask", cites=("flash-attention#2088",), only=True)
class SeedIsConstant(Steps):
    """Every call that nobody seeded drops the same weights."""

    def draw(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int64, device=self.device)


@planted("dropout/state", control="dropout/rate", only=True)
class SeedIsItsOwn(Steps):
    """The mask follows from a counter of its own: torch's generator has no say in it."""

    def draw(self) -> Tensor:
        self.shared["calls"] = self.shared.get("calls", 0) + 1
        return torch.tensor([self.shared["calls"]], device=self.device)


@planted("dropout/checkpoint", control="dropout/under-its-mask", cites=("pytorch#190717",), only=True)
class RecomputationDrawsAnew(Steps):
    """A forward that is run again inside a backward draws other random numbers than the first time."""

    def draw(self) -> Tensor:
        inside_backward = torch._C._current_graph_task_id() >= 0  # noqa: SLF001 - torch asks itself so
        return super().draw() + int(inside_backward)


@planted("dropout/checkpoint-reentrant", control="dropout/checkpoint", cites=("pytorch#190717",), only=True)
class InferenceDrawsOtherwise(Steps):
    """A call without gradients takes another path, and draws other random numbers from the same state."""

    def draw(self) -> Tensor:
        return super().draw() + int(not torch.is_grad_enabled())
