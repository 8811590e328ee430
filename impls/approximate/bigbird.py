"""BigBird: a block seen by all, a window of blocks, some blocks at random (Zaheer et al. 2020, arXiv 2007.14062).

Blocks of queries gather their blocks of keys, so the cost is that of the blocks that are seen. The first block sees all
keys, and all queries see it. Under a causal mask, blocks are drawn from those before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.problem import Problem
from attnbench.impls.approximate.base import SEED, Approximation, Attention

if TYPE_CHECKING:
    import torch

BLOCK = 64
RANDOM = 1


def bigbird_attention(problem: Problem, device: torch.device) -> Attention:
    import torch
    from torch.nn.functional import pad

    n = problem.seqlen_k
    blocks = -(-n // BLOCK)
    causal = problem.mask.right == 0
    chosen = _chosen_blocks(blocks, causal).to(device)  # (blocks, seen), -1 for none
    keys = chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)
    keys = keys.masked_fill(chosen[:, :, None] < 0, -1).flatten(1)[:, None]
    rows = torch.arange(blocks * BLOCK, device=device).view(blocks, BLOCK, 1)
    seen = (keys >= 0) & (keys < n)
    if causal:
        seen = seen & (keys <= rows)
    hidden = ~(seen | (rows >= n))

    def in_blocks(x: torch.Tensor) -> torch.Tensor:
        return pad(x, (0, 0, 0, blocks * BLOCK - n)).unflatten(2, (blocks, BLOCK))

    def gathered(x: torch.Tensor) -> torch.Tensor:
        return in_blocks(x)[:, :, chosen.clamp(min=0)].flatten(3, 4)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = (in_blocks(q) @ gathered(k).mT * problem.softmax_scale).masked_fill(hidden, float("-inf"))
        out = (s.softmax(dim=-1) @ gathered(v)).flatten(2, 3)[:, :, :n]
        if causal:  # the first block sees itself alone, as gathered
            return out
        first = (q[:, :, :BLOCK] @ k.mT * problem.softmax_scale).softmax(dim=-1) @ v
        return torch.cat([first, out[:, :, BLOCK:]], dim=2)

    return attend


def _chosen_blocks(blocks: int, causal: bool) -> torch.Tensor:
    """Blocks of keys that each block of queries sees, each once, padded with -1."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for i in range(blocks):
        window = {i - 1, i} if causal else {i - 1, i, i + 1}
        seen = {0, *(j for j in window if 0 <= j < blocks)}
        others = [j for j in range(i if causal else blocks) if j not in seen]
        draw = torch.randperm(len(others), generator=generator)[:RANDOM]
        rows.append(sorted(seen | {others[j] for j in draw.tolist()}))
    widest = max(map(len, rows))
    return torch.tensor([row + [-1] * (widest - len(row)) for row in rows])


bigbird = Approximation(
    "bigbird", f"blocks of {BLOCK}: the first, a window of three, {RANDOM} at random", bigbird_attention,
    ("full", "causal"),
)  # fmt: skip
