"""Two launches become one differentiable operator of torch, with fake kernels for tracing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnbench.impls.flash_api import settled
from attnbench.impls.flash_api.interception import intercepted, recorded, watched

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

    @cached_property
    def flat(self) -> tuple[Any, ...]:
        """As operators take them."""
        sides = self.left, self.right, self.bottom_right
        return *sides, self.scale, self.dropout_p, *self.mask_block, self.deterministic


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


ForwardAgain = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A forward but for its tensors: (q, k, v, rng) -> out, lse."""

BackwardAgain = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""A backward but for its tensors: (d_out, q, k, v, out, lse, rng) -> dq, dk, dv."""


class PlanForward(Protocol):
    """How to compute all forwards of tensors with these types, shapes, strides and devices, but for block lists.

    None: as any. It raises what `Forward` raises for them.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> ForwardAgain | None: ...


class PlanBackward(Protocol):
    """How to compute all backwards of tensors with those of these, but for block lists and d_lse; None: as any."""

    def __call__(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> BackwardAgain | None: ...


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


LISTS = 8
"""Tensors of the block lists by query and by key."""


def check_consistent(rng: Tensor | None, lists: list[Tensor], options: tuple[Any, ...]) -> None:
    """Raise ValueError where kernels would read a tensor that is not there; options as operators take them.

    `attend` is consistent by itself; an operator is called by graphs and by whoever finds it, too.
    """
    *_, dropout_p, mask_m, mask_n, _ = options
    if (rng is None) != (dropout_p == 0):
        got = "None" if rng is None else "a tensor"
        raise ValueError(f"rng: got {got} with dropout_p={dropout_p}, allowed is None iff dropout_p is 0")
    allowed = 0 if mask_m == mask_n == 0 else LISTS
    if len(lists) != allowed:
        raise ValueError(
            f"lists: got {len(lists)} tensors, allowed with mask blocks of {mask_m} x {mask_n} are {allowed}"
        )


below_autograd = torch._C._AutoDispatchBelowAutograd  # noqa: SLF001 - no public name, and every C++ operator uses it


def has_tangent(x: object) -> bool:
    """Whether x carries a derivative of the innermost level of forward-mode differentiation."""
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


@dataclass(frozen=True, eq=False)
class Planned:
    """What is known of a call, and of all that are like it, before their tensors. recorded: by autograd."""

    options: Options
    forward: ForwardAgain
    recorded: bool


@dataclass(frozen=True, eq=False)
class Operator:
    """What `define_ops` makes, as `attend` calls it.

    call takes the operator's arguments. plan takes (q, k, v, *options) of a call without block lists, and gives None
    where something of torch would intercept it; again takes that plan and (q, k, v, rng).
    """

    call: Callable[..., tuple[Tensor, Tensor]]
    plan: Callable[..., Planned | None]
    again: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self.call(*arguments)


def fake_forward(
    q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor]:
    """What tracers take for a forward's results."""
    check_consistent(rng, lists, options)
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, heads, v.shape[3]))
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def fake_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng: Tensor | None, lists: list[Tensor], *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What tracers take for a backward's."""
    check_consistent(rng, lists, options)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def define_ops(
    name: str,
    forward: Forward,
    backward: Backward,
    refuse: Refuse = refuse_nothing,
    plan_forward: PlanForward | None = None,
    plan_backward: PlanBackward | None = None,
) -> Operator:
    """Register attnbench::{name}_forward and _backward with fake kernels and autograd; return what calls the first.

    That passes the operator by where nothing of torch would intercept it. Calls like an earlier one go by what
    plan_forward and plan_backward made of that. Either way it raises RuntimeError in forward-mode differentiation and
    when its gradients are differentiated. The operators raise ValueError unless rng is None iff dropout_p is 0, and
    lists are eight, or none without mask blocks.

    Library.define with impl dispatches in a few microseconds; torch.library.custom_op adds tens.
    """
    LIBRARY.define(f"{name}_forward" + _FORWARD_SCHEMA.format(_OPTIONS_SCHEMA))
    LIBRARY.define(f"{name}_backward" + _BACKWARD_SCHEMA.format(_OPTIONS_SCHEMA))

    def run_forward(
        q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any
    ) -> Any:
        check_consistent(rng, lists, options)
        return forward(q, k, v, rng, lists[:4], _options(*options))

    def run_backward(
        d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        rng: Tensor | None, lists: list[Tensor], *options: Any,
    ) -> Any:  # fmt: skip
        check_consistent(rng, lists, options)
        return backward(d_out, d_lse, q, k, v, out, lse, rng, lists, _options(*options))

    def replan(q: Tensor, k: Tensor, v: Tensor, options: Options) -> ForwardAgain:
        if plan_forward is not None and (again := plan_forward(q, k, v, options)) is not None:
            return again
        return lambda q, k, v, rng: forward(q, k, v, rng, [], options)

    def replan_backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> BackwardAgain:
        if plan_backward is not None:
            again = plan_backward(d_out, q, k, v, out, lse, options)
            if again is not None:
                return again
        return lambda d_out, q, k, v, out, lse, rng: backward(
            d_out, None, q, k, v, out, lse, rng, [], options
        )

    def below(options: Options, lists: list[Tensor], *tensors: Any) -> Any:
        """The forward's operator without autograd, from inside autograd; tensors are (q, k, v, rng)."""
        with below_autograd():
            return forward_op(*tensors, lists, *options.flat)

    def straight(
        options: Options, lists: list[Tensor], q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, rng, lists[:4], options)

    # torch.library.register_autograd would do this too, at several times the cost of a call (about 65 us).
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, run: ForwardAgain, options: Options, planned: Planned | None, q: Tensor, k: Tensor, v: Tensor,
            rng: Tensor | None, lists: list[Tensor],
        ) -> Any:  # fmt: skip
            """run fills the results, as planned if calls are like others."""
            out, lse = run(q, k, v, rng)
            ctx.save_for_backward(q, k, v, out, lse, rng, *lists)
            ctx.options, ctx.planned = options, planned
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
            q, k, v, out, lse, rng, *lists = ctx.saved_tensors
            if d_out is None and d_lse is None:
                return (None,) * 8
            options, planned = ctx.options, ctx.planned
            differentiable = torch.is_grad_enabled()
            like_others = planned is not None and d_lse is None and not differentiable and not watched()
            if like_others and (again := settled.find(planned, d_out, q, k, v, out, lse)) is not None:
                return None, None, None, *again(d_out, q, k, v, out, lse, rng), None, None
            d_out = torch.zeros_like(out) if d_out is None else d_out
            taken = (d_out, q, k, v, out, lse) if d_lse is None else (d_out, d_lse, q, k, v, out, lse)
            if differentiable or intercepted(*taken):
                found = backward_op(d_out, d_lse, q, k, v, out, lse, rng, lists, *options.flat)
            elif like_others:
                again = replan_backward(d_out, q, k, v, out, lse, options)
                found = again(d_out, q, k, v, out, lse, rng)
                settled.remember(planned, again, d_out, q, k, v, out, lse)
            else:
                found = backward(d_out, d_lse, q, k, v, out, lse, rng, lists, options)
            return None, None, None, *found, None, None

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

    def differentiable(apply: Callable[..., Any], op: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(has_tangent, arguments)):  # noqa: SLF001 - no public name
                raise RuntimeError("flash_attention: forward-mode differentiation is not implemented")
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
                return apply(*arguments)
            with below_autograd():
                return op(*arguments)

        return run

    def record_forward(
        q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any
    ) -> Any:
        chosen = _options(*options)
        refuse(q, v, chosen)
        return Attention.apply(partial(below, chosen, lists), chosen, None, q, k, v, rng, lists)

    for op, run, fake in (("forward", run_forward, fake_forward), ("backward", run_backward, fake_backward)):
        LIBRARY.impl(f"{name}_{op}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"attnbench::{name}_{op}", fake, lib=LIBRARY)
    forward_op = getattr(torch.ops.attnbench, f"{name}_forward").default
    backward_op = getattr(torch.ops.attnbench, f"{name}_backward").default
    LIBRARY.impl(f"{name}_forward", differentiable(record_forward, forward_op), "Autograd")
    LIBRARY.impl(f"{name}_backward", differentiable(AttentionBackward.apply, backward_op), "Autograd")

    # Without what Function.apply does first, 2 us, for torch.func's transforms: those are intercepted.
    apply = super(torch.autograd.Function, Attention).apply

    def call(q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None, lists: list[Tensor], *options: Any) -> Any:
        if intercepted(q, k, v):
            return forward_op(q, k, v, rng, lists, *options)
        chosen = _options(*options)
        if recorded(q, k, v):
            refuse(q, v, chosen)
            return apply(partial(straight, chosen, lists), chosen, None, q, k, v, rng, lists)
        return forward(q, k, v, rng, lists[:4], chosen)

    def plan(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Planned | None:
        if intercepted(q, k, v):
            return None
        chosen, needed = _options(*options), recorded(q, k, v)
        if needed:
            refuse(q, v, chosen)
        return Planned(chosen, replan(q, k, v, chosen), needed)

    def again(planned: Planned, q: Tensor, k: Tensor, v: Tensor, rng: Tensor | None) -> Any:
        if planned.recorded:
            return apply(planned.forward, planned.options, planned, q, k, v, rng, ())
        return planned.forward(q, k, v, rng)

    return Operator(call, plan, again)
