"""One meaning of a mask: the label, the pair count, the row bounds and the dense matrix all agree with the rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.masks import ALIGNMENTS, KINDS, PATTERNS, BlockPattern, Mask

LENGTHS = st.integers(0, 40)
SIDES = st.none() | st.integers(0, 45)


@st.composite
def patterns(draw: st.DrawFn) -> BlockPattern:
    name = draw(st.sampled_from(PATTERNS))
    density = draw(st.integers(0, 100).map(lambda percent: percent / 100))
    if name not in ("random", "banded", "strided"):
        density = 0.25
    return BlockPattern(
        name,
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        density,
        draw(st.integers(0, 99)) if name == "random" else 0,
        draw(st.booleans()) if name == "random" else False,
    )


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    left, right = draw(SIDES), draw(SIDES)
    # Without a band an alignment has no meaning, and the label does not keep it.
    aligned = st.sampled_from(ALIGNMENTS) if (left, right) != (None, None) else st.just(ALIGNMENTS[0])
    return Mask(left, right, draw(aligned), draw(st.none() | patterns()))


@given(masks())
def test_a_label_reads_back_as_the_mask_it_names(mask):
    assert Mask.parse(mask.label) == mask
    assert Mask.parse(f"  {mask.label.replace(',', ' , ')} ") == mask


@given(masks(), LENGTHS, LENGTHS, st.integers(1, 3))
def test_visible_pairs_counts_the_dense_mask(mask, seqlen_q, seqlen_k, heads):
    dense = mask.dense(torch.arange(seqlen_q), heads, seqlen_q, seqlen_k)
    assert dense.shape == (heads if mask.blocks and mask.blocks.per_head else 1, seqlen_q, seqlen_k)
    assert mask.visible_pairs(heads, seqlen_q, seqlen_k) == int(dense.expand(heads, -1, -1).sum())


@given(masks(), st.integers(1, 40), LENGTHS, st.integers(1, 3))
def test_the_dense_mask_is_the_rule_pair_by_pair(mask, seqlen_q, seqlen_k, heads):
    dense = mask.dense(torch.arange(seqlen_q), heads, seqlen_q, seqlen_k).expand(heads, -1, -1)
    shift = seqlen_k - seqlen_q if mask.alignment == "bottom_right" else 0
    blocks = mask.blocks.blocks(heads, seqlen_q, seqlen_k) if mask.blocks else None
    for head in range(heads):
        for i in range(seqlen_q):
            want = [
                (mask.left is None or j >= i + shift - mask.left)
                and (mask.right is None or j <= i + shift + mask.right)
                and (
                    blocks is None
                    or bool(blocks[head % len(blocks), i // mask.blocks.block_q, j // mask.blocks.block_k])
                )
                for j in range(seqlen_k)
            ]
            assert dense[head, i].tolist() == want


@given(masks(), st.integers(1, 40), LENGTHS)
def test_row_bounds_are_the_ends_of_the_band(mask, seqlen_q, seqlen_k):
    first, last = mask.row_bounds(seqlen_q, seqlen_k)
    band = Mask(mask.left, mask.right, mask.alignment).dense(torch.arange(seqlen_q), 1, seqlen_q, seqlen_k)[0]
    assert ((first >= 0) & (first <= last) & (last <= seqlen_k)).all()
    for row, visible in enumerate(band):
        assert visible.nonzero().flatten().tolist() == list(range(first[row], last[row]))


@given(masks(), st.integers(1, 40), LENGTHS)
def test_dense_of_some_rows_is_those_rows_of_all(mask, seqlen_q, seqlen_k):
    rows = torch.arange(0, seqlen_q, 3)
    everything = mask.dense(torch.arange(seqlen_q), 2, seqlen_q, seqlen_k)
    assert torch.equal(mask.dense(rows, 2, seqlen_q, seqlen_k), everything[:, rows])


def test_causal_alignment_differs_only_where_the_lengths_do():
    bottom, top = Mask.causal(), Mask.causal("top_left")
    rows = torch.arange(3)
    assert bottom.dense(rows, 1, 3, 5)[0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1] * 5]
    assert top.dense(rows, 1, 3, 5)[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert torch.equal(bottom.dense(rows, 1, 3, 3), top.dense(rows, 1, 3, 3))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("full", "full"),
        ("causal", "causal"),
        ("causal@top_left", "causal"),
        ("window(4,0)", "window"),
        ("window(inf,3)", "window"),
        ("window(inf,0)", "causal"),
        ("blocks(butterfly,8x8)", "block_sparse"),
        ("causal&blocks(random,8x8,density=0.5,seed=3)", "block_sparse"),
    ],
)
def test_kinds_are_the_words_capabilities_are_declared_in(text, kind):
    assert Mask.parse(text).kind == kind
    assert kind in KINDS


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("casual", "'casual' is not understood; masks are written full, causal"),
        ("causal@middle", "alignment 'middle' is not one of bottom_right, top_left"),
        ("window(-1,0)", "is not understood"),
        ("blocks(random,8x8,denisty=0.5)", "unknown block option 'denisty'"),
        ("blocks(random,8x8,density=x.y)", "could not convert"),
        ("blocks(spiral,8x8)", "block pattern 'spiral' is not one of full, random"),
        ("blocks(full,0x8)", "block size 0x8"),
        ("blocks(random,8x8,density=1.5)", r"density 1.5 must lie in \[0, 1\]"),
        ("blocks(full,8x8,per_head=1)", "per_head needs the random pattern"),
        ("nonsense&blocks(full,8x8)", "is not understood"),
    ],
)
def test_what_is_wrong_with_a_mask_is_said(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        Mask.parse(text)


def test_a_mask_cannot_look_less_than_nowhere():
    with pytest.raises(ValueError, match="mask left is -1"):
        Mask(left=-1)
    with pytest.raises(ValueError, match="alignment 'left'"):
        Mask(alignment="left")


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", ["random", "banded"])
def test_patterns_have_about_the_density_asked_for(name, density):
    blocks = BlockPattern(name, 8, 8, density).blocks(1, 800, 800)
    assert blocks.mean() == pytest.approx(density, abs=0.03)


def test_a_strided_pattern_is_the_diagonal_and_every_nth_column():
    blocks = BlockPattern("strided", 4, 4, density=0.25).blocks(1, 32, 32)[0]
    assert blocks.diagonal().all()
    assert blocks[:, 3::4].all()
    assert blocks.sum() == 8 * 2 + 6


def test_butterfly_blocks_see_indices_one_bit_away():
    blocks = BlockPattern("butterfly", 4, 4).blocks(1, 32, 32)[0]
    assert all(blocks[i, j] == (int(i ^ j).bit_count() <= 1) for i in range(8) for j in range(8))


def test_blocks_are_per_head_seeded_and_read_only():
    pattern = BlockPattern("random", 4, 4, 0.5, seed=1, per_head=True)
    blocks = pattern.blocks(2, 64, 64)
    assert not np.array_equal(blocks[0], blocks[1])
    assert not np.array_equal(
        blocks, BlockPattern("random", 4, 4, 0.5, seed=2, per_head=True).blocks(2, 64, 64)
    )
    with pytest.raises(ValueError, match="read-only"):
        blocks[0, 0, 0] = True
