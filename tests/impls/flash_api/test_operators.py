"""What torch's differentiation may ask of an operator, with the formulas standing in for kernels."""

import pytest
import torch
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
