"""What torch's differentiation may ask of an operator, with the formulas standing in for kernels."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from attnbench.impls.flash_api import attend, define_ops


def forward(q, k, v, rng, lists, options):
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * options.scale
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
    return out.to(q.dtype).contiguous(), scores.logsumexp(-1).float()


def backward(d_out, d_lse, q, k, v, out, lse, rng, lists, options):
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def refuse(q, v, options):
    if options.dropout_p > 0:
        raise ValueError("dropout_p: no gradients")


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OP = define_ops("test_operators", forward, backward, refuse)


def attention(q, k, v, dropout_p=0.0):
    return attend(
        OP, q, k, v, causal=False, window=None, alignment="bottom_right", dropout_p=dropout_p, block_mask=None,
        scale=None, return_lse=False, deterministic=False,
    )  # fmt: skip


@pytest.fixture
def q():
    return torch.randn(1, 8, 2, 16)


def test_forward_mode_is_an_error_and_not_zero(q):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        for arguments in ((dual, q, q), (q, dual, q), (q, q, dual)):
            with pytest.raises(RuntimeError, match="forward-mode"):
                attention(*arguments)
        with pytest.raises(RuntimeError, match="forward-mode"), torch.no_grad():
            attention(dual, q, q)
        assert not attention(q, q, q).requires_grad


@pytest.mark.parametrize("wanted", [False, True])
def test_jvp_is_an_error_and_not_zero(q, wanted):
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: attention(x, q, q), (q.requires_grad_(wanted),), (torch.ones_like(q),))


def test_a_gradient_that_is_not_offered_is_refused_by_the_call(q):
    assert attention(q, q, q, 0.1).shape == q.shape
    q.requires_grad_()
    with pytest.raises(ValueError, match="dropout_p: no gradients"):
        attention(q, q, q, 0.1)
    with torch.no_grad():
        attention(q, q, q, 0.1)
    attention(q, q, q).sum().backward()


STATE = torch.zeros(2, dtype=torch.int64)
LISTS = [torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)] * 4


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("family", ["test_operators", "flash_cuda", "flash_triton"])
@pytest.mark.parametrize(
    ("rng", "lists", "dropout_p", "block", "message"),
    [
        (None, [], 0.1, (0, 0), "rng: got None with dropout_p=0.1"),
        (STATE, [], 0.0, (0, 0), "rng: got a tensor with dropout_p=0.0"),
        (None, [], 0.0, (128, 128), "lists: got 0 tensors, allowed with mask blocks of 128 x 128 are 8"),
        (None, [], 0.0, (128, 0), "lists: got 0 tensors, allowed with mask blocks of 128 x 0 are 8"),
        (None, LISTS[:4], 0.0, (128, 128), "lists: got 4 tensors"),
        (None, LISTS, 0.0, (0, 0), "lists: got 8 tensors, allowed with mask blocks of 0 x 0 are 0"),
    ],
)
def test_an_operator_refuses_what_would_read_a_tensor_that_is_not_there(
    fake, family, rng, lists, dropout_p, block, message
):
    for module in ("flash_cuda", "flash_triton"):
        importlib.import_module(f"attnbench.impls.{module}.op")
    x, lse = torch.zeros(1, 8, 2, 16, dtype=torch.float16), torch.zeros(1, 2, 8)
    options = (rng, lists, None, None, True, 0.25, dropout_p, *block, False)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.attnbench, f"{family}_forward")(x, x, x, *options)
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.attnbench, f"{family}_backward")(x, None, x, x, x, x, lse, *options)


def test_an_operator_takes_what_is_consistent(q):
    run = torch.ops.attnbench.test_operators_forward
    for rng, lists, dropout_p, block in ((None, [], 0.0, (0, 0)), (STATE, LISTS, 0.1, (128, 128))):
        out, _ = run(q, q, q, rng, lists, None, None, True, 0.25, dropout_p, *block, False)
        assert out.shape == q.shape
