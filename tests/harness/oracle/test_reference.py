"""The reference against autograd in fp64, however it is chunked; and which rows are judged."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.masks import Mask
from attnbench.harness.oracle import reference as module
from attnbench.harness.oracle.inputs import Inputs, judging_dout, make_inputs
from attnbench.harness.oracle.reference import eager, judged_rows, probe_rows, reference
from attnbench.harness.problem import Problem

CPU = torch.device("cpu")
MASKS = [
    "full",
    "causal",
    "causal@top_left",
    "window(5,9)@top_left",
    "window(0,0)",
    "blocks(random,16x8,density=0.4,seed=1,per_head=1)",
    "causal&blocks(banded,32x16,density=0.5)",
    "blocks(random,8x8,density=0,seed=0)",
]
SHAPES = [(70, 50, 6, 2), (50, 70, 4, 4), (1, 33, 4, 1), (20, 1, 2, 2), (7, 0, 2, 1)]


def by_autograd(problem: Problem, inputs: Inputs, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    """Dense fp64 attention differentiated by torch; an empty row's P is zeroed after the softmax."""
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    group = problem.heads // problem.kv_heads
    wide_k, wide_v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    visible = problem.mask.dense(
        torch.arange(problem.seqlen_q), problem.heads, problem.seqlen_q, problem.seqlen_k
    )
    scores = q.transpose(1, 2) @ wide_k.mT * problem.softmax_scale
    # A finite stand-in for -inf keeps the softmax of an empty row, and its gradient, free of NaN.
    p = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    out = (p @ wide_v).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    lse = scores.detach().masked_fill(~visible, -torch.inf).logsumexp(-1)
    return {"out": out.detach(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("score_bytes", [64 << 20, 6000])
def test_reference_is_what_autograd_finds(
    monkeypatch, mask, seqlen_q, seqlen_k, heads, kv_heads, score_bytes
):
    monkeypatch.setitem(module.SCORE_BYTES, "cpu", score_bytes)
    problem = Problem(
        2,
        heads,
        seqlen_q,
        8,
        kv_heads,
        seqlen_k,
        head_dim_v=12,
        dtype="fp64",
        mask=Mask.parse(mask),
        scale=0.4,
    )
    inputs = make_inputs(problem, 0, CPU, dout=True)
    rows = judged_rows(problem, 1 << 40)
    want = by_autograd(problem, inputs, inputs.dout)
    for answer in (reference, eager):
        got = answer(problem, inputs, rows, backward=True)
        for name, right in want.items():
            if getattr(got, name) is not None:
                torch.testing.assert_close(getattr(got, name), right, rtol=1e-12, atol=1e-13)
    assert reference(problem, inputs, rows, backward=False).dk is None


def test_a_sample_of_rows_answers_for_dout_zero_elsewhere():
    problem = Problem(1, 4, 300, 16, kv_heads=2, dtype="fp64", mask=Mask.causal())
    inputs = make_inputs(problem, 0, CPU, dout=True)
    rows = judged_rows(problem, 4 * 300 * 40)
    assert len(rows) == 40
    got = reference(problem, inputs, rows, backward=True)
    want = by_autograd(problem, inputs, judging_dout(inputs, rows))
    for name in ("dk", "dv"):
        torch.testing.assert_close(getattr(got, name), want[name], rtol=1e-12, atol=1e-13)
    for name in ("out", "dq"):
        torch.testing.assert_close(getattr(got, name), want[name][:, rows], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.lse, want["lse"][:, :, rows], rtol=1e-12, atol=1e-13)


def test_an_empty_row_is_zero_with_lse_minus_infinity_and_no_gradient():
    problem = Problem(1, 1, 9, 8, seqlen_k=4, dtype="fp32", mask=Mask.causal())
    answer = reference(problem, make_inputs(problem, 0, CPU, dout=True), torch.arange(9), backward=True)
    assert (answer.lse[0, 0, :5] == -torch.inf).all()
    assert answer.lse[0, 0, 5:].isfinite().all()
    assert answer.out[0, :5].count_nonzero() == answer.dq[0, :5].count_nonzero() == 0


def test_eager_rounds_to_the_problems_dtype():
    problem = Problem(1, 2, 64, 32, dtype="bf16")
    inputs = make_inputs(problem, 0, CPU, dout=True)
    plain = eager(problem, inputs, torch.arange(64), backward=True)
    right = reference(problem, inputs, torch.arange(64), backward=True)
    for name in ("out", "dq", "dk", "dv"):
        assert getattr(plain, name).dtype == torch.bfloat16
        error = (getattr(plain, name) - getattr(right, name)).abs().mean() / getattr(right, name).abs().mean()
        assert 1e-4 < error < 1e-1


def test_what_it_cannot_answer_is_refused():
    problem = Problem(1, 1, 8, 8, dtype="fp32")
    inputs = make_inputs(problem, 0, CPU, dout=False)
    with pytest.raises(ValueError, match="dout"):
        reference(problem, inputs, torch.arange(8), backward=True)
    with pytest.raises(ValueError, match="dropout"):
        reference(dataclasses.replace(problem, dropout_p=0.1), inputs, torch.arange(8), backward=False)


def test_eager_needs_full_fp32_products(monkeypatch):
    problem = Problem(1, 1, 8, 8, dtype="fp32")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with pytest.raises(RuntimeError, match="highest"):
        eager(problem, make_inputs(problem, 0, CPU, dout=False), torch.arange(8), backward=False)


# ---- rows -------------------------------------------------------------------------------------------------


@given(
    seqlen_q=st.integers(0, 3000),
    seqlen_k=st.integers(0, 3000),
    heads=st.integers(1, 3),
    mask=st.sampled_from(["full", "causal", "window(10,0)"]),
    max_pairs=st.integers(0, 10**7),
)
def test_judged_rows_are_all_or_a_sample_within_the_limit(seqlen_q, seqlen_k, heads, mask, max_pairs):
    problem = Problem(1, heads, seqlen_q, 8, seqlen_k=seqlen_k, mask=Mask.parse(mask))
    rows = judged_rows(problem, max_pairs)
    assert rows.dtype == torch.int64
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert all(0 <= row < seqlen_q for row in rows.tolist())
    if heads * seqlen_q * seqlen_k <= max_pairs:
        assert len(rows) == seqlen_q
    else:
        assert len(rows) == min(seqlen_q, max(16, max_pairs // (heads * seqlen_k)))
        assert {0, seqlen_q - 1} <= set(rows.tolist())
    assert torch.equal(rows, judged_rows(problem, max_pairs))


def test_a_sample_holds_tile_edges_and_the_first_row_that_sees_a_key():
    problem = Problem(1, 1, 8192, 8, seqlen_k=5000, mask=Mask.causal())
    rows = set(judged_rows(problem, 5000 * 200).tolist())
    assert {3191, 3192, 3193} <= rows
    edges = {row - row % 64 for row in rows if row % 64 == 0 and {row - 1, row, row + 1} <= rows}
    assert len(edges) >= 30
    assert min(edges) <= 64
    assert max(edges) == 8192 - 64
    assert {edge % 128 for edge in edges} == {0, 64}
    assert {0, 8191} <= set(probe_rows(problem).tolist())
    assert len(probe_rows(problem)) == 32
