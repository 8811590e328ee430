"""FlexAttention's block mask against the dense mask: nothing visible is left out, nothing hidden is called whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from attnbench.harness.contract import Device
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls.flex import TILE, Flex, block_mask

MASKS = (
    "causal",
    "causal@top_left",
    "window(100,30)",
    "window(inf,70)@top_left",
    "blocks(random,128x128,density=0.4)",
    "blocks(random,64x32,density=0.3,per_head=1)",
    "causal&blocks(random,256x128,density=0.5)",
)
LENGTHS = ((512, 512), (300, 700), (700, 300), (1, 513), (256, 129))


def problem(mask: str, seqlen_q: int, seqlen_k: int) -> Problem:
    return Problem(batch=1, heads=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=64, mask=Mask.parse(mask))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_tile_is_listed_as_what_it_is(mask: str, lengths: tuple[int, int]) -> None:
    posed = problem(mask, *lengths)
    made = block_mask(posed, "cpu")
    assert made is not None
    tile_q, tile_k = made.BLOCK_SIZE
    dense = posed.mask.dense(torch.arange(lengths[0]), posed.heads, *lengths)
    rows, columns = -(-lengths[0] // tile_q), -(-lengths[1] // tile_k)
    padded = functional.pad(dense, (0, columns * tile_k - lengths[1], 0, rows * tile_q - lengths[0]))
    tiles = padded.unflatten(2, (columns, tile_k)).unflatten(1, (rows, tile_q))
    visible, whole = tiles.any(dim=(2, 4)), tiles.all(dim=(2, 4))
    assert made.full_kv_num_blocks is not None
    assert made.full_kv_indices is not None
    full = listed(made.full_kv_num_blocks[0], made.full_kv_indices[0])
    partial = listed(made.kv_num_blocks[0], made.kv_indices[0])
    assert torch.equal(full, whole)
    assert not (full & partial).any()
    assert torch.equal((full | partial) & visible, visible)


@pytest.mark.parametrize("mask", ["causal", "blocks(random,128x128,density=0.4,per_head=1)"])
def test_the_script_asks_with_a_block_mask_of_as_many_heads(mask: str) -> None:
    """Kernels are chosen by it: one of a head each kept FlexAttention from the kernel in which a failure was found."""
    posed, where = problem(mask, 300, 300), Device("cpu")
    own = block_mask(posed, "cpu")
    visible = posed.mask.dense(torch.arange(300), posed.heads, 300, 300)
    script = {"torch": torch, "visible": visible, "HEADS": 3, "KV_HEADS": 3, "SEQLEN_Q": 300, "SEQLEN_K": 300,
              "DEVICE": "cpu", "SCALE": 1.0}  # fmt: skip
    exec(Flex().standalone(posed, where), script)
    assert own is not None
    assert script["block_mask"].kv_indices.shape[1] == own.kv_indices.shape[1]


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Bool (heads, rows, columns) of the first ``counts`` of ``indices``."""
    tiles = torch.zeros(indices.shape, dtype=torch.bool)
    chosen = torch.arange(indices.shape[-1]) < counts[..., None]
    return tiles.scatter(-1, indices.long(), chosen)


def test_a_block_size_that_tiles_cannot_follow_is_refused() -> None:
    reasons = Flex().unsupported_reasons(
        problem("blocks(random,96x128,density=0.4)", 512, 512), Device("cuda", capability=(9, 0))
    )
    assert reasons == [f"block size 96 neither divides {TILE} nor is a multiple of it"]
