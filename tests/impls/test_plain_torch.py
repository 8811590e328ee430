"""standard, tiled and SDPA on the CPU against a dense fp64 computation written here."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attnbench.harness.contract import Device, Implementation
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls import sdpa, standard, tiled
from attnbench.impls.algorithms import tiles as tiling

CPU = Device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Rounding of one element relative to the largest of its tensor; sums of a few hundred terms stay within.
TOLERANCE = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 1e-5, "fp64": 1e-12}
IMPLEMENTATIONS = [standard.Standard(), tiled.fa1, tiled.fa2, sdpa.math, sdpa.flash]
MASKS = [
    "full",
    "causal",
    "causal@top_left",
    "window(5,3)",
    "window(5,0)@top_left",
    "window(40,inf)",
    "blocks(random,16x32,density=0.3,seed=1,per_head=1)",
    "causal&blocks(butterfly,32x32)",
]

by_name = pytest.mark.parametrize("impl", IMPLEMENTATIONS, ids=lambda impl: impl.name)


def visible(problem: Problem) -> torch.Tensor:
    """The band and block rules once more, pair by pair."""
    rows, keys, mask = problem.seqlen_q, problem.seqlen_k, problem.mask
    shift = keys - rows if mask.alignment == "bottom_right" else 0
    i, j = torch.arange(rows)[:, None], torch.arange(keys)[None]
    seen = torch.ones(problem.heads, rows, keys, dtype=torch.bool)
    if mask.left is not None:
        seen &= j >= i + shift - mask.left
    if mask.right is not None:
        seen &= j <= i + shift + mask.right
    if mask.blocks:
        blocks = torch.tensor(mask.blocks.blocks(problem.heads, rows, keys))
        seen &= blocks[:, i // mask.blocks.block_q, j // mask.blocks.block_k]
    return seen


def inputs(problem: Problem) -> list[torch.Tensor]:
    """q, k, v, dout in the problem's dtype and layout."""
    generator = torch.Generator().manual_seed(7)
    shapes = (problem.q_shape, problem.k_shape, problem.v_shape, problem.out_shape)
    dense = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(DTYPES[problem.dtype]) for s in shapes
    ]
    if problem.layout == "bhsd":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense]
    return dense


def dense_fp64(problem: Problem, q, k, v, dout) -> dict[str, torch.Tensor]:
    """out, lse and gradients with nothing but einsum and exp; rows that see nothing give 0 and -inf."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = problem.heads // problem.kv_heads
    k_all, v_all = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k_all) * problem.softmax_scale
    weights = torch.where(visible(problem), scores.exp(), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    p = weights / torch.where(total == 0, 1.0, total)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v_all)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    return {"out": out.detach(), "lse": total[..., 0].log().detach(), "dq": dq, "dk": dk, "dv": dv}


def answer(impl: Implementation, problem: Problem, q, k, v, dout) -> dict[str, torch.Tensor]:
    prepared = impl.prepare(problem, CPU)
    if problem.direction == "fwd":
        found = {"out": prepared.attend(q, k, v)}
    else:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = prepared.attend(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        found = {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
    if prepared.attend_with_lse:
        again, lse = prepared.attend_with_lse(q, k, v)
        assert torch.equal(again, found["out"])
        assert lse.dtype == torch.float32
        found["lse"] = lse
    return found


def largest_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest error over the largest reference; infinite where one is infinite and the other is not."""
    assert found.shape == reference.shape
    found = found.double()
    infinite = torch.isinf(reference)
    if not torch.equal(torch.isinf(found), infinite) or found.isnan().any():
        return math.inf
    difference = torch.where(infinite, 0.0, found - reference).abs()
    scale = max(1.0, torch.where(infinite, 0.0, reference).abs().max().item()) if reference.numel() else 1.0
    return difference.max().item() / scale if difference.numel() else 0.0


def errors(impl: Implementation, problem: Problem) -> dict[str, float]:
    tensors = inputs(problem)
    kept = [x.clone() for x in tensors]
    found, reference = answer(impl, problem, *tensors), dense_fp64(problem, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True)), "inputs were written to"
    tolerance = TOLERANCE[problem.dtype]
    worst = {name: largest_error(value, reference[name]) for name, value in found.items()}
    return {
        name: e for name, e in worst.items() if e > (max(tolerance, 1e-6) if name == "lse" else tolerance)
    }


def supported(impl: Implementation, problem: Problem) -> Problem:
    """The problem, or its forward alone where the backward is refused."""
    if impl.unsupported_reasons(problem, CPU):
        problem = problem.with_direction("fwd")
    if reasons := impl.unsupported_reasons(problem, CPU):
        pytest.skip("; ".join(reasons))
    return problem


@by_name
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(150, 150), (70, 200), (200, 70), (1, 130), (130, 1)], ids=str)
def test_masks_and_alignments(impl: Implementation, mask: str, lengths: tuple[int, int]) -> None:
    rows, keys = lengths
    problem = Problem(
        2, 4, rows, 16, kv_heads=2, seqlen_k=keys, dtype="fp32", mask=Mask.parse(mask), direction="fwd_bwd"
    )
    assert errors(impl, supported(impl, problem)) == {}


@by_name
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_dtypes_and_layouts(impl: Implementation, dtype: str, layout: str) -> None:
    problem = Problem(
        1,
        6,
        140,
        40,
        kv_heads=2,
        dtype=dtype,
        mask=Mask.causal(),
        direction="fwd_bwd",
        layout=layout,
        scale=0.3,
    )
    assert errors(impl, supported(impl, problem)) == {}


@by_name
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (33, 33), (16, 48), (256, 256)])
def test_head_dims(impl: Implementation, head_dim: int, head_dim_v: int) -> None:
    problem = Problem(1, 2, 65, head_dim, head_dim_v=head_dim_v, dtype="fp32", direction="fwd_bwd")
    assert errors(impl, supported(impl, problem)) == {}


@by_name
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=["batch", "seqlen_q", "seqlen_k"])
def test_nothing_to_do(impl: Implementation, shape: tuple[int, int, int]) -> None:
    batch, rows, keys = shape
    problem = Problem(batch, 2, rows, 8, seqlen_k=keys, dtype="fp32", mask=Mask.causal(), direction="fwd_bwd")
    assert errors(impl, supported(impl, problem)) == {}


@by_name
def test_rows_that_see_nothing(impl: Implementation) -> None:
    problem = Problem(1, 2, 9, 8, seqlen_k=4, dtype="fp32", mask=Mask.causal(), direction="fwd_bwd")
    found = answer(impl, supported(impl, problem), *inputs(problem))
    assert (found["out"][:, :5] == 0).all()
    assert (found["dq"][:, :5] == 0).all()
    assert all(x.isfinite().all() for name, x in found.items() if name != "lse")
    if "lse" in found:
        assert (found["lse"][..., :5] == -math.inf).all()


@by_name
def test_the_comparison_sees_a_mask_off_by_one(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1, 2, 70, 16, dtype="fp32", mask=Mask.causal(), direction="fwd_bwd")
    wrong = dataclasses.replace(problem, mask=Mask.window(None, 1))
    prepare = type(impl).prepare
    monkeypatch.setattr(type(impl), "prepare", lambda self, _, device: prepare(self, wrong, device))
    assert set(errors(impl, problem)) >= {"out", "dq", "dk", "dv"}


bands = st.builds(
    Mask.window,
    st.none() | st.integers(0, 60),
    st.none() | st.integers(0, 60),
    st.sampled_from(["bottom_right", "top_left"]),
)
block_patterns = st.sampled_from(
    [None, *(Mask.parse(text).blocks for text in ("blocks(strided,8x24,density=0.4)", MASKS[-2]))]
)


@pytest.mark.parametrize("impl", [tiled.fa1, tiled.fa2], ids=lambda impl: impl.name)
@given(
    rows=st.integers(0, 90),
    keys=st.integers(0, 90),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    head_dim=st.integers(1, 9),
    head_dim_v=st.integers(1, 9),
    band=bands,
    blocks=block_patterns,
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tiled_on_any_problem(impl, rows, keys, heads, head_dim, head_dim_v, band, blocks) -> None:
    problem = Problem(
        1,
        heads[0],
        rows,
        head_dim,
        kv_heads=heads[1],
        seqlen_k=keys,
        head_dim_v=head_dim_v,
        dtype="fp64",
        mask=dataclasses.replace(band, blocks=blocks),
        direction="fwd_bwd",
    )
    small_tiles = dict.fromkeys(tiling.BLOCK, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "BLOCK", small_tiles)
        patch.setattr(tiling, "SMALLEST_BLOCK", 16)
        assert errors(impl, problem) == {}


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result held."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def largest_tensor(impl: Implementation, seqlen: int, mask: str) -> int:
    problem = Problem(1, 1, seqlen, 4, dtype="fp32", mask=Mask.parse(mask), direction="fwd_bwd")
    q, k, v, dout = inputs(problem)
    with LargestTensor() as seen:
        answer(impl, problem, q, k, v, dout)
    return seen.elements


@pytest.mark.parametrize("impl", [tiled.fa1, tiled.fa2], ids=lambda impl: impl.name)
@pytest.mark.parametrize("mask", ["causal", "blocks(random,64x64,density=0.1)"])
def test_tiled_memory_is_linear(impl: Implementation, mask: str) -> None:
    seqlen = 1024
    tile = tiling.BLOCK["cpu"] ** 2
    assert largest_tensor(impl, seqlen, mask) <= max(tile, 4 * seqlen)
    assert largest_tensor(standard.Standard(), seqlen, mask) >= seqlen**2  # the record sees a quadratic one


@pytest.mark.parametrize("impl", [tiled.fa1, tiled.fa2], ids=lambda impl: impl.name)
def test_tiled_skips_hidden_tiles(impl: Implementation) -> None:
    tiles = tiling.Tiles.of(Problem(1, 1, 1024, 8, mask=Mask.window(64, 0)), torch.device("cpu"))
    assert tiles.visible.shape == (8, 8)
    assert tiles.visible.sum() == 8 + 7
    causal = tiling.Tiles.of(Problem(1, 1, 1024, 8, mask=Mask.causal()), torch.device("cpu"))
    assert causal.whole.sum() == 7 * 8 // 2  # below the diagonal no pair is compared with a bound


@pytest.mark.parametrize("impl", [tiled.fa1, tiled.fa2], ids=lambda impl: impl.name)
def test_tiled_refuses_a_double_backward(impl: Implementation) -> None:
    problem = Problem(1, 1, 5, 4, dtype="fp64", direction="fwd_bwd")
    q, k, v, _ = inputs(problem)
    out = impl.prepare(problem, CPU).attend(q.requires_grad_(), k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        (out.sum() + dq.pow(2).sum()).backward()
