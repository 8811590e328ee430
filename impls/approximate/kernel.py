"""Kernel attention: exp(q k) replaced by phi(q) phi(k), so that keys and values are summed once for all queries.

linear: phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236).
performer: positive random features of the softmax kernel (Choromanski et al. 2020, FAVOR+, arXiv 2009.14794).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attnbench.harness.problem import Problem
from attnbench.impls.approximate.base import SEED, Approximation, Attention

if TYPE_CHECKING:
    import torch

FEATURES = 256
CHUNK = 128
"""Causal sums go chunk by chunk: what came before a chunk as one sum, the chunk itself as a masked product."""


def linear_attention(problem: Problem, device: torch.device) -> Attention:
    from torch.nn.functional import elu

    def features(x: torch.Tensor) -> torch.Tensor:
        return elu(x) + 1

    return _kernel_attention(problem, features, features)


def performer_attention(problem: Problem, device: torch.device) -> Attention:
    import torch

    size = problem.head_dim
    generator = torch.Generator().manual_seed(SEED)
    rows: list[torch.Tensor] = []
    for _ in range(
        -(-FEATURES // size)
    ):  # blocks of orthogonal directions with the lengths of normal vectors
        normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
        lengths = torch.randn(size, size, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        rows.append(torch.linalg.qr(normal).Q * lengths)
    directions = torch.cat(rows)[:FEATURES].to(device)
    half = problem.softmax_scale**0.5

    def exponent(x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * half
        return x @ directions.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2

    # The largest exponent cancels in the ratio: of each query alone, but of all keys together. Features stay wide, for
    # small ones have gradients beyond fp16.
    def of_queries(x: torch.Tensor) -> torch.Tensor:
        e = exponent(x)
        return (e - e.amax(-1, keepdim=True).detach()).exp()

    def of_keys(x: torch.Tensor) -> torch.Tensor:
        e = exponent(x)
        return (e - e.amax((-2, -1), keepdim=True).detach()).exp()

    return _kernel_attention(problem, of_queries, of_keys)


def _kernel_attention(
    problem: Problem,
    of_queries: Callable[[torch.Tensor], torch.Tensor],
    of_keys: Callable[[torch.Tensor], torch.Tensor],
) -> Attention:
    """out = phi(q) sum(phi(k)^T v) / phi(q) sum(phi(k)); a column of ones beside v makes the divisor come along."""
    import torch
    from torch.nn.functional import pad

    tiny = 1e-6
    causal = problem.mask.right == 0

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, values = of_queries(q), of_keys(k), pad(v, (0, 1), value=1.0)
        wide = torch.promote_types(v.dtype, torch.float32)  # sums over all keys
        both = _causal(q, k, values, wide) if causal else q.to(wide) @ (k.mT.to(wide) @ values.to(wide))
        return (both[..., :-1] / (both[..., -1:] + tiny)).to(v.dtype)

    def _causal(q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        n = q.shape[2]
        missing = -n % CHUNK
        q, k, values = (pad(x, (0, 0, 0, missing)).to(wide).unflatten(2, (-1, CHUNK)) for x in (q, k, values))
        sums = k.mT @ values
        before = sums.cumsum(dim=2) - sums
        inside = (q @ k.mT).tril() @ values
        return (q @ before + inside).flatten(2, 3)[:, :, :n]

    return attend


linear = Approximation(
    "linear", "elu(x) + 1 as the kernel's feature map", linear_attention, ("full", "causal")
)
performer = Approximation(
    "performer",
    f"{FEATURES} positive random features of the softmax kernel",
    performer_attention,
    ("full", "causal"),
)
