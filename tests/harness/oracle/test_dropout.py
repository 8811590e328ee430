"""The reference under a dropout mask, and masks recovered from nothing but what a call answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.harness.contract import Dropout
from attnbench.harness.masks import Mask
from attnbench.harness.oracle import dropout
from attnbench.harness.oracle.dropout import GeneratorState, recover
from attnbench.harness.oracle.inputs import make_inputs
from attnbench.harness.oracle.judge import WrongAnswer
from attnbench.harness.oracle.reference import Kept, eager, reference
from attnbench.harness.problem import Problem

CPU = torch.device("cpu")
PROBLEM = Problem(
    2, 4, 9, 8, kv_heads=2, seqlen_k=14, head_dim_v=5, dtype="fp32", mask=Mask.causal(), dropout_p=0.3
)
Weigh = Callable[[torch.Tensor], torch.Tensor]


def attention(problem: Problem, weigh: Weigh) -> Callable[..., torch.Tensor]:
    """Dense attention in the operands' dtype, its P passed through ``weigh``."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = problem.heads // problem.kv_heads
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.softmax_scale
        seen = problem.mask.dense(
            torch.arange(problem.seqlen_q), problem.heads, problem.seqlen_q, problem.seqlen_k
        )
        return torch.einsum("bhqk,bkhd->bqhd", weigh(s.masked_fill(~seen, -torch.inf).softmax(-1)), v)

    return attend


def random_keep(problem: Problem, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k)
    return torch.rand(shape, generator=generator) >= problem.dropout_p


@pytest.mark.parametrize("answer", [reference, eager])
def test_gradients_under_a_mask_are_autograds(answer: Callable[..., object]) -> None:
    inputs = make_inputs(PROBLEM, 3, CPU, dout=True)
    keep = random_keep(PROBLEM)
    got = answer(PROBLEM, inputs, torch.arange(9), backward=True, kept=Kept(keep, 1.25))
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = attention(PROBLEM, lambda p: p * keep * 1.25)(*leaves)
    wanted = [out, *torch.autograd.grad(out, leaves, inputs.dout.double())]
    for name, want in zip(("out", "dq", "dk", "dv"), wanted, strict=True):
        tolerance = 1e-12 if answer is reference else 1e-5
        torch.testing.assert_close(getattr(got, name).double(), want.detach(), rtol=tolerance, atol=tolerance)


def test_a_mask_of_some_rows_answers_those_rows() -> None:
    inputs, keep = make_inputs(PROBLEM, 3, CPU, dout=False), random_keep(PROBLEM)
    rows = torch.tensor([1, 4, 8])
    whole = reference(PROBLEM, inputs, torch.arange(9), backward=False, kept=Kept(keep, 1.25))
    some = reference(PROBLEM, inputs, rows, backward=False, kept=Kept(keep[:, :, rows], 1.25))
    torch.testing.assert_close(some.out, whole.out[:, rows])


@settings(deadline=None, max_examples=30)
@given(
    seqlen_k=st.integers(1, 40),
    dim=st.integers(1, 24),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    mask=st.sampled_from([Mask.full(), Mask.causal(), Mask.window(5, 2), Mask.causal("top_left")]),
    p=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_the_mask_of_a_call_is_recovered(seqlen_k: int, dim: int, dtype: str, mask: Mask, p: float) -> None:
    problem = Problem(2, 2, 11, dim, seqlen_k=seqlen_k, dtype=dtype, mask=mask, dropout_p=p)
    drawn: list[torch.Tensor] = []

    def weigh(weights: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand(weights.shape) >= p)
        return weights.nan_to_num(0.0) * drawn[-1] / (1 - p)

    state = GeneratorState.at(5, CPU)
    found = recover(problem, attention(problem, weigh), state, Dropout(p, 1 / (1 - p)))
    seen = mask.dense(torch.arange(11), 2, 11, seqlen_k)
    assert len(drawn) == -(-seqlen_k // dim)
    assert torch.equal(found.keep, drawn[0] & seen)


def test_a_recovery_writes_as_much_of_v_as_it_reads_off() -> None:
    """One V for all slices, of which each changes its own rows: a new one for each is Sk^2 written."""
    problem = dataclasses.replace(PROBLEM, direction="fwd_bwd", mask=Mask.full())
    values: list[torch.Tensor] = []
    right = attention(problem, lambda p: p * (torch.rand(p.shape) >= 0.3) / 0.7)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.requires_grad
        assert v.requires_grad
        values.append(v)
        slices.append(v.detach().clone())
        return right(q, k, v)

    slices: list[torch.Tensor] = []
    recover(problem, attend, GeneratorState.at(5, CPU), Dropout(0.3, 1 / 0.7))
    assert len(slices) == 3
    assert len({v.data_ptr() for v in values}) == 1
    for number, v in enumerate(slices):
        want = torch.zeros(14, 5)
        rows = min(5, 14 - 5 * number)
        want[5 * number : 5 * number + rows] = torch.eye(rows, 5)
        assert torch.equal(v, want[None, :, None].expand_as(v))


def test_more_keys_than_fp16_has_numbers_for() -> None:
    seen, visible = torch.full((1, 3, 1), 70_000), torch.ones(1, 3, 8, dtype=torch.bool)
    weights = torch.zeros(1, 1, 3, 8, dtype=torch.float16)
    weights[..., ::2] = 2 / 70_000
    dropout._check(weights, seen, visible, Dropout(0.5, 2.0), start=0)
    with pytest.raises(WrongAnswer, match="of one key"):
        dropout._check(weights / 2, seen, visible, Dropout(0.5, 2.0), start=0)


@pytest.mark.parametrize(
    ("weigh", "said"),
    [
        (lambda p: p * (torch.rand(p.shape) >= 0.3), "is 1 of one key's, neither 0 nor 1.428"),
        (lambda p: p, "is 1 of one key's"),
        (lambda p: torch.full_like(p, torch.nan), "is nan of one key's"),
    ],
    ids=["not scaled", "nothing dropped", "nan"],
)
def test_what_is_no_mask_is_said_to_be_none(weigh: Weigh, said: str) -> None:
    with pytest.raises(WrongAnswer, match=said):
        recover(PROBLEM, attention(PROBLEM, weigh), GeneratorState.at(5, CPU), Dropout(0.3, 1 / 0.7))


def test_a_mask_that_sees_hidden_pairs_is_none() -> None:
    full = dataclasses.replace(PROBLEM, mask=Mask.full())
    weigh: Weigh = lambda p: p * (torch.rand(p.shape) >= 0.3) / 0.7  # noqa: E731
    with pytest.raises(WrongAnswer, match="neither 0 nor"):
        recover(PROBLEM, attention(full, weigh), GeneratorState.at(5, CPU), Dropout(0.3, 1 / 0.7))


def test_a_state_is_restored_to_the_draw() -> None:
    state = GeneratorState.at(1, CPU)
    first = torch.rand(4)
    torch.rand(100)
    state.restore()
    assert torch.equal(torch.rand(4), first)
