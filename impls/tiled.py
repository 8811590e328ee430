"""FlashAttention's tiled algorithms in plain torch, on any device, in memory linear in the sequence length.

The algorithms themselves, which need torch to be defined at all, are in ``algorithms.flash_attention``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.contract import Capabilities, Device, Implementation, Modelled, Prepared
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.harness.problem import DTYPES, Problem
from attnbench.harness.two_level import TwoLevelMemory

if TYPE_CHECKING:
    import torch

    from attnbench.harness.contract import AttendWithLse
    from attnbench.impls.algorithms.tiles import Tiles

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
        dropout=True,
        repeats=("fwd", "bwd"),
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
        if device.kind == "cuda" and problem.dropout_p:
            found.append("dropout on a GPU draws its seed on the host, which a CUDA graph would keep")
        return found

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        import torch

        from attnbench.impls.algorithms.tiles import Tiles

        tiles = Tiles.of(problem, torch.device(str(device)))
        attend_with_lse = self._attend_with_lse(tiles, tiles)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_with_lse(q, k, v)[0]

        return Prepared(attend, attend_with_lse)

    def modelled(self, problem: Problem, memory: TwoLevelMemory) -> Modelled | None:
        """The block that stays is as large as the paper makes it: of K and V; of Q in FlashAttention-2's forward. None
        with dropout: its two passes have tiles of different sizes, and a mask is drawn tile by tile."""
        if problem.dropout_p:
            return None
        import torch

        from attnbench.impls.algorithms import closed_forms
        from attnbench.impls.algorithms.tiles import Tiles

        stays, streams = memory.block_rows(max(problem.head_dim, problem.head_dim_v))
        of_keys, of_rows = (streams, stays), (stays, streams)  # rows of Q and of K in a tile
        if self.algorithm == "fa1":
            first, moved = of_keys, closed_forms.flash_attention_1_forward(problem, of_keys)
            moved_back = closed_forms.flash_attention_1_backward(problem, of_keys)
        else:
            first, moved = of_rows, closed_forms.flash_attention_2_forward(problem, of_rows)
            moved_back = closed_forms.flash_attention_2_backward(problem, of_keys)
        tiles, backward_tiles = (
            Tiles.of(problem, torch.device("cpu"), block, memory) for block in (first, of_keys)
        )
        attend_with_lse = self._attend_with_lse(tiles, backward_tiles)
        return Modelled(lambda q, k, v: attend_with_lse(q, k, v)[0], moved, moved_back)

    def _attend_with_lse(self, tiles: Tiles, backward_tiles: Tiles) -> AttendWithLse:
        from attnbench.impls.algorithms.flash_attention import FlashAttention1, FlashAttention2

        function = {"fa1": FlashAttention1, "fa2": FlashAttention2}[self.algorithm]
        return lambda q, k, v: function.apply(q, k, v, tiles, backward_tiles)


fa1 = Tiled("fa1", "FlashAttention's loop order in plain torch: K/V outside, O normalised at each step")
fa2 = Tiled("fa2", "FlashAttention-2's loop order in plain torch: Q outside, O normalised once")
