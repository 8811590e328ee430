"""An exact kernel on fewer blocks: dense attention approximated by block-sparse FlashAttention.

The butterfly pattern is that of Dao et al. 2022 (arXiv 2205.14135, section 3.3): a fixed pattern, about log2 of the
number of blocks a row. The kernel comes from the registry: whichever implementation skips hidden blocks on the device.
"""

from __future__ import annotations

import dataclasses

from attnbench.harness import registry
from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared, Unavailable
from attnbench.harness.masks import BlockPattern
from attnbench.harness.problem import DTYPES, Problem

KERNEL = {"cuda": "flash-triton", "cpu": "tiled-fa2"}
BUTTERFLY = BlockPattern("butterfly", 128, 128)


class Sparsified(Implementation):
    """A full or causal problem with all but a pattern's blocks left out."""

    contract = 1
    capabilities = Capabilities(
        devices=("cpu", "cuda"), dtypes=DTYPES, masks=("full", "causal"), head_dim_multiple=1, max_head_dim=65536,
        head_dim_v_differs=True, alignments=("bottom_right", "top_left"),
    )  # fmt: skip

    def __init__(self, name: str, pattern: BlockPattern) -> None:
        self.name = name
        self.pattern = pattern
        self.summary = (
            f"block-sparse FlashAttention, {pattern.name} pattern of {pattern.block_q}x{pattern.block_k}"
        )

    def unavailable(self, device: Device) -> Unavailable | None:
        try:
            return self._kernel(device).unavailable(device)
        except registry.PluginError as error:
            return Unavailable(str(error))

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        return found or self._kernel(device).unsupported_reasons(self._sparse(problem), device)

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        return Prepared(self._kernel(device).prepare(self._sparse(problem), device).attend)

    def _kernel(self, device: Device) -> Implementation:
        return registry.load(KERNEL[device.kind])

    def _sparse(self, problem: Problem) -> Problem:
        return dataclasses.replace(problem, mask=dataclasses.replace(problem.mask, blocks=self.pattern))


butterfly = Sparsified("butterfly", BUTTERFLY)
