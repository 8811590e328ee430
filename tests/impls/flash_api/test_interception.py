"""Whoever may intercept an operator of torch still does, and with nobody about the call goes past it."""

import contextlib
from typing import ClassVar

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attnbench.impls.flash_api import attend, define_ops, settled
from attnbench.impls.flash_api.interception import intercepted, recorded, watched


def forward(q, k, v, rng, lists, options):
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * options.scale
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
    return out.to(q.dtype).contiguous(), scores.logsumexp(-1).float()


def backward(d_out, d_lse, q, k, v, out, lse, rng, lists, options):
    return torch.full_like(q, 2.0), torch.full_like(k, 3.0), torch.full_like(v, 4.0)


OP = define_ops("test_interception", forward, backward)
FORWARD = torch.ops.attnbench.test_interception_forward.default
BACKWARD = torch.ops.attnbench.test_interception_backward.default

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


K, V = torch.randn(2, 1, 8, 2, 16)


def attention(q, k, v):
    return attend(
        OP, q, k, v, causal=False, window=None, alignment="bottom_right", dropout_p=0.0, block_mask=None,
        scale=None, return_lse=False, deterministic=False,
    )  # fmt: skip


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


class Overridden(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass that takes part in every operator."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return op(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))


class Watched(torch.Tensor):
    """A subclass that sees functions called on it, and nothing below them."""

    seen: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def q():
    return torch.randn(1, 8, 2, 16)


@pytest.fixture(params=[False, True], ids=["first", "settled"], autouse=True)
def a_call_like_it(request):
    """Whether one was made before, with nobody about."""
    settled.forget()
    if request.param:
        made = torch.randn(1, 8, 2, 16)
        attention(made, K, V)
        attention(made.clone().requires_grad_(), K, V).sum().backward()
        assert len(settled._known) == 2


@pytest.fixture
def passed_by(monkeypatch):
    """Fails the test that goes through torch's operators."""

    def fail(*_, **__):
        pytest.fail("the call went through the operator")

    for op in (FORWARD, BACKWARD):
        monkeypatch.setattr(type(op), "__call__", fail)


def test_with_nobody_about_operators_are_passed_by(q, passed_by):
    assert attention(q, K, V).shape == q.shape
    leaf = q.clone().requires_grad_()
    parameter = torch.nn.Parameter(q.clone())
    with torch.autocast("cpu", enabled=False), torch.autograd.graph.save_on_cpu():
        attention(leaf, parameter, q).sum().backward()
    assert bool((leaf.grad == 2).all())
    assert bool((parameter.grad == 3).all())
    with torch.inference_mode():
        assert not attention(leaf, q.clone(), q).requires_grad


def test_a_mode_sees_both_operators(q):
    leaf = q.requires_grad_()
    with Seen() as seen:
        attention(leaf, K, V).sum().backward()
    assert FORWARD in seen.ops
    assert BACKWARD in seen.ops


def test_a_mode_around_the_backward_alone_sees_it(q):
    out = attention(q.requires_grad_(), K, V).sum()
    with Seen() as seen:
        out.backward()
    assert BACKWARD in seen.ops


def test_overrides_of_functions_see_the_operator(q):
    with Overridden() as overridden:
        attention(q, K, V)
    assert FORWARD in overridden.seen


def test_a_profile_names_the_operators(q):
    with torch.profiler.profile() as profile:
        attention(q.requires_grad_(), K, V).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"attnbench::test_interception_forward", "attnbench::test_interception_backward"} <= names


def test_a_profile_of_the_backward_alone_names_its_operator(q):
    out = attention(q.requires_grad_(), K, V).sum()
    with torch.profiler.profile() as profile:
        out.backward()
    assert "attnbench::test_interception_backward" in {event.name for event in profile.events()}


def test_a_subclass_takes_part(q):
    for arguments in ((Wrapped(q), K, V), (q, Wrapped(K), V), (q, K, Wrapped(V))):
        assert intercepted(*arguments)
        assert torch.equal(attention(*arguments), attention(q, K, V))


def test_a_subclass_that_overrides_functions_sees_the_operator(q):
    assert isinstance(attention(q, K.as_subclass(Watched), V), Watched)
    assert FORWARD in Watched.seen


def test_a_tracer_sees_the_operator(q):
    traced = make_fx(attention)(q, K, V)
    assert FORWARD in [node.target for node in traced.graph.nodes]


def test_a_checkpoint_that_keeps_what_operators_return_keeps_this_one_s(q):
    asked = []

    def policy(context, op, *args, **kwargs):
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(
        attention, q.requires_grad_(), K, V, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    out.sum().backward()
    assert FORWARD in asked


def test_a_view_that_negates_is_negated(q):
    assert intercepted(q, torch._neg_view(q))
    assert torch.equal(attention(torch._neg_view(q), K, V), attention(-q, K, V))


@pytest.mark.parametrize(
    "about",
    [
        Seen, Overridden, torch._subclasses.FakeTensorMode, torch.profiler.profile,
        forward_ad.dual_level, enable_python_dispatcher,
    ],
    ids=["dispatch mode", "function mode", "fake tensors", "profiler", "forward mode", "dispatcher in Python"],
)  # fmt: skip
def test_who_is_about_is_noticed(q, about):
    assert not intercepted(q)
    with about():
        assert intercepted(q)
        assert watched()
    assert not intercepted(q)
    assert not watched()


def test_transforms_are_noticed(q):
    noticed = []

    def ask(x):
        noticed.append(intercepted(x))
        return x.sum()

    torch.func.grad(ask)(q)
    torch.func.vmap(ask)(q)
    assert noticed == [True, True]


def test_what_autograd_does_not_record_the_call_does_not_either(q):
    leaf = q.clone().requires_grad_()
    assert recorded(q, leaf)
    assert not recorded(q, q)
    for off in (torch.no_grad(), torch.inference_mode(), torch._C._AutoDispatchBelowAutograd()):
        with off:
            assert not recorded(leaf)
            assert not attention(leaf, K, V).requires_grad
    assert attention(leaf, K, V).requires_grad


def test_gradients_of_gradients_are_refused_on_either_way(q):
    for about in (contextlib.nullcontext(), Seen()):
        leaf = q.clone().requires_grad_()
        with about:
            (grad,) = torch.autograd.grad(attention(leaf, K, V).sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="double backward is not implemented"):
                grad.sum().backward()


def test_a_compiler_sees_the_operator(q):
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda x: attention(x, K, V), backend=backend, fullgraph=True)
    assert torch.equal(compiled(q), attention(q, K, V))
    assert FORWARD in seen


def test_forward_mode_and_transforms_see_the_operator(q):
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        attention(forward_ad.make_dual(q, q), K, V)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: attention(x, K, V), (q,), (q,))
    with pytest.raises(RuntimeError, match="Batching rule"):
        torch.func.vmap(lambda x: attention(x, K, V))(q[None])
