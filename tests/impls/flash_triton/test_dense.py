"""Full, causal and windowed attention, forward and backward, against fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnbench.impls.flash_triton import configs, flash_attention, launch
from attnbench.impls.flash_triton.launch import forget_plans

FP16, FP32 = torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (64, 64), (33, 70), (130, 40)])
def test_full(make, wrong, dtype, seqlen_q, seqlen_k):
    assert wrong(make(seqlen_q, seqlen_k, dtype=dtype), flash_attention) == []


@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(70, 70), (33, 100), (100, 33), (1, 70)])
def test_causal(make, wrong, alignment, seqlen_q, seqlen_k):
    shift = None if alignment == "bottom_right" else 0
    problem = make(seqlen_q, seqlen_k, right=0, shift=shift)
    assert wrong(problem, flash_attention, causal=True, alignment=alignment) == []


@pytest.mark.parametrize("window", [(0, 0), (7, 3), (None, 5), (40, None), (1000, 1000)], ids=str)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "alignment"), [(70, 100, "bottom_right"), (100, 70, "top_left")]
)
def test_window(make, wrong, window, seqlen_q, seqlen_k, alignment):
    shift = None if alignment == "bottom_right" else 0
    problem = make(seqlen_q, seqlen_k, left=window[0], right=window[1], shift=shift, dtype=FP32)
    assert wrong(problem, flash_attention, window=window, alignment=alignment) == []


def amid_nan(x):
    """x as rows of a longer sequence that is NaN before and after them."""
    around = torch.full_like(x[:, :1], float("nan")).expand(-1, 128, -1, -1)
    return torch.cat([around, x, around], 1)[:, 128:-128]


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "window"), [(128, 300, (None, 5)), (300, 128, (5, None))], ids=str
)
def test_tiles_of_keys_or_queries_without_a_partner(make, wrong, seqlen_q, seqlen_k, window):
    """The band leaves the last keys, or the last queries, at once and not at the edge of a tile."""
    problem = make(seqlen_q, seqlen_k, left=window[0], right=window[1], shift=0)
    problem.q, problem.k, problem.v, problem.d_out = (
        amid_nan(x) for x in (problem.q, problem.k, problem.v, problem.d_out)
    )
    assert wrong(problem, flash_attention, window=window, alignment="top_left") == []


def test_causal_window_has_no_right_side(make, wrong):
    assert wrong(make(80, 80, left=9, right=0), flash_attention, window=(9, 30), causal=True) == []


@pytest.mark.parametrize("other", [1, -1])
def test_the_judge_sees_a_window_one_key_off(make, wrong, other):
    assert wrong(make(70, 70, left=9 + other, right=0), flash_attention, window=(9, 0)) != []


def test_the_judge_sees_the_other_alignment(make, wrong):
    assert wrong(make(33, 70, right=0, shift=0), flash_attention, causal=True) != []


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_grouped_heads(make, wrong, heads, kv_heads):
    assert wrong(make(70, 40, heads, kv_heads, batch=2, right=0), flash_attention, causal=True) == []


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(24, 24), (40, 16), (16, 72), (256, 128)])
def test_head_dims(make, wrong, head_dim, head_dim_v):
    assert wrong(make(40, 50, head_dim=head_dim, head_dim_v=head_dim_v), flash_attention) == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seqlen_q=st.integers(1, 80), seqlen_k=st.integers(1, 80), left=st.none() | st.integers(0, 90),
    right=st.none() | st.integers(0, 90), kv_heads=st.integers(1, 2), group=st.integers(1, 2),
    top_left=st.booleans(), head_dim=st.sampled_from([16, 24]),
)  # fmt: skip
def test_any_band(make, wrong, seqlen_q, seqlen_k, left, right, kv_heads, group, top_left, head_dim):
    shift = 0 if top_left else None
    problem = make(
        seqlen_q,
        seqlen_k,
        kv_heads * group,
        kv_heads,
        head_dim,
        left=left,
        right=right,
        shift=shift,
        dtype=FP32,
    )
    alignment = "top_left" if top_left else "bottom_right"
    assert wrong(problem, flash_attention, window=(left, right), alignment=alignment) == []


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 3), (1, 0, 3), (1, 3, 0)])
def test_nothing_to_attend_to(make, batch, seqlen_q, seqlen_k):
    out, lse, *grads = make(seqlen_q, seqlen_k, 2, batch=batch).run(flash_attention)
    assert out.shape == (batch, seqlen_q, 2, 16)
    assert lse.shape == (batch, 2, seqlen_q)
    assert (lse == float("-inf")).all()
    assert all((x == 0).all() for x in (out, *grads))


def test_strides(make, wrong, device):
    """Transposed, sliced, expanded and last-dimension-strided inputs, and an expanded gradient of out."""
    problem = make(40, 50, 2)
    wanted = problem.q, problem.k, problem.v
    problem.q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    problem.k = torch.cat([problem.k, problem.k], 3)[..., :16]
    problem.v = problem.v.transpose(2, 3).contiguous().transpose(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(wanted, (problem.q, problem.k, problem.v), strict=True))
    problem.d_out = torch.ones((), dtype=FP16, device=device).expand(problem.d_out.shape)
    problem.d_lse = torch.ones((), device=device).expand(problem.d_lse.shape)
    assert wrong(problem, flash_attention) == []
    problem.v = problem.v[:, :, :1].expand(-1, -1, 2, -1)
    assert wrong(problem, flash_attention) == []


def test_scale(make, wrong):
    assert wrong(make(40, 40, scale=0.7), flash_attention, scale=0.7) == []
    assert wrong(make(40, 40, scale=0.7), flash_attention, scale=0.67) != []


def test_large_inputs_stay_finite(make, wrong):
    problem = make(40, 40)
    problem.q *= 20
    problem.k *= 20
    assert wrong(problem, flash_attention) == []


def test_only_lse_has_a_gradient(make):
    problem = make(40, 50, dtype=FP32)
    problem.d_out.zero_()
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    _, lse = flash_attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), problem.d_lse)
    reference = problem.attention(torch.float64)
    torch.testing.assert_close(dq.double(), reference[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dk.double(), reference[3], atol=1e-5, rtol=1e-5)
    assert (dv == 0).all()


@pytest.fixture
def force(monkeypatch):
    """Replace the chosen configs by functions of them, to reach forms that a small problem does not choose."""

    def replace(forward=lambda c: c, backward=lambda c: c):
        forward_config, backward_config = configs.forward_config, configs.backward_config
        monkeypatch.setattr(launch, "forward_config", lambda *a: forward(forward_config(*a)))
        monkeypatch.setattr(launch, "backward_config", lambda *a: backward(backward_config(*a)))
        forget_plans()

    yield replace
    forget_plans()


@pytest.mark.parametrize("window", [(None, None), (30, 0)], ids=str)
def test_tensor_descriptors(make, wrong, force, window):
    from dataclasses import replace

    force(
        lambda c: replace(c, tile=replace(c.tile, tma=True)),
        lambda c: replace(c, dkdv=replace(c.dkdv, tma=True), dq=replace(c.dq, tma=True)),
    )
    problem = make(50, 70, 4, 2, 24, 40, batch=2, left=window[0], right=window[1])
    assert wrong(problem, flash_attention, window=window) == []


@pytest.mark.parametrize("planes_per_wave", [1, 2, 3, 100])
def test_schedule_visits_every_tile_once(make, wrong, force, planes_per_wave):
    from dataclasses import replace

    tile = configs.Tile(16, 16, 4, 1)
    force(
        lambda c: replace(c, tile=tile, planes_per_wave=planes_per_wave, heavy_last=True),
        lambda c: replace(c, dkdv=tile, dq=tile, planes_per_wave=planes_per_wave, heavy_last=True),
    )
    assert wrong(make(40, 40, 5, right=0), flash_attention, causal=True) == []
