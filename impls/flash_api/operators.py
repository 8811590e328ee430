"""Two launches become one differentiable operator of torch, with fake kernels for tracing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("attnbench", "FRAGMENT")


@dataclass(frozen=True)
class Options:
    """Everything about a call but its tensors. mask_block is (0, 0) without block lists."""

    left: int | None
    right: int | None
    bottom_right: bool
    scale: float
    dropout_p: float
    mask_block: tuple[int, int]
    deterministic: bool


class Forward(Protocol):
    """Launch of a forward: (q, k, v, rng or None, by-query lists or [], options) -> out BSHD, lse (B, H, Sq) fp32."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], options: Options
    ) -> tuple[Tensor, Tensor]: ...


class Backward(Protocol):
    """Launch of a backward: adds d_out, d_lse (or None), out, lse; lists are by query then by key -> dq, dk, dv."""

    def __call__(
        self, d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng: Tensor | None, lists: list[Tensor], options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class Refuse(Protocol):
    """Raise ValueError if the backward of (q, v, options) is not offered; asked before a forward that records one."""

    def __call__(self, q: Tensor, v: Tensor, options: Options) -> None: ...


def refuse_nothing(q: Tensor, v: Tensor, options: Options) -> None:
    """The backward of a family that differentiates all that it computes."""


_FORWARD_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? rng, Tensor[] lists, {}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? rng,"
    " Tensor[] lists, {}) -> (Tensor, Tensor, Tensor)"
)
_OPTIONS_SCHEMA = (
    "int? left, int? right, bool bottom_right, float scale, float dropout_p,"
    " int mask_m, int mask_n, bool deterministic"
)


@lru_cache(maxsize=1024)
def _options(*values: Any) -> Options:
    left, right, bottom_right, scale, dropout_p, mask_m, mask_n, deterministic = values
    return Options(left, right, bottom_right, scale, dropout_p, (mask_m, mask_n), deterministic)


below_autograd = torch._C._AutoDispatchBelowAutograd  # noqa: SLF001 - no public name, and every C++ operator uses it


def has_tangent(x: object) -> bool:
    """Whether x carries a derivative of the innermost level of forward-mode differentiation."""
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def define_ops(
    name: str, forward: Forward, backward: Backward, refuse: Refuse = refuse_nothing
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register attnbench::{name}_forward and _backward with fake kernels and autograd; return the forward operator.

    It raises RuntimeError in forward-mode differentiation and when its gradients are differentiated.

    Library.define with impl dispatches in a few microseconds; torch.library.custom_op adds tens.
    """
    LIBRARY.define(f"{name}_forward" + _FORWARD_SCHEMA.format(_OPTIONS_SCHEMA))
    LIBRARY.define(f"{name}_backward" + _BACKWARD_SCHEMA.format(_OPTIONS_SCHEMA))

    def run_forward(
        q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any
    ) -> Any:
        return forward(q, k, v, rng, lists[:4], _options(*options))

    def run_backward(
        d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng: Tensor | None, lists: list[Tensor], *options: Any,
    ) -> Any:  # fmt: skip
        return backward(d_out, d_lse, q, k, v, out, lse, rng, lists, _options(*options))

    def fake_forward(
        q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any
    ) -> Any:
        batch, seqlen_q, heads, _ = q.shape
        out = q.new_empty((batch, seqlen_q, heads, v.shape[3]))
        return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)

    def fake_backward(
        d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    # torch.library.register_autograd would do this too, at several times the cost of a call (about 65 us).
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: Any, *options: Any
        ) -> Any:
            refuse(q, v, _options(*options))
            with below_autograd():
                out, lse = forward_op(q, k, v, rng, lists, *options)
            ctx.save_for_backward(q, k, v, out, lse, rng, *lists)
            ctx.options = options
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
            q, k, v, out, lse, rng, *lists = ctx.saved_tensors
            nothing = (None,) * (2 + len(ctx.options))
            if d_out is None and d_lse is None:
                return None, None, None, *nothing
            d_out = torch.zeros_like(out) if d_out is None else d_out
            return *backward_op(d_out, d_lse, q, k, v, out, lse, rng, lists, *ctx.options), *nothing

    class AttentionBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:  # noqa: ARG004 - autograd fixes the signature
            with below_autograd():
                return backward_op(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ARG004
            raise RuntimeError(
                "flash_attention: double backward is not implemented; its gradients cannot be differentiated"
            )

    def differentiable(function: type[torch.autograd.Function], op: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(has_tangent, arguments)):  # noqa: SLF001 - no public name
                raise RuntimeError("flash_attention: forward-mode differentiation is not implemented")
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
                return function.apply(*arguments)
            with below_autograd():
                return op(*arguments)

        return run

    for op, run, fake in (("forward", run_forward, fake_forward), ("backward", run_backward, fake_backward)):
        LIBRARY.impl(f"{name}_{op}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"attnbench::{name}_{op}", fake, lib=LIBRARY)
    forward_op = getattr(torch.ops.attnbench, f"{name}_forward").default
    backward_op = getattr(torch.ops.attnbench, f"{name}_backward").default
    LIBRARY.impl(f"{name}_forward", differentiable(Attention, forward_op), "Autograd")
    LIBRARY.impl(f"{name}_backward", differentiable(AttentionBackward, backward_op), "Autograd")
    return forward_op
