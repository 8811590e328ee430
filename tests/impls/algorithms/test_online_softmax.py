"""The equations against their plain meaning in fp64, and each failing where its paper says it must."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnbench.impls.algorithms import online_softmax as method
from attnbench.impls.algorithms.online_softmax import Rows

TIGHT = {"rtol": 1e-12, "atol": 1e-14}
SOFTMAXES = [method.naive_softmax, method.safe_softmax, method.online_softmax]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s = q @ k.mT * scale
    return torch.softmax(s, dim=-1) @ v, torch.logsumexp(s, dim=-1, keepdim=True)


def merged(s: Tensor, v: Tensor, edges: list[int], order: list[int]) -> Rows:
    """The tiles of s between ``edges``, each by itself, merged in ``order``."""
    tiles = [
        method.of_tile(s[..., a:b], lambda p, a=a, b=b: p @ v[a:b]) for a, b in itertools.pairwise(edges)
    ]
    rows = tiles[order[0]]
    for index in order[1:]:
        rows = method.merge(rows, tiles[index])
    return rows


# ---- softmax ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_every_softmax_is_the_softmax(softmax) -> None:
    x = 3 * normal(5, 37)
    torch.testing.assert_close(softmax(x), torch.softmax(x, dim=-1), **TIGHT)


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, 88.72), (torch.float16, 11.08)])
def test_the_naive_softmax_overflows_where_exp_does(dtype: torch.dtype, last: float) -> None:
    """exp passes the largest fp32 at 88.7228, the largest fp16 at 11.0899."""
    below, above = torch.tensor([[last, 0.0]], dtype=dtype), torch.tensor([[last + 0.02, 0.0]], dtype=dtype)
    assert method.naive_softmax(below).isfinite().all()
    assert method.naive_softmax(above).isnan().any()
    for softmax in (method.safe_softmax, method.online_softmax):
        assert softmax(above).isfinite().all()
        assert softmax(torch.tensor([[60000.0, 59999.0]], dtype=torch.float32))[0, 0] == pytest.approx(
            0.7311, 1e-3
        )


def test_a_sum_that_is_not_rescaled_is_wrong() -> None:
    """What the factor exp(m - m') is for: without it, scores before the last maximum count too much."""
    x = torch.tensor([[0.0, 5.0, 1.0]], dtype=torch.float64)
    m, right = method.normaliser(x.split(1, dim=-1))
    left_out = torch.stack([torch.exp(x[:, j] - x[:, : j + 1].amax()) for j in range(3)]).sum()
    assert m.item() == 5
    assert right.item() == pytest.approx(1 + math.exp(-5) + math.exp(-4))
    assert left_out.item() > 1.9


def test_the_normaliser_takes_one_exp_too_large_for_the_dtype() -> None:
    """Maxima that rise by more than 88 between columns: every intermediate stays finite."""
    x = torch.tensor([[0.0, 200.0, 400.0]])
    maximum, total = method.normaliser(x.split(1, dim=-1))
    assert (maximum.item(), total.item()) == (400, 1)


# ---- attention -------------------------------------------------------------------------------------------------


def test_one_pass_over_the_keys_is_attention() -> None:
    q, k, v = normal(2, 7, 5), normal(2, 23, 5, seed=1), normal(2, 23, 3, seed=2)
    for found, right in zip(method.streamed_attention(q, k, v, 0.4), attention(q, k, v, 0.4), strict=True):
        torch.testing.assert_close(found, right, **TIGHT)


@given(cuts=st.sets(st.integers(1, 28), max_size=6), draw=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tiles_may_be_merged_in_any_order(cuts: set[int], draw) -> None:
    q, k, v = normal(4, 6), normal(29, 6, seed=1), normal(29, 3, seed=2)
    edges = [0, *sorted(cuts), 29]
    order = list(range(len(edges) - 1))
    draw.shuffle(order)
    found = merged(q @ k.mT, v, edges, order).finish()
    for one, right in zip(found, attention(q, k, v, 1.0), strict=True):
        torch.testing.assert_close(one, right, **TIGHT)


def test_merging_is_associative_with_tiles_that_hold_nothing() -> None:
    q, k, v = normal(4, 6), normal(24, 6, seed=1), normal(24, 3, seed=2)
    s = q @ k.mT
    s[1] = -math.inf
    s[2, :8] = -math.inf
    a, b, c = (method.of_tile(s[:, i : i + 8], lambda p, i=i: p @ v[i : i + 8]) for i in (0, 8, 16))
    left, right = method.merge(method.merge(a, b), c), method.merge(a, method.merge(b, c))
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)
    out, lse = left.finish()
    assert (out[1] == 0).all()
    assert lse[1].item() == -math.inf
    assert out.isfinite().all()


def test_absorbing_a_tile_is_merging_it() -> None:
    q, k, v = normal(4, 6), normal(24, 6, seed=1), normal(24, 3, seed=2)
    s = q @ k.mT
    rows = method.nothing_seen(q, 3, torch.float64)
    for i in (0, 8, 16):
        rows = method.absorb(rows, s[:, i : i + 8], lambda p, i=i: p @ v[i : i + 8])
    for x, y in zip(rows, merged(s, v, [0, 8, 16, 24], [0, 1, 2]), strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


# ---- backward --------------------------------------------------------------------------------------------------


def test_recomputation_gives_the_gradients_that_storing_p_gives() -> None:
    q, k, v, dout = normal(7, 5), normal(23, 5, seed=1), normal(23, 3, seed=2), normal(7, 3, seed=3)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, 0.4)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    with torch.no_grad():
        s = q @ k.mT * 0.4
        p = method.probabilities(s, lse)
        torch.testing.assert_close(p.mT @ dout, dv, **TIGHT)
        delta = method.row_delta(dout, out)
        torch.testing.assert_close(delta, (p * (dout @ v.mT)).sum(-1, keepdim=True), **TIGHT)
        ds = method.score_gradient(p, dout @ v.mT, delta)
        torch.testing.assert_close(0.4 * ds @ k, dq, **TIGHT)
        torch.testing.assert_close(0.4 * ds.mT @ q, dk, **TIGHT)


def test_the_maximum_alone_does_not_give_p_back() -> None:
    """Why the backward pass needs m + log l, and a kernel that saves m in its place is wrong."""
    s = normal(3, 9)
    m = s.amax(dim=-1, keepdim=True)
    wrong = method.probabilities(s, m).sum(dim=-1)
    assert (wrong > 1.5).all()
    right = method.probabilities(s, torch.logsumexp(s, dim=-1, keepdim=True)).sum(dim=-1)
    torch.testing.assert_close(right, torch.ones_like(right), **TIGHT)
