"""The error rules one by one: each term is there, and each is as small as it says."""

from __future__ import annotations

import pytest
import torch

from attnbench.harness.oracle.budget import (
    STRETCH,
    Tally,
    lse_budget,
    rounding_atol,
    stretches,
    tensor_budget,
)
from attnbench.harness.oracle.inputs import make_inputs
from attnbench.harness.oracle.judge import build, judge
from attnbench.harness.problem import Problem

CPU = torch.device("cpu")
EPS = torch.finfo(torch.bfloat16).eps


def noisy(length: int = 256, error: float = 1e-2) -> tuple[torch.Tensor, torch.Tensor]:
    """A reference (2, length, 4, 8) and an eager answer that is everywhere ``error`` off it."""
    reference = torch.randn(
        (2, length, 4, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return reference, reference + error


def test_the_max_rule_is_twice_eagers_error_and_a_little():
    reference, eager = noisy()
    budget = tensor_budget(reference, eager, relative=0.0)
    luck = 1 + 3 / (2 * 64 * 4) ** 0.5
    assert len(budget.max_errors) == 256 // STRETCH
    for allowed in budget.max_errors:
        assert 2 * luck * 1e-2 <= allowed <= 2 * luck * 1e-2 + 1e-12


def test_the_mean_rule_is_1_3_times_eagers_error():
    reference, eager = noisy()
    luck = 1 + 3 / (2 * 256 * 4) ** 0.5
    assert tensor_budget(reference, eager, 0.0).mean_error == pytest.approx(1.3 * luck * 1e-2)


def test_an_exact_eager_leaves_an_ulp_and_the_floor():
    reference = torch.full((1, 64, 1, 8), 0.75, dtype=torch.float64)
    exact = tensor_budget(reference, reference.bfloat16(), relative=0.0)
    assert exact.mean_error == 0
    # An ulp of 0.75 is half an eps; luck and half an ulp of the terms stand above it, two ulps bound them.
    assert EPS / 2 <= exact.max_error <= 4 * EPS
    assert tensor_budget(reference, reference.bfloat16(), relative=1e-3).mean_error == pytest.approx(0.75e-3)


def test_each_stretch_has_its_own_maximum():
    reference, eager = noisy(3 * STRETCH, error=0.0)
    eager[:, STRETCH : 2 * STRETCH] += 1.0
    low, high, again = tensor_budget(reference, eager, 0.0).max_errors
    assert high > 2.0
    assert max(low, again) < 1e-6


def test_a_gradient_whose_terms_cancel_is_allowed_their_rounding():
    reference = torch.zeros((1, 64, 1, 8), dtype=torch.float64)
    partner = torch.ones_like(reference)
    alone = tensor_budget(reference, reference.bfloat16(), 1e-6)
    beside = tensor_budget(reference, reference.bfloat16(), 1e-6, partner, 3.0)
    assert alone.max_error == alone.mean_error == 0
    assert beside.max_error == pytest.approx(3 * EPS * (1 + 3 / 8), rel=1e-2)
    assert beside.mean_error == pytest.approx(3e-6)


def test_an_eager_that_overflows_sets_no_budget():
    reference, eager = noisy()
    eager[0, 0, 0, 0], eager[1, 5, 1, 1] = torch.inf, torch.nan
    budget = tensor_budget(reference, eager, 0.0)
    assert budget.max_error < 0.03
    assert budget.mean_error < 0.02
    nothing = tensor_budget(reference, torch.full_like(eager, torch.nan).bfloat16(), 0.0)
    assert nothing.max_error < 8 * EPS * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-4, 0.3, 1.0, 100.0])
def test_atol_is_an_ulp_or_two_at_any_magnitude(dtype, magnitude):
    reference = torch.linspace(-1, 1, 64 * 8, dtype=torch.float64).reshape(1, 64, 1, 8) * magnitude
    atol = rounding_atol(reference, torch.tensor([magnitude], dtype=torch.float64), dtype)
    eps = torch.finfo(dtype).eps
    assert 0.5 * eps * magnitude <= atol.item() <= 2 * eps * magnitude


def test_atol_of_zeros_is_zero():
    assert (
        rounding_atol(torch.zeros(1, 64, 1, 8).double(), torch.zeros(1).double(), torch.bfloat16).item() == 0
    )


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 2**-13), ("fp32", 2**-20)])
def test_lse_may_miss_what_fp32_arithmetic_loses_and_no_more(dtype, least):
    lse = torch.full((1, 1, 64), 8.0, dtype=torch.float64)
    lse[0, 0, 0] = -torch.inf
    budget = lse_budget(Problem(1, 1, 64, 8, dtype=dtype), lse, relative=2**-20)
    assert least <= budget.max_error <= 1.2 * (least + 2**-20)
    assert lse_budget(Problem(1, 1, 64, 8, dtype=dtype), torch.full_like(lse, -torch.inf), 0.0).max_error > 0


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 200])
def test_stretches_hold_64_and_the_last_what_is_left(length):
    of = stretches(length, CPU)
    counts = of.bincount().tolist()
    assert counts[:-1] == [64] * (len(counts) - 1)
    assert counts[-1] < 128
    values = torch.rand((2, length, 3), generator=torch.Generator().manual_seed(0))
    tally = Tally(length, CPU)
    for start in range(0, length, 10):
        chunk = (slice(None), slice(start, start + 10))
        tally.add(chunk, values[chunk])
    want = torch.stack([values[:, of == index].max() for index in range(len(counts))])
    assert torch.equal(tally.stretches().float(), want)
    assert tally.mean(values) == pytest.approx(values.double().mean().item())


def softmax_backward_as_on_cuda(p: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
    """dS in P's dtype as torch's CUDA kernel computes it: P dP rounded first, then P rowsum(P dP) taken off."""
    product = p * dp
    return (product.float() - p.float() * product.float().sum(-1, keepdim=True)).to(p.dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("wrong", [0.0, 0.01], ids=["right", "scale off by 1%"])
def test_softmaxs_own_backward_is_no_fault_where_all_keys_are_equal(dtype: str, wrong: float) -> None:
    problem = Problem(1, 2, 300, 64, dtype=dtype, direction="fwd_bwd")
    inputs = make_inputs(problem, 3, CPU, dout=True, kind="equal" if not wrong else "normal")
    oracle = build(problem, inputs, 3, torch.arange(300), backward=True)
    q, k, v, dout = (x.transpose(1, 2)[0] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    p = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=problem.softmax_scale).softmax(-1)
    ds = softmax_backward_as_on_cuda(p, dout @ v.mT)
    dq = ((ds @ k) * problem.softmax_scale * (1 + wrong)).transpose(0, 1)[None]
    assert judge(oracle, {"dq": dq}).ok is (not wrong)
