"""Bugs of an operator that is registered with torch: what it says of itself is not what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.harness.conform.mutants import planted
from attnbench.harness.conform.mutants.plain import Steps

_PREPARED: list[Steps] = []
"""An operator takes numbers and tensors: steps go by their place in this list."""


@torch.library.custom_op("attnbench_mutants::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """out and lse of ``Steps.forward``."""
    return _PREPARED[steps].forward(q, k, v, None)


@attend.register_fake
def _strides_of_bhsd(q: Tensor, k: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - torch's
    """The bug: out is BSHD in memory."""
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty((batch, heads, seqlen_q, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.promote_types(q.dtype, torch.float32))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.steps = inputs[3]


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *_PREPARED[ctx.steps].backward(dout, *ctx.saved_tensors, None), None


attend.register_autograd(_backward, setup_context=_keep)


@planted("autograd/operators", control="autograd/plain-step", cites=("pytorch#178499",), only=True)
class FakeKernelTransposes(Steps):
    """The fake kernel promises an out that lies as BHSD in memory, and BSHD comes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.problem.dropout_p:
            return super().attend(q, k, v)
        if self not in _PREPARED:
            _PREPARED.append(self)
        with torch.autocast(self.device.type, enabled=False):
            return attend(q, k, v, _PREPARED.index(self))[0]
