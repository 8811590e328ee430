"""A kernel family as the harness sees it: what every `flash_attention` here declines, and how it is prepared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from attnbench.harness.contract import Device, Dropout, Implementation, Prepared

if TYPE_CHECKING:
    from attnbench.harness.problem import Problem
    from attnbench.impls.flash_api.block_mask import BlockMask


class FlashPlugin(Implementation):
    """A `flash_attention` with the arguments of `flash_api.attend`."""

    contract = 1
    deterministic = False

    @abstractmethod
    def attention(self) -> Callable[..., Any]:
        """The public function, imported when it is asked for."""

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

    def repeats(self, device: Device) -> tuple[str, ...]:
        return ("fwd", "bwd") if self.deterministic else super().repeats(device)

    def dropout_effective(self, p: float) -> Dropout:
        from attnbench.impls.flash_api.dropout import dropout_effective_p

        effective = dropout_effective_p(p)
        return Dropout(effective, 1 / (1 - effective))

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        mask = problem.mask
        attend = partial(
            self.attention(),
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

    from attnbench.impls.flash_api.block_mask import BlockMask

    pattern = problem.mask.blocks
    if pattern is None:
        return None
    visible = pattern.blocks(problem.heads, problem.seqlen_q, problem.seqlen_k)
    blocks = torch.tensor(visible, device=str(device))
    return BlockMask.from_dense(blocks[None], (pattern.block_q, pattern.block_k))
