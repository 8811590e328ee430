"""Block-sparse attention: lists from every source, empty rows, patterns per head, masks inside partial blocks."""

import pytest
import torch

from attnbench.impls.flash_api import BlockMask
from attnbench.impls.flash_triton import flash_attention

BLOCK = (32, 64)


def elements(blocks, seqlen_q, seqlen_k, block=BLOCK):
    """Block matrix to element mask (batch or 1, heads or 1, seqlen_q, seqlen_k)."""
    grown = blocks.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :seqlen_q, :seqlen_k]
    return grown.reshape((1,) * (4 - grown.ndim) + grown.shape)


def random_blocks(shape, device):
    blocks = torch.rand(shape, device=device) < 0.5
    blocks[..., 1, :] = False
    blocks[..., 0, 0] = True
    return blocks


@pytest.mark.parametrize("lead", [(), (1, 4), (2, 1), (2, 4)], ids=str)
def test_patterns(make, wrong, device, lead):
    """One pattern, one a head, one a batch entry; the second row of blocks is empty; ragged last blocks."""
    blocks = random_blocks((*lead, 3, 3), device)
    problem = make(90, 150, 4, 2, batch=2, blocks=elements(blocks, 90, 150))
    assert wrong(problem, flash_attention, block_mask=BlockMask.from_dense(blocks, BLOCK)) == []


def test_the_judge_sees_a_wrong_block(make, wrong, device):
    blocks = random_blocks((3, 3), device)
    other = blocks.clone()
    other[0, 2] = ~other[0, 2]
    problem = make(96, 192, blocks=elements(blocks, 96, 192))
    assert wrong(problem, flash_attention, block_mask=BlockMask.from_dense(other, BLOCK)) != []


def test_band_applies_within_partial_blocks_only(make, wrong, device):
    blocks = torch.ones(3, 2, dtype=torch.bool, device=device)
    full = torch.zeros_like(blocks)
    full[0, 1] = True
    problem = make(96, 128, right=0)
    problem.visible = problem.visible | elements(full, 96, 128)
    mask = BlockMask.from_dense(blocks, BLOCK, full=full)
    assert wrong(problem, flash_attention, causal=True, block_mask=mask) == []


def test_blocks_larger_than_tiles(make, wrong, device):
    blocks = random_blocks((2, 2), device)
    problem = make(250, 200, blocks=elements(blocks, 250, 200, (128, 128)))
    assert wrong(problem, flash_attention, block_mask=BlockMask.from_dense(blocks)) == []


def test_from_bsr_and_lists(device):
    blocks = random_blocks((3, 4), device)
    counts = blocks.sum(1)
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    bsr = BlockMask.from_bsr(crow, blocks.nonzero()[:, 1], 4, BLOCK)
    dense = BlockMask.from_dense(blocks, BLOCK)
    lists = BlockMask(dense.kv_num_blocks, dense.kv_indices, block_size=BLOCK)
    for other in (bsr, lists):
        assert all(map(torch.equal, other.by_query.tensors(), dense.by_query.tensors()))
        assert all(map(torch.equal, other.by_key.tensors(), dense.by_key.tensors()))
    flipped = BlockMask.from_dense(blocks.T, BLOCK[::-1])
    assert all(map(torch.equal, dense.by_key.tensors(), flipped.by_query.tensors()))


def test_lists_of_flex_attention_are_accepted(make, wrong):
    """torch's create_block_mask: causal on the diagonal blocks, full blocks below it."""
    from torch.nn.attention.flex_attention import create_block_mask

    problem = make(128, 128, 2, right=0)
    device = str(problem.q.device)
    flex = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device=device, BLOCK_SIZE=32)
    mask = BlockMask(
        flex.kv_num_blocks,
        flex.kv_indices,
        flex.full_kv_num_blocks,
        flex.full_kv_indices,
        block_size=flex.BLOCK_SIZE,
    )
    assert wrong(problem, flash_attention, causal=True, block_mask=mask) == []


@pytest.mark.parametrize(
    ("counts", "indices", "message"),
    [
        ([[[1, 3]]], [[[[0, 1], [0, 1]]]], "kv_num_blocks"),
        ([[[1, 1]]], [[[[2, 1], [0, 1]]]], "in \\[0, 2\\)"),
        ([[[2, 1]]], [[[[1, 0], [0, 1]]]], "sorted"),
        ([[[2, 1]]], [[[[1, 1], [0, 1]]]], "unique"),
        ([[1, 1]], [[[[0, 1], [0, 1]]]], "kv_indices"),
    ],
)
def test_bad_lists_are_refused(counts, indices, message):
    with pytest.raises(ValueError, match=message):
        BlockMask(torch.tensor(counts), torch.tensor(indices))


def test_masks_of_another_size_are_refused(make, device):
    problem = make(96, 192)
    mask = BlockMask.from_dense(torch.ones(3, 4, dtype=torch.bool, device=device), BLOCK)
    with pytest.raises(ValueError, match="block_mask: covers"):
        problem.run(flash_attention, block_mask=mask)
