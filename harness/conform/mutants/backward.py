"""Bugs of the backward pass, and of what autograd makes of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps

FORWARD = "gradients/forward-control"
STEP = "autograd/plain-step"
Gradients = tuple[Tensor, Tensor, Tensor]


@planted("gradients/against-the-oracle", control=FORWARD)
class ScaledTwice(Steps):
    """dS is multiplied by the scale, and so are dQ and dK."""

    def scale_of_ds(self) -> float:
        return self.scale(backward=True) ** 2


@planted("gradients/against-the-oracle", control=FORWARD)
class ScaleForgottenInBackward(Steps):
    """dQ and dK lack the scale."""

    def scale_of_ds(self) -> float:
        return 1.0


@planted("gradients/against-the-oracle", control=FORWARD)
class DeltaLeftOut(Steps):
    """dS = P dP: the sum over the row is not taken off."""

    def delta(self, dout: Tensor, out: Tensor) -> Tensor:
        return torch.zeros_like(out[..., :1])


@planted("gradients/against-the-oracle", control=FORWARD, cites=("cudnn-frontend#384",))
class DeltaOfTheRowAbove(Steps):
    """Each row takes off the delta of its neighbour."""

    def delta(self, dout: Tensor, out: Tensor) -> Tensor:
        return super().delta(dout, out).roll(1, dims=2)


@planted(
    "gradients/of-the-lse", control="gradients/against-the-oracle", cites=("flash-attention#141",), only=True
)
class LseGradientIsZero(Steps):
    """The lse that is returned asks for a gradient, and its gradient is 0."""

    def attend_with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend_with_lse(q, k, v)
        return out, lse + 0 * (q.float().sum() + k.float().sum()) if q.requires_grad else lse


@planted("gradients/one-at-a-time", control="gradients/against-the-oracle", only=True)
class KeysNeedQueries(Steps):
    """dK is computed only where dQ is asked for."""

    def attend_with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().attend_with_lse(q, k if q.requires_grad else k.detach(), v)


@planted(
    "autograd/second-derivatives", control=STEP, cites=("pytorch#116350", "flash-attention#699"), only=True
)
class SecondDerivativeIsConstant(Steps):
    """Gradients of gradients are taken for constants, and nobody is told."""

    def backward(self, *tensors: Tensor) -> Gradients:  # type: ignore[override]
        with torch.no_grad():
            return super().backward(*tensors)


@planted("autograd/kept-graph", control=STEP, only=True)
class BackwardOfTheLastCall(Steps):
    """Q and K for the backward are those of the last forward, not of the graph's own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        self.last = q, k
        return super().forward(q, k, v, drawn)

    def backward(self, dout: Tensor, *saved: Tensor) -> Gradients:  # type: ignore[override]
        return super().backward(dout, *self.last, *saved[2:])


@planted("autograd/kept-graph", control=STEP, only=True)
class WrittenOverUnnoticed(Steps):
    """The graph keeps aliases of the inputs: one that was written over since the forward is used as it is."""

    def saved(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.data for tensor in tensors)


@planted("autograd/kept-graph", control=STEP)
class AccumulatorNotCleared(Steps):
    """The second backward over a kept graph adds to the first one's dQ."""

    def backward(self, dout: Tensor, *saved: Tensor) -> Gradients:  # type: ignore[override]
        dq, dk, dv = super().backward(dout, *saved)
        key = saved[0].data_ptr()
        self.sums = getattr(self, "sums", {})
        self.sums[key] = dq = dq + self.sums[key] if key in self.sums else dq
        return dq, dk, dv


@planted("autograd/autocast", control=STEP, only=True)
class UnscaledUnderAutocast(Steps):
    """Under autocast another kernel runs, which is not told the scale."""

    cast = False

    def attend_with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.cast = torch.is_autocast_enabled(self.device.type)
        return super().attend_with_lse(q, k, v)

    def scale(self, backward: bool) -> float:
        return 1.0 if self.cast else super().scale(backward)


@planted("autograd/modes", control=STEP, only=True)
class GraphUnderNoGrad(Steps):
    """out asks for gradients though they are switched off."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(q, k, v)
        return out if torch.is_grad_enabled() or torch.is_inference_mode_enabled() else out.requires_grad_()


@planted("autograd/modes", control=STEP, only=True)
class FirstModeStays(Steps):
    """Whether leaves get a graph is remembered from the first call on ones like them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.recorded = vars(self).get("recorded", torch.is_grad_enabled())
        with torch.set_grad_enabled(self.recorded and torch.is_grad_enabled()):
            return super().attend(q, k, v)


@planted("autograd/modes", control=STEP, only=True)
class InferenceSkipsTheMask(Steps):
    """In inference mode a kernel without a mask runs."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        return torch.ones_like(visible) if torch.is_inference_mode_enabled() else visible


@planted("autograd/checkpointing", control=STEP)
class RecomputationSkipsTheMask(Steps):
    """A forward that is run again inside a backward forgets the mask."""

    def visible(self, backward: bool) -> Tensor:
        visible = super().visible(backward)
        inside_backward = torch._C._current_graph_task_id() >= 0  # noqa: SLF001 - torch asks itself so
        return torch.ones_like(visible) if inside_backward and not backward else visible
