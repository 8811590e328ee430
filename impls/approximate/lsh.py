"""LSH attention: queries and keys that a random rotation puts near each other meet (Kitaev et al. 2020, Reformer,
arXiv 2001.04451).

Reformer ties queries to keys; here both are hashed and sorted by bucket, and each chunk of sorted queries meets the
chunk of sorted keys at its place and the one before. Rounds are merged by their sums, so a key met twice counts twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.problem import Problem
from attnbench.impls.approximate.base import SEED, Approximation, Attention

if TYPE_CHECKING:
    import torch

ROUNDS = 2
CHUNK = 64


def lsh_attention(problem: Problem, device: torch.device) -> Attention:
    import torch
    from torch.nn.functional import pad

    from attnbench.impls.algorithms.online_softmax import Rows, merge, of_tile

    n, size = problem.seqlen_k, problem.head_dim
    chunks = -(-n // CHUNK)
    buckets = 2 * max(1, chunks // 2)
    generator = torch.Generator().manual_seed(SEED)
    rotations = torch.randn(ROUNDS, size, buckets // 2, generator=generator).to(device)

    def places(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """Positions (b, h, n) in order of bucket, earlier positions first within one."""
        turned = x.detach().float() @ rotation
        # The largest of turned and -turned, without the two side by side: 34 GB at 64k tokens.
        farthest = turned.abs().argmax(dim=-1, keepdim=True)
        opposite = turned.gather(-1, farthest) < 0
        bucket = (farthest + turned.shape[-1] * opposite).squeeze(-1)
        return bucket.argsort(dim=-1, stable=True)

    def chunked(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        found = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3]))
        return pad(found, (0, 0, 0, chunks * CHUNK - n)).unflatten(2, (chunks, CHUNK))

    def with_the_one_before(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.roll(1, dims=2), x], dim=3)

    def in_chunks(order: torch.Tensor) -> torch.Tensor:
        """Positions by chunk, -1 where a chunk is padded."""
        return pad(order, (0, chunks * CHUNK - n), value=-1).unflatten(2, (chunks, CHUNK))

    def one_round(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotation: torch.Tensor) -> Rows:
        of_q, of_k = places(q, rotation), places(k, rotation)
        keys, values = with_the_one_before(chunked(k, of_k)), with_the_one_before(chunked(v, of_k))
        row, key = in_chunks(of_q)[..., None], with_the_one_before(in_chunks(of_k)[..., None]).mT
        hidden = (key < 0) | (key > row) if problem.mask.right == 0 else key < 0
        s = (chunked(q, of_q) @ keys.mT * problem.softmax_scale).float().masked_fill(hidden, float("-inf"))
        sorted_rows = of_tile(s, lambda p: (p.to(v.dtype) @ values).float())
        back = of_q.argsort(dim=-1)[..., None]
        return Rows(
            *(x.flatten(2, 3)[:, :, :n].gather(2, back.expand(-1, -1, -1, x.shape[-1])) for x in sorted_rows)
        )

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = one_round(q, k, v, rotations[0])
        for rotation in rotations[1:]:
            rows = merge(rows, one_round(q, k, v, rotation))
        return rows.finish()[0].to(v.dtype)

    return attend


lsh = Approximation(
    "lsh", f"{ROUNDS} rounds of hashing into chunks of {CHUNK}", lsh_attention, ("full", "causal")
)
