"""Gradients that refuse to be differentiated again, rather than giving a wrong second derivative."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class NoSecondDerivative(torch.autograd.Function):
    """apply(count, *tensors) -> the last ``count`` tensors, depending on all of them; its backward raises."""

    @staticmethod
    def forward(_ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[-count:])

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> Any:
        raise RuntimeError("double backward is not implemented: these gradients cannot be differentiated")


def differentiable_once(backward: Backward) -> Callable[[Any, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Makes dq, dk and dv raise when they are differentiated; whatever else ``apply`` was given gets no gradient.

    torch's own once_differentiable returns constants where dO is one, and a gradient penalty is then silently
    ignored (pytorch #116350).
    """

    @wraps(backward)
    def wrapped(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found: tuple[Tensor, ...] = backward(ctx, dout, dlse)
        if torch.is_grad_enabled():  # only under create_graph
            found = NoSecondDerivative.apply(len(found), *ctx.saved_tensors[:3], dout, *found)
        return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

    return wrapped
