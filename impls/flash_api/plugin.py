"""A kernel family as the harness sees it: what every `flash_attention` here declines, and how it is prepared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from attnbench.harness.contract import Device, Dropout, Implementation, Prepared, Unavailable
from attnbench.impls.flash_api.scale import LARGEST_SCALE, SMALLEST_SCALE

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

    def unavailable(self, device: Device) -> Unavailable | None:
        """No problem at all is computed on a device whose compute capability is outside of what is declared."""
        low, high = self.capabilities.compute_capability
        if device.kind == "cuda" and not low <= device.capability <= high:
            name = f"{device.name or device} has compute capability {_dotted(device.capability)}"
            return Unavailable(f"{name}, its kernels are for {_dotted(low)} to {_dotted(high)}")
        return super().unavailable(device)

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = self.capabilities.reasons(problem, device)
        found += [
            f"{name} {getattr(problem, name)} is below 16"
            for name in ("head_dim", "head_dim_v")
            if getattr(problem, name) < 16
        ]
        scale = problem.softmax_scale
        if scale <= 0:
            found.append(f"scale {scale:g} is not positive")
        elif not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            found.append(f"scale {scale:g} does not lie in {SMALLEST_SCALE:.3g} to {LARGEST_SCALE:.3g}")
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
    # Blocks outside the band are not visited, and those wholly inside need no mask, as FlexAttention's lists have it.
    size = pattern.block_q, pattern.block_k
    tiles = problem.mask.tiles(problem.heads, problem.seqlen_q, problem.seqlen_k, *size)
    visible, whole = (torch.tensor(x, device=str(device))[None] for x in tiles)
    return BlockMask.from_dense(visible, size, full=whole)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
