"""dQ out of its sums, which stand in the order in which a warpgroup's registers hold a product."""

import pytest
import torch

from attnbench.impls.flash_triton.kernels.sums import ROWS, dq_from_sums_kernel


def place(row, column):
    """Where the PTX ISA has an element of a 64-row wgmma accumulator, as offset: thread of the warpgroup and register.

    Its figure of the matrix D (section on wgmma.mma_async): thread 32 warp + lane holds, of every eight columns, the
    two at 2 (lane % 4) of row 16 warp + lane / 4, then the same two of the row eight below.
    """
    warp, lane = row // 16, row % 8 * 4 + column % 8 // 2
    register = column // 8 * 4 + row % 16 // 8 * 2 + column % 2
    return (register // 4 * 128 + 32 * warp + lane) * 4 + register % 4


@pytest.mark.parametrize("seqlen", [128, 100])
def test_dq_is_the_factor_times_the_sums(seqlen):
    batch, heads, dim, tiles = 2, 2, 256, 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row, column = torch.arange(ROWS.value)[:, None], torch.arange(dim)[None, :]
    dq = torch.randn(batch, seqlen, heads, dim)
    padded = torch.full((batch, tiles * ROWS.value, heads, dim), float("nan"))
    padded[:, :seqlen] = dq
    sums = torch.full((batch, heads, tiles, ROWS.value * dim), float("nan"))
    sums[..., place(row, column)] = padded.unflatten(1, (tiles, -1)).permute(0, 3, 1, 2, 4)
    sums, found = sums.to(device), torch.full_like(dq, float("nan"), device=device)
    dq_from_sums_kernel[batch * heads * tiles,](
        sums, found, *found.stride()[:3], 0.5, seqlen, tiles, HEADS=heads, D=dim, num_warps=8
    )
    assert torch.equal(found.cpu(), dq * 0.5)
