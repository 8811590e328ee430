"""Judge an attention function against fp64, for the project's own kernels: problems, references, poisoned memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that what a kernel leaves unwritten shows; let masked infinities
    be silent."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Problem:
    """Random BSHD inputs and what the attention of them is, by the formulas, in fp64."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor  # bool, broadcasts to (batch, heads, seqlen_q, seqlen_k)
    scale: float

    def attention(
        self, dtype: torch.dtype, keep: Tensor | None = None, keep_probability: float = 1.0
    ) -> list[Tensor]:
        """out, lse, dq, dk, dv computed densely in dtype by autograd, for upstream gradients `d_out` and `d_lse`."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        group = q.shape[2] // k.shape[2]
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * self.scale
        scores = scores.masked_fill(~self.visible, float("-inf"))
        some = self.visible.expand(scores.shape).any(-1)
        lse = torch.logsumexp(scores.float() if dtype != torch.float64 else scores, -1)
        p = torch.exp(scores - torch.where(some, lse, 0.0)[..., None]).to(dtype)
        if keep is not None:
            p = p * keep / keep_probability
        out = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(group, 2))
        total = (out * self.d_out.to(out.dtype)).sum() + torch.where(some, lse * self.d_lse, 0.0).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(total, (q, k, v))]

    def __post_init__(self) -> None:
        batch, seqlen_q, heads, _ = self.q.shape
        self.d_out = torch.randn(batch, seqlen_q, heads, self.v.shape[3], device=DEVICE).to(self.q.dtype)
        self.d_lse = torch.randn(batch, heads, seqlen_q, device=DEVICE)

    def run(self, attend: Callable[..., tuple[Tensor, Tensor]], **options: object) -> list[Tensor]:
        """out, lse, dq, dk, dv of the function under test."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        out, lse = attend(q, k, v, return_lse=True, **options)
        grads = torch.autograd.grad((out, lse), (q, k, v), (self.d_out, self.d_lse))
        return [out.detach(), lse.detach(), *grads]


NAMES = ("out", "lse", "dq", "dk", "dv")


def errors_of(got: list[Tensor], reference: list[Tensor], eager: list[Tensor]) -> list[str]:
    """What is wrong: max |got - ref| > 2 max |eager - ref| + atol, for each result; empty if nothing."""
    wrong = []
    for name, x, ref, near in zip(NAMES[: len(got)], got, reference, eager, strict=True):
        infinite = ref == float("-inf")
        if not torch.equal(x == float("-inf"), infinite):
            wrong.append(f"{name}: -inf in the wrong places")
        x, ref, near = (torch.where(infinite, 0.0, y.double()) for y in (x, ref, near))  # noqa: PLW2901
        if x.numel() == 0:
            continue
        # fp32 products cancel in dS; its atol also covers sums of a few terms, where eager can be exact by luck.
        eps = 4e-6 if got[0].dtype == torch.float32 or name == "lse" else torch.finfo(got[0].dtype).eps
        budget = 2 * (near - ref).abs().max().item() + 4 * eps * max(1.0, ref.abs().max().item())
        error = (x - ref).abs().max().item()
        if not error <= budget:
            wrong.append(f"{name}: error {error:.3g} > {budget:.3g}")
    return wrong


@pytest.fixture
def errors() -> Callable[..., list[str]]:
    """`errors_of`, for functions that `wrong` cannot run."""
    return errors_of


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def make() -> Callable[..., Problem]:
    """Make a Problem from sizes and a band written out independently of the code under test."""

    def build(
        seqlen_q: int, seqlen_k: int, heads: int = 1, kv_heads: int | None = None, head_dim: int = 16,
        head_dim_v: int | None = None, *, batch: int = 1, dtype: torch.dtype = torch.float16, shift: int | None = None,
        left: int | None = None, right: int | None = None, blocks: Tensor | None = None, scale: float | None = None,
    ) -> Problem:  # fmt: skip
        kv_heads, head_dim_v = kv_heads or heads, head_dim_v or head_dim
        shift = seqlen_k - seqlen_q if shift is None else shift
        i = torch.arange(seqlen_q, device=DEVICE)[:, None] + shift
        j = torch.arange(seqlen_k, device=DEVICE)[None, :]
        seen = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool, device=DEVICE)
        if left is not None:
            seen = seen & (j >= i - left)
        if right is not None:
            seen = seen & (j <= i + right)
        if blocks is not None:
            seen = seen & blocks
        shapes = (
            (seqlen_q, heads, head_dim),
            (seqlen_k, kv_heads, head_dim),
            (seqlen_k, kv_heads, head_dim_v),
        )
        q, k, v = (torch.randn(batch, *s, device=DEVICE).to(dtype) for s in shapes)
        return Problem(q, k, v, seen, scale or 1 / math.sqrt(head_dim))

    return build


@pytest.fixture
def wrong() -> Callable[..., list[str]]:
    """Judge a function on a Problem, or on one with dropout of a known mask: the list of what is wrong."""

    def judge(
        problem: Problem, attend: Callable[..., tuple[Tensor, Tensor]], *,
        dropped: tuple[Tensor, float] | tuple[()] = (), **options: object,
    ) -> list[str]:  # fmt: skip
        eager = problem.attention(problem.q.dtype, *dropped)
        return errors_of(problem.run(attend, **options), problem.attention(torch.float64, *dropped), eager)

    return judge
