"""FlashAttention's tiled algorithms in plain torch, on any device, in memory linear in the sequence length.

The algorithms themselves, which need torch to be defined at all, are in ``tiled_algorithms``.
"""

from __future__ import annotations

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.harness.problem import DTYPES, Problem

MOST_CUDA_PAIRS = 4 * 10**9
"""Visible pairs beyond which a call on a GPU is refused. Every tile is a dozen launches that write their scores to
memory: 15 ns a thousand pairs forward on an H200 (head_dim 64), so a call would take 60 ms and more."""


class Tiled(Implementation):
    """FlashAttention (algorithm ``fa1``) or FlashAttention-2 (``fa2``) as their papers write them."""

    contract = 1
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_multiple=1,
        max_head_dim=65536,
        head_dim_v_differs=True,
        min_seqlen=0,
    )

    def __init__(self, algorithm: str, summary: str) -> None:
        self.name = f"tiled-{algorithm}"
        self.algorithm = algorithm
        self.summary = summary

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        if device.kind == "cuda" and problem.visible_pairs > MOST_CUDA_PAIRS:
            limit = f"{MOST_CUDA_PAIRS:.0e}"
            found.append(f"over {limit} visible pairs, plain torch takes longer on a GPU than it is worth")
        return found

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        import torch

        from attnbench.impls.tiled_algorithms import FlashAttention1, FlashAttention2, Tiles

        function = {"fa1": FlashAttention1, "fa2": FlashAttention2}[self.algorithm]
        tiles = Tiles.of(problem, torch.device(str(device)))

        def attend_with_lse(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return function.apply(q, k, v, tiles)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_with_lse(q, k, v)[0]

        return Prepared(attend, attend_with_lse)


fa1 = Tiled("fa1", "FlashAttention's loop order in plain torch: K/V outside, O normalised at each step")
fa2 = Tiled("fa2", "FlashAttention-2's loop order in plain torch: Q outside, O normalised once")
