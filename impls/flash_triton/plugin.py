"""The project's Triton FlashAttention as the harness sees it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from attnbench.harness.contract import (
    Capabilities,
    Device,
    Implementation,
    Prepared,
    Unavailable,
    missing_module,
)
from attnbench.harness.masks import ALIGNMENTS, KINDS

if TYPE_CHECKING:
    from attnbench.harness.problem import Problem
    from attnbench.impls.flash_api import BlockMask


class FlashTriton(Implementation):
    """`attnbench.impls.flash_triton.flash_attention`; with ``deterministic``, gradients repeat bit for bit."""

    contract = 1
    compile_processes = 3  # a configuration compiles for seconds, into Triton's cache on disk
    capabilities = Capabilities(
        compute_capability=((8, 0), (99, 9)),
        dtypes=("fp16", "bf16", "fp32"),
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_multiple=8,
        max_head_dim=256,
        head_dim_v_differs=True,
        dropout=True,
        min_seqlen=0,
    )

    def __init__(self, name: str = "flash-triton", deterministic: bool = False) -> None:
        self.name = name
        self.deterministic = deterministic
        self.summary = "the project's FlashAttention in Triton" + (", deterministic" if deterministic else "")

    def unavailable(self, device: Device) -> Unavailable | None:
        return super().unavailable(device) or missing_module("triton", "pip install triton")

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = self.capabilities.reasons(problem, device)
        found += [
            f"{name} {getattr(problem, name)} is below 16"
            for name in ("head_dim", "head_dim_v")
            if getattr(problem, name) < 16
        ]
        if problem.softmax_scale <= 0:
            found.append(f"scale {problem.softmax_scale:g} is not positive")
        blocks = problem.mask.blocks
        if blocks and (blocks.block_q % 32 or blocks.block_k % 32):
            found.append(f"mask blocks {blocks.block_q}x{blocks.block_k} are not multiples of 32")
        return found

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        from attnbench.impls.flash_triton import flash_attention

        mask = problem.mask
        attend: Any = partial(
            flash_attention,
            window=(mask.left, mask.right),
            alignment=mask.alignment,
            dropout_p=problem.dropout_p,
            block_mask=_block_mask(problem, device),
            scale=problem.softmax_scale,
            deterministic=self.deterministic,
        )
        return Prepared(attend, partial(attend, return_lse=True))


def _block_mask(problem: Problem, device: Device) -> BlockMask | None:
    import torch

    from attnbench.impls.flash_api import BlockMask

    pattern = problem.mask.blocks
    if pattern is None:
        return None
    visible = pattern.blocks(problem.heads, problem.seqlen_q, problem.seqlen_k)
    blocks = torch.tensor(visible, device=str(device))
    return BlockMask.from_dense(blocks[None], (pattern.block_q, pattern.block_k))


# Not an entry point: it differs from FlashTriton only where the Hopper backward, off until it is proven, would run.
deterministic = FlashTriton("flash-triton-deterministic", deterministic=True)
