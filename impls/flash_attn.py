"""FlashAttention-2, -3 and -4 from their own packages.

All three take BSHD, grouped heads as they are, and bands aligned bottom right. FlashAttention-3 is taken from a full
build (``flash_attn_interface``) where there is one, else from the forward-only package ``fa3-fwd``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnbench.harness.contract import (
    Capabilities,
    Device,
    Dropout,
    Implementation,
    Prepared,
    Unavailable,
    missing_module,
)
from attnbench.harness.problem import Problem

if TYPE_CHECKING:
    import numpy as np
    import torch

BANDS = ("full", "causal", "window")


class FlashAttention(Implementation):
    """A ``flash_attn_func``: which module has it, and how it is told a window and asked for the lse.

    unbounded: the window side that means no limit. lse_option: the argument that makes it return the lse.
    """

    contract = 1
    module: str
    unbounded: int | None = -1
    lse_option = "return_attn_probs"

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        if problem.batch == 0:
            found.append("batch 0 is not supported")
        return found

    def has_lse(self, problem: Problem) -> bool:
        """Whether the lse it returns follows the contract for every row of the problem."""
        return True

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        self.require(problem, device)
        flash_attn_func = importlib.import_module(self.module).flash_attn_func
        options = self._options(problem) | self._blocks(problem, device)
        with_lse = {**options, self.lse_option: True}

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            result = flash_attn_func(q, k, v, **options)
            return result[0] if isinstance(result, tuple) else result

        def attend_with_lse(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse, *_ = flash_attn_func(q, k, v, **with_lse)
            return out, lse

        return Prepared(attend, attend_with_lse if self.has_lse(problem) else None)

    def standalone(self, problem: Problem, device: Device) -> str:
        options = {name: value for name, value in self._options(problem).items() if name != "softmax_scale"}
        told = "".join(f"{name}={value!r}, " for name, value in options.items())
        if problem.mask.blocks:
            told += "**lists, "
        return f"""
from {self.module} import flash_attn_func
{self._blocks_source(problem)}

def attend(q, k, v):
    found = flash_attn_func(q, k, v, {told}softmax_scale=SCALE)
    return found[0] if isinstance(found, tuple) else found


def attend_with_lse(q, k, v):
    return flash_attn_func(q, k, v, {told}softmax_scale=SCALE, {self.lse_option}=True)[:2]
"""

    def _blocks(self, problem: Problem, device: Device) -> dict[str, Any]:
        """The arguments that say which blocks are visible."""
        return {}

    def _blocks_source(self, problem: Problem) -> str:
        """Python that defines ``lists``, the same arguments, for a problem with a block mask."""
        return ""

    def _options(self, problem: Problem) -> dict[str, Any]:
        mask = problem.mask
        options: dict[str, Any] = {"softmax_scale": problem.softmax_scale, "causal": mask.kind == "causal"}
        if problem.dropout_p:
            options["dropout_p"] = problem.dropout_p
        if mask.kind == "window":
            options["window_size"] = tuple(
                self.unbounded if side is None else side for side in (mask.left, mask.right)
            )
        return options


class FlashAttention2(FlashAttention):
    """flash-attn 2.x."""

    name = "flash-attn-2"
    package = "flash-attn"
    summary = "FlashAttention-2 (package flash-attn)"
    module = "flash_attn.flash_attn_interface"
    capabilities = Capabilities(
        compute_capability=((8, 0), (99, 9)),
        masks=BANDS,
        head_dim_multiple=1,
        contiguous_head_dim=True,
        dropout=True,
    )

    def unavailable(self, device: Device) -> Unavailable | None:
        return super().unavailable(device) or missing_module(
            self.module, "pip install flash-attn --no-build-isolation"
        )

    def dropout_effective(self, p: float) -> Dropout:
        return Dropout.by_bytes(p)

    def has_lse(self, problem: Problem) -> bool:
        # It returns +inf, not -inf, for a row with nothing to attend to.
        first, last = problem.mask.row_bounds(problem.seqlen_q, problem.seqlen_k)
        return bool((first < last).all())


class FlashAttention3(FlashAttention):
    """FlashAttention-3: everything in a full build, bf16 forward of full and causal in the forward-only wheel."""

    name = "flash-attn-3"
    summary = "FlashAttention-3 for Hopper (flash_attn_interface, or the forward-only fa3-fwd)"

    def __init__(self) -> None:
        hopper = ((9, 0), (9, 0))
        if missing_module("flash_attn_interface", "") is None:
            self.module, self.package = "flash_attn_interface", "flash-attn-3"
            self.capabilities = Capabilities(compute_capability=hopper, masks=BANDS, contiguous_head_dim=True)
        else:
            self.module, self.package = "fa3_fwd_interface", "fa3-fwd"
            self.capabilities = Capabilities(
                compute_capability=hopper, dtypes=("bf16",), backward=False, contiguous_head_dim=True
            )

    def unavailable(self, device: Device) -> Unavailable | None:
        return super().unavailable(device) or missing_module(self.module, "pip install fa3-fwd")


class FlashAttention4(FlashAttention):
    """FlashAttention-4: CuTe DSL kernels, compiled in the first call.

    On Hopper it takes block masks, as the indices of visible tiles: of every row of tiles for the forward, of every
    column for the backward (``BlockSparseTensorsTorch`` in flash_attn/cute/block_sparsity.py, 4.0.0b36). Here that is
    for tiles visible as a whole. One visible in part needs a ``mask_mod``, a function in CuTe DSL compiled into the
    kernel; so would a band beside the blocks, and blocks smaller than a tile.
    """

    name = "flash-attn-4"
    package = "flash-attn-4"
    summary = "FlashAttention-4 (flash_attn.cute, CuTe DSL)"
    module = "flash_attn.cute"
    unbounded = None
    lse_option = "return_lse"
    capabilities = Capabilities(compute_capability=((9, 0), (12, 1)), masks=(*BANDS, "block_sparse"))

    def unavailable(self, device: Device) -> Unavailable | None:
        fix = "pip install 'flash-attn-4[cu13]'"
        return (
            super().unavailable(device) or missing_module(self.module, fix) or missing_module("cutlass", fix)
        )

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        if device.capability[0] in (10, 11) and 128 < problem.head_dim < 256:
            found.append(f"head_dim {problem.head_dim} is neither up to 128 nor 256 on Blackwell")
        pattern = problem.mask.blocks
        if not pattern:
            return found
        if device.kind == "cuda" and device.capability[0] != 9:
            found.append("block masks are passed on to its Hopper kernels alone")
        if problem.mask.banded:
            found.append("a band beside blocks needs a mask_mod")
        tile = sparse_tile(problem.head_dim)
        if tile is None:
            found.append(f"block masks at head_dim {problem.head_dim}, neither up to 128 nor 256")
        elif pattern.block_q % tile[0] or pattern.block_k % tile[1]:
            found.append(
                f"blocks of {pattern.block_q}x{pattern.block_k} are not multiples of its tile, {tile[0]}x{tile[1]}"
            )
        return found

    def _blocks(self, problem: Problem, device: Device) -> dict[str, Any]:
        tile = sparse_tile(problem.head_dim)
        if not problem.mask.blocks or tile is None:
            return {}
        visible, _ = problem.mask.tiles(problem.heads, problem.seqlen_q, problem.seqlen_k, *tile)
        # Of a forward alone too: without the second, a backward would take every pair for visible.
        return {
            "block_sparse_tensors": tile_lists(visible, tile, device),
            "block_sparse_tensors_bwd": tile_lists(visible.swapaxes(1, 2), tile, device),
        }

    def _blocks_source(self, problem: Problem) -> str:
        tile = sparse_tile(problem.head_dim)
        if not problem.mask.blocks or tile is None:
            return ""
        return f"""from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

tiles = visible[:, :: {tile[0]}, :: {tile[1]}]  # each is visible as a whole or not at all


def listed(tiles):
    tiles = tiles.clone(memory_format=torch.contiguous_format)
    counts = tiles.sum(-1, dtype=torch.int32)[None]
    indices = tiles.byte().argsort(dim=-1, descending=True, stable=True).int()[None]
    return BlockSparseTensorsTorch(torch.zeros_like(counts), indices, counts, indices, block_size={tile!r})


lists = {{"block_sparse_tensors": listed(tiles), "block_sparse_tensors_bwd": listed(tiles.transpose(1, 2))}}
"""


def sparse_tile(head_dim: int) -> tuple[int, int] | None:
    """Queries and keys of the tile that both passes can be told of on Hopper; None where this is not offered.

    interface.py, 4.0.0b36: a listed tile may span several of a pass's own along the queries, and is one along the keys.
    The forward cuts its own to fit (``_fit_sm90_fwd_tile_to_block_sparsity``); the backward's are fixed, and divide 128
    queries (``_tile_size_bwd_sm90``). Its keys are 128 up to head_dim 128, 96 up to 192 and 64 beyond, where its tile
    of a block mask takes no head_dim but 256.
    """
    if head_dim <= 128:
        return 128, 128
    return (128, 64) if head_dim == 256 else None


def tile_lists(tiles: np.ndarray, tile: tuple[int, int], device: Device) -> Any:
    """``BlockSparseTensorsTorch`` on ``device`` of ``tiles``: bool (1 or heads, rows, columns), visible or not.

    A list holds a row's visible tiles in ascending order, ahead of the others: the kernels go through it from its end
    and mind the end of the sequence in the first tile that they meet, so the last must be there. All are full tiles; of
    the partial ones, those for a ``mask_mod``, there must be a list and it is empty.
    """
    import torch

    lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    # Indices have the strides of what is sorted, and the library takes none but dense lists: tiles may come transposed.
    # ``contiguous`` would leave a dimension of size 1 any stride.
    visible = torch.tensor(tiles)[None].clone(memory_format=torch.contiguous_format)
    counts = visible.sum(-1, dtype=torch.int32).to(str(device))
    indices = visible.byte().argsort(dim=-1, descending=True, stable=True).to(str(device), torch.int32)
    return lists(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=indices,
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=tile,
    )
