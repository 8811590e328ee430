"""Inputs depend on seed, name and shape alone, and lie where the problem says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.masks import Mask
from attnbench.harness.oracle import inputs as module
from attnbench.harness.oracle.chunks import row_major
from attnbench.harness.oracle.inputs import KINDS, judging_dout, make_inputs, torch_dtype
from attnbench.harness.problem import DTYPES, Problem

CPU = torch.device("cpu")
PROBLEM = Problem(2, 4, 33, 16, kv_heads=2, dtype="bf16")


@given(st.lists(st.integers(0, 9), min_size=2, max_size=4).map(tuple), st.integers(1, 50))
def test_chunks_cover_a_tensor_once_in_order(shape, limit):
    x = torch.arange(torch.tensor(shape).prod().item()).reshape(shape)
    seen = [x[chunk].flatten() for chunk in row_major(shape, limit)]
    assert torch.equal(torch.cat(seen) if seen else x.flatten(), x.flatten())
    row = torch.tensor(shape[2:]).prod().item() if len(shape) > 2 else 1
    assert all(len(piece) <= max(limit, row) for piece in seen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_standard_normal_in_the_problems_dtype(dtype):
    made = make_inputs(
        dataclasses.replace(PROBLEM, dtype=dtype, seqlen_q=512, seqlen_k=512), 3, CPU, dout=True
    )
    for x in (made.q, made.k, made.v, made.dout):
        assert x.dtype == torch_dtype(dtype)
        assert abs(x.double().mean()) < 0.05
        assert abs(x.double().std() - 1) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"layout": "bhsd"},
        {"layout": "packed"},
        {"strides": (("k", (4096, 40, 20, 1)), ("q", (5000, 64, 16, 1)), ("dout", (1, 2, 66, 264)))},
    ],
)
def test_values_do_not_depend_on_the_layout(kind, change):
    plain = make_inputs(PROBLEM, 7, CPU, dout=True, kind=kind)
    other = make_inputs(dataclasses.replace(PROBLEM, **change), 7, CPU, dout=True, kind=kind)
    for name in ("q", "k", "v", "dout"):
        assert torch.equal(getattr(plain, name), getattr(other, name))


def test_values_do_not_depend_on_chunks_being_whole_batches(monkeypatch):
    plain = make_inputs(PROBLEM, 7, CPU, dout=False, kind="needle")
    again = make_inputs(PROBLEM, 7, CPU, dout=True, kind="needle")
    assert torch.equal(plain.q, again.q)
    monkeypatch.setattr(module, "row_major", lambda shape: row_major(shape, 33 * 4 * 16))
    chunked = make_inputs(PROBLEM, 7, CPU, dout=True)
    assert chunked.q.isfinite().all()


def test_seeds_and_tensors_differ():
    one, two = make_inputs(PROBLEM, 1, CPU, dout=True), make_inputs(PROBLEM, 2, CPU, dout=True)
    assert not torch.equal(one.q, two.q)
    assert not torch.equal(one.q, one.dout)
    assert not torch.equal(one.k, one.v)


def test_layouts_lie_in_memory_as_they_say():
    transposed = make_inputs(dataclasses.replace(PROBLEM, layout="bhsd"), 0, CPU, dout=True)
    assert transposed.q.transpose(1, 2).is_contiguous()
    packed = make_inputs(dataclasses.replace(PROBLEM, layout="packed"), 0, CPU, dout=False)
    assert packed.q.untyped_storage().data_ptr() == packed.v.untyped_storage().data_ptr()
    assert packed.k.stride() == (33 * 8 * 16, 8 * 16, 16, 1)


def test_strides_are_kept_their_gaps_are_nan_and_stride_0_repeats():
    strides = (("dout", (0, 0, 0, 0)), ("q", (6000, 80, 18, 1)), ("v", (0, 32, 16, 1)))
    made = make_inputs(dataclasses.replace(PROBLEM, strides=strides), 0, CPU, dout=True)
    assert (made.q.stride(), made.v.stride(), made.dout.stride()) == tuple(
        dict(strides)[n] for n in ("q", "v", "dout")
    )
    assert made.q.isfinite().all()
    assert made.q.as_strided((2,), (1,), 16).isnan().all()
    assert torch.equal(made.v[0], made.v[1])
    assert len(made.dout.unique()) == 1
    plain = make_inputs(PROBLEM, 0, CPU, dout=True)
    assert torch.equal(made.v[0], plain.v[0])
    assert made.dout[1, 2, 3, 4] == plain.dout[0, 0, 0, 0]


def test_overlapping_strides_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="two elements in one place"):
        make_inputs(dataclasses.replace(PROBLEM, strides=(("q", (2112, 64, 8, 1)),)), 0, CPU, dout=False)
    with pytest.raises(ValueError, match="'noodle' is not one of normal"):
        make_inputs(PROBLEM, 0, CPU, dout=False, kind="noodle")


@pytest.mark.parametrize(
    "mask", ["full", "causal", "causal@top_left", "window(40,0)", "window(100,30)@top_left"]
)
def test_a_needle_holds_most_of_its_row_and_stands_at_an_edge_the_row_sees(mask):
    problem = Problem(1, 2, 200, 64, seqlen_k=300, dtype="fp32", mask=Mask.parse(mask))
    made = make_inputs(problem, 0, CPU, dout=False, kind="needle")
    visible = problem.mask.dense(torch.arange(200), 2, 200, 300)
    scores = (made.q.transpose(1, 2) @ made.k.transpose(1, 2).mT * problem.softmax_scale)[0]
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    weight, key = p.max(-1)
    assert weight.median() > 0.5
    first, last = (torch.from_numpy(bound) for bound in problem.mask.row_bounds(200, 300))
    at_tile_edge = (key + 1) % 64 <= 2
    at_own_edge = (key == first) | (key == last - 1)
    assert (at_tile_edge | at_own_edge)[weight > 0.9].all()
    assert at_tile_edge.any()
    assert (key == last - 1).any()


def test_large_inputs_overflow_an_exp_without_its_maximum():
    made = make_inputs(dataclasses.replace(PROBLEM, dtype="fp32"), 0, CPU, dout=False, kind="large")
    scores = made.q[0, :, 0] @ made.k[0, :, 0].mT * PROBLEM.softmax_scale
    assert scores.exp().isinf().any()


@pytest.mark.parametrize("change", [{}, {"layout": "bhsd"}, {"strides": (("dout", (0, 0, 64, 1)),)}])
def test_judging_dout_is_zero_outside_the_rows_and_spares_the_original(change):
    made = make_inputs(dataclasses.replace(PROBLEM, **change), 0, CPU, dout=True)
    before = made.dout.clone()
    rows = torch.tensor([0, 5, 32])
    dout = judging_dout(made, rows)
    assert torch.equal(dout[:, rows], before[:, rows])
    assert dout.count_nonzero() == before[:, rows].count_nonzero()
    assert torch.equal(made.dout, before)
    assert 0 in made.dout.stride() or dout.stride() == made.dout.stride()
    assert judging_dout(made, torch.arange(33)) is made.dout


def test_judging_dout_needs_one():
    with pytest.raises(ValueError, match="without dout"):
        judging_dout(make_inputs(PROBLEM, 0, CPU, dout=False), torch.arange(33))
