"""torch.compile'd FlexAttention: the mask is a function of indices, compiled into a Triton kernel.

The block mask is built while preparing, from the mask's tiles, so that no (seqlen_q, seqlen_k) tensor exists. The
attention itself compiles in the first call of each shape.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attnbench.harness.contract import Capabilities, Device, Implementation, Prepared, Unavailable
from attnbench.harness.masks import ALIGNMENTS, KINDS
from attnbench.harness.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.nn.attention.flex_attention import BlockMask

    MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

TILE = 128
"""The largest tile of FlexAttention's kernels, which a block of the BlockMask must be a multiple of."""


class Flex(Implementation):
    """FlexAttention on CUDA: any mask; GQA without repeating K and V."""

    name = "flex"
    contract = 1
    package = "torch"
    summary = "torch.compile'd FlexAttention (Triton)"
    compile_processes = 8  # every shape compiles for seconds, into inductor's cache on disk
    capabilities = Capabilities(
        compute_capability=((8, 0), (12, 1)),
        dtypes=("fp16", "bf16", "fp32"),
        masks=KINDS,
        alignments=ALIGNMENTS,
        head_dim_v_differs=True,
    )

    def unavailable(self, device: Device) -> Unavailable | None:
        if device.kind == "cpu":
            return Unavailable(
                "FlexAttention's CPU kernel needs a C++ compiler and has no backward",
                "run with --device cuda",
            )
        return super().unavailable(device)

    def unsupported_reasons(self, problem: Problem, device: Device) -> list[str]:
        found = super().unsupported_reasons(problem, device)
        if problem.batch == 0:
            found.append("batch 0 is refused by the kernel")
        pattern = problem.mask.blocks
        for size in (pattern.block_q, pattern.block_k) if pattern else ():
            if size % TILE and TILE % size:
                found.append(f"block size {size} neither divides {TILE} nor is a multiple of it")
        found += [
            f"{name} {size} is below FlexAttention's 16"
            for name in ("head_dim", "head_dim_v")
            if (size := getattr(problem, name)) < 16
        ]
        return found

    def standalone(self, problem: Problem, device: Device) -> str:
        return """
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

heads_of_mask = visible.shape[0]
block_mask = None if bool(visible.all()) else create_block_mask(
    lambda b, h, i, j: visible[h if heads_of_mask > 1 else 0, i, j],
    None, heads_of_mask if heads_of_mask > 1 else None, SEQLEN_Q, SEQLEN_K, DEVICE,
)
compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)


def attend_with_lse(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = compiled(q, k, v, block_mask=block_mask, scale=SCALE, enable_gqa=HEADS != KV_HEADS, return_lse=True)
    return out.transpose(1, 2), lse


def attend(q, k, v):
    return attend_with_lse(q, k, v)[0]
"""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        self.require(problem, device)
        import torch
        from torch._dynamo import config as dynamo_config
        from torch._functorch import config as functorch_config
        from torch._inductor import config as inductor_config
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        # Every shape is a compilation of its own. Past the limit (8 by default) a sweep would stop compiling;
        # fullgraph then raises instead of running eagerly, which would materialise the scores.
        dynamo_config.recompile_limit = dynamo_config.accumulated_recompile_limit = 1 << 16
        # A backward that gives its saved tensors away can run once; timing runs it many times over one graph.
        functorch_config.donated_buffer = False
        # One kernel a compilation: a pool of compiler processes costs more to start than it saves.
        inductor_config.compile_threads = 1
        compiled = partial(
            torch.compile(flex_attention, dynamic=False, fullgraph=True),
            block_mask=block_mask(problem, str(device)),
            scale=problem.softmax_scale,
            enable_gqa=problem.heads != problem.kv_heads,
        )

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        def attend_with_lse(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            bhsd = (x.transpose(1, 2) for x in (q, k, v))
            out, aux = compiled(*bhsd, return_aux=AuxRequest(lse=True))
            return out.transpose(1, 2), aux.lse

        return Prepared(attend, attend_with_lse)


def block_mask(problem: Problem, device: str) -> BlockMask | None:
    """The problem's mask for FlexAttention, None for a full one; its blocks are the pattern's where they can be.

    Made from the mask's own tiles: ``create_block_mask`` evaluates every (row, key) pair, which took 31 s at 8k.
    """
    import numpy as np
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    mask, pattern = problem.mask, problem.mask.blocks
    if mask.kind == "full":
        return None
    fits = pattern is not None and pattern.block_q % TILE == 0 and pattern.block_k % TILE == 0
    tile_q, tile_k = (pattern.block_q, pattern.block_k) if pattern and fits else (TILE, TILE)
    visible, whole = mask.tiles(problem.heads, problem.seqlen_q, problem.seqlen_k, tile_q, tile_k)
    # A tile that hangs over the end of a sequence is never whole: the kernel masks only where it is told to.
    whole = whole.copy()
    whole[:, problem.seqlen_q // tile_q :] = whole[:, :, problem.seqlen_k // tile_k :] = False

    def listed(tiles: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row of tiles how many there are, and their indices in order, ahead of all others; with a batch of 1."""
        counts, order = tiles.sum(axis=-1), np.argsort(~tiles, axis=-1, kind="stable")

        def as_indices(x: np.ndarray) -> torch.Tensor:
            return torch.tensor(x[None], dtype=torch.int32, device=device)

        return as_indices(counts), as_indices(order)

    return BlockMask.from_kv_blocks(
        *listed(visible & ~whole),
        *listed(whole),
        BLOCK_SIZE=(tile_q, tile_k),
        mask_mod=mask_mod(problem, device),
        seq_lengths=(problem.seqlen_q, problem.seqlen_k),
    )


def mask_mod(problem: Problem, device: str) -> MaskMod:
    """Visibility of key ``j`` from row ``i`` as FlexAttention asks for it: (batch, head, i, j) -> bool."""
    import torch

    mask, pattern = problem.mask, problem.mask.blocks
    shift = mask.shift(problem.seqlen_q, problem.seqlen_k)
    left, right = mask.left, mask.right
    blocks = None
    if pattern:
        grid = pattern.blocks(problem.heads, problem.seqlen_q, problem.seqlen_k)
        blocks = torch.tensor(grid, device=device)

    def visible(_b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seen = j >= 0
        if left is not None:
            seen = seen & (j >= i + (shift - left))
        if right is not None:
            seen = seen & (j <= i + (shift + right))
        if blocks is not None and pattern:
            layer = h if pattern.per_head else 0
            seen = seen & blocks[layer, i // pattern.block_q, j // pattern.block_k]
        return seen

    return visible
