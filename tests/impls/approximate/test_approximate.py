"""Each approximation against its own definition written densely, and against exact attention where it must be exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnbench.harness.contract import Device, Implementation
from attnbench.harness.masks import Mask
from attnbench.harness.oracle.inputs import torch_dtype
from attnbench.harness.problem import Problem
from attnbench.impls.approximate import bigbird, kernel, linformer, local, lsh, sparsified

CPU = Device("cpu")
METHODS = [
    local.local, linformer.linformer, kernel.linear, kernel.performer, lsh.lsh, bigbird.bigbird, sparsified.butterfly,
]  # fmt: skip
by_name = pytest.mark.parametrize("impl", METHODS, ids=lambda impl: impl.name)


def problem_of(seqlen: int, *, causal: bool = False, dtype: str = "fp64", head_dim: int = 8) -> Problem:
    mask = Mask.causal() if causal else Mask.full()
    return Problem(2, 3, seqlen, head_dim, dtype=dtype, mask=mask, direction="fwd_bwd")


def inputs(problem: Problem) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    dtype = torch_dtype(problem.dtype)
    shape = problem.q_shape
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def answer(impl: Implementation, problem: Problem) -> Tensor:
    assert impl.unsupported_reasons(problem, CPU) == []
    return impl.prepare(problem, CPU).attend(*inputs(problem))


def seen_only(problem: Problem, visible: Tensor) -> Tensor:
    """Exact attention over the pairs that ``visible`` (rows, keys) allows, and the problem's mask with it."""
    q, k, v = inputs(problem)
    n = problem.seqlen_q
    visible = visible & problem.mask.dense(torch.arange(n), 1, n, n)[0]
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.softmax_scale
    p = s.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def everything(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool)


def blocks_of(chosen: Tensor, size: int, n: int) -> Tensor:
    """Visibility of pairs from the blocks of keys that each block of queries sees."""
    grid = torch.zeros(len(chosen), len(chosen), dtype=torch.bool)
    for i, row in enumerate(chosen.tolist()):
        grid[i, [j for j in row if j >= 0]] = True
    return grid.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :n]


# ---- where nothing is left out, nothing is wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("impl", "seqlen"),
    [
        (local.local, 129), (linformer.linformer, 256), (lsh.lsh, 64), (bigbird.bigbird, 192),
        (sparsified.butterfly, 256),
    ],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_exact_while_all_keys_are_within_reach(impl: Implementation, seqlen: int, causal: bool) -> None:
    problem = problem_of(seqlen, causal=causal)
    if causal and "causal" not in impl.capabilities.masks:
        assert impl.unsupported_reasons(problem, CPU) == ["mask causal not in full"]
        return
    torch.testing.assert_close(answer(impl, problem), seen_only(problem, everything(seqlen)))


# ---- each is what it says it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [300, 512, 131])
@pytest.mark.parametrize("causal", [False, True])
def test_local_sees_its_window(seqlen: int, causal: bool) -> None:
    problem = problem_of(seqlen, causal=causal)
    i = torch.arange(seqlen)
    within = (i[:, None] - i).abs() <= local.WINDOW
    torch.testing.assert_close(answer(local.local, problem), seen_only(problem, within))


@pytest.mark.parametrize("seqlen", [300, 512])
def test_bigbird_sees_its_blocks_and_the_first_sees_all(seqlen: int) -> None:
    problem = problem_of(seqlen)
    chosen = bigbird._chosen_blocks(-(-seqlen // bigbird.BLOCK), causal=False)
    visible = blocks_of(chosen, bigbird.BLOCK, seqlen)
    visible[: bigbird.BLOCK] = True
    assert 0.1 < visible.double().mean() < 0.95
    torch.testing.assert_close(answer(bigbird.bigbird, problem), seen_only(problem, visible))


def test_bigbird_sees_nothing_ahead_under_a_causal_mask() -> None:
    problem = problem_of(450, causal=True)
    chosen = bigbird._chosen_blocks(-(-450 // bigbird.BLOCK), causal=True)
    assert (chosen <= torch.arange(len(chosen))[:, None]).all()
    visible = blocks_of(chosen, bigbird.BLOCK, 450)
    torch.testing.assert_close(answer(bigbird.bigbird, problem), seen_only(problem, visible))


def test_linformer_averages_spans_of_keys() -> None:
    problem = problem_of(2 * linformer.RANK)
    q, k, v = inputs(problem)
    k, v = (x.unflatten(1, (-1, 2)).mean(2) for x in (k, v))
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.softmax_scale).softmax(-1)
    torch.testing.assert_close(answer(linformer.linformer, problem), torch.einsum("bhqk,bkhd->bqhd", p, v))


@pytest.mark.parametrize("causal", [False, True])
def test_linear_is_its_kernel_written_out(causal: bool) -> None:
    problem = problem_of(300, causal=causal)
    q, k, v = inputs(problem)
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k)
    weights = weights.tril() if causal else weights
    right = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(answer(kernel.linear, problem), right, rtol=1e-5, atol=1e-5)


def test_performer_nears_exact_attention_with_more_features(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(200)
    exact, errors = seen_only(problem, everything(200)), []
    for features in (16, 256, 4096):
        monkeypatch.setattr(kernel, "FEATURES", features)
        errors.append((answer(kernel.performer, problem) - exact).abs().mean().item())
    assert errors[0] > 1.4 * errors[1] > 1.4 * 1.4 * errors[2]


def test_lsh_finds_the_near_key_among_many() -> None:
    """Every query equals one key at another place, and far from the others: hashing brings them together."""
    n = 1024
    problem = problem_of(n, head_dim=32)
    generator = torch.Generator().manual_seed(0)
    k = 12 * torch.nn.functional.normalize(
        torch.randn(2, n, 3, 32, generator=generator, dtype=torch.float64), dim=-1
    )
    order = torch.randperm(n, generator=generator)
    v = torch.arange(n, dtype=torch.float64).view(1, n, 1, 1).expand(2, n, 3, 32)
    out = lsh.lsh.prepare(problem, CPU).attend(k[:, order], k, v)
    found = (out[..., 0] - order.view(1, n, 1)).abs() < 0.05 * n
    assert found.double().mean() > 0.6  # by chance: two rounds of 128 keys in 1024


def test_butterfly_is_exact_attention_over_its_blocks() -> None:
    problem = problem_of(1024)
    grid = torch.tensor(sparsified.BUTTERFLY.blocks(1, 1024, 1024))[0]
    visible = grid.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert visible.double().mean() == pytest.approx(0.5)
    torch.testing.assert_close(answer(sparsified.butterfly, problem), seen_only(problem, visible))


# ---- what every one of them must do ------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", [1, 63, 200])
def test_gradients_are_finite_and_hidden_keys_get_none(
    impl: Implementation, causal: bool, seqlen: int
) -> None:
    problem = problem_of(seqlen, causal=causal, dtype="fp32")
    if impl.unsupported_reasons(problem, CPU):
        assert causal
        return
    leaves = [x.requires_grad_() for x in inputs(problem)]
    out = impl.prepare(problem, CPU).attend(*leaves)
    assert out.shape == problem.out_shape
    assert out.dtype == leaves[0].dtype
    grads = torch.autograd.grad(out[:, 0].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    if causal:  # the first row sees the first key alone
        assert (grads[2][:, 1:] == 0).all()


@by_name
def test_gradients_are_finite_in_fp16(impl: Implementation) -> None:
    causal = "causal" in impl.capabilities.masks
    problem = problem_of(1024, causal=causal, dtype="fp16", head_dim=64)
    leaves = [x.requires_grad_() for x in inputs(problem)]
    out = impl.prepare(problem, CPU).attend(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(tensor.isfinite().all() for tensor in (out, *grads))


@by_name
def test_low_precision_stays_near_high(impl: Implementation) -> None:
    low, high = (
        answer(impl, problem_of(300, dtype="bf16")).double(),
        answer(impl, problem_of(300, dtype="fp32")),
    )
    limit = (
        0.5 if impl.name == "lsh" else 0.05
    )  # where rounding moves a key to another bucket, the answer moves
    assert (low - high).abs().mean() < limit * high.abs().mean()


@by_name
def test_cross_attention_and_grouped_heads_are_refused(impl: Implementation) -> None:
    cross = Problem(1, 2, 64, 8, seqlen_k=128, dtype="fp32")
    if impl is not sparsified.butterfly:
        assert impl.unsupported_reasons(cross, CPU)
        assert impl.unsupported_reasons(Problem(1, 2, 64, 8, kv_heads=1, dtype="fp32"), CPU)
    assert impl.unsupported_reasons(Problem(1, 2, 64, 8, dtype="fp32", mask=Mask.window(3, 3)), CPU)
