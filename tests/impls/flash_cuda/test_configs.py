"""Which kernel a problem gets: few queries, splits, and tiles that divide the blocks of a mask."""

import itertools

import pytest

from attnbench.impls.flash_api import Band
from attnbench.impls.flash_cuda.configs import (
    SHARED_BYTES,
    Shape,
    backward_kernel,
    forward_kernel,
    keeps_rows,
    key_planes_per_wave,
    queries_of,
    splits_of,
)

H200 = 132


def shape(batch, heads, kv_heads, seqlen_q, seqlen_k, dim=128, mask_block=(0, 0), right=True, dropout=False):
    return Shape(
        "BF16", batch, heads, kv_heads, seqlen_q, seqlen_k, dim, dim, False, right, dropout, mask_block
    )


@pytest.mark.parametrize(
    ("problem", "decode"),
    [
        (shape(1, 32, 8, 1, 65536), True),
        # A group reads K and V once.
        (shape(64, 32, 8, 1, 100), True),
        (shape(64, 8, 8, 1, 100), False),
        (shape(64, 8, 8, 1, 5000), True),
        # 64 tiles of one query would read K and V more often than 40 heads do.
        (shape(4, 40, 1, 64, 5000), False),
        # 40 tiles for 132 multiprocessors.
        (shape(1, 8, 8, 600, 9000), True),
        (shape(1, 8, 8, 600, 600), False),
        (shape(4, 16, 16, 4096, 4096), False),
        # A group that no warpgroup holds.
        (shape(1, 65, 1, 1, 5000), False),
        (shape(1, 32, 8, 1, 65536, dropout=True), False),
    ],
)
def test_few_queries_share_tiles(problem, decode):
    assert forward_kernel(problem, H200).decode is decode


def test_splits_fill_the_device_and_are_worth_merging():
    for batch, seqlen_q, seqlen_k in itertools.product((1, 2, 16, 40), (1, 7, 64), (10, 600, 5000, 70000)):
        problem = shape(batch, 32, 8, seqlen_q, seqlen_k)
        kernel = forward_kernel(problem, H200)
        splits = splits_of(kernel, problem, Band.of(None, 0, True, seqlen_q, seqlen_k), H200)
        tiles = -(-seqlen_q // queries_of(kernel, problem)) * 8 * batch
        assert splits == 1 or splits * tiles <= H200
        assert splits == 1 or seqlen_k / splits >= 4 * kernel.keys
        if 2 * tiles <= H200 and seqlen_k >= 70000:
            assert 2 * splits * tiles > H200


def test_keys_that_no_query_sees_are_not_split():
    problem = shape(1, 32, 8, 4, 65536)
    kernel = forward_kernel(problem, H200)
    assert splits_of(kernel, problem, Band.of(None, 0, True, 4, 65536), H200) == 16
    assert splits_of(kernel, problem, Band.of(None, 0, False, 4, 65536), H200) == 1
    assert splits_of(kernel, problem, Band.of(127, 0, True, 4, 65536), H200) == 1


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    "block", list(itertools.product((64, 128, 192, 320), (32, 64, 96, 128, 160))), ids=str
)
def test_tiles_divide_the_blocks_and_fit(block, dropout, dim):
    kernel = forward_kernel(shape(1, 2, 2, 4096, 4096, dim, block, dropout=dropout), H200)
    assert block[0] % kernel.rows == 0
    assert block[1] % kernel.keys == 0
    assert kernel.slots >= 2
    staged = 0 if kernel.out_in_q else kernel.rows * kernel.dim_v
    held = kernel.q_slots * kernel.rows * kernel.dim + kernel.slots * kernel.keys * (
        kernel.dim + kernel.dim_v
    )
    assert 2 * (held + staged) < SHARED_BYTES


@pytest.mark.parametrize(
    ("dim", "more", "rows"),
    [
        (64, {}, 128),
        (40, {"mask_block": (256, 128)}, 128),
        # A block of 192 rows has no whole steps of 128, and 64 x 64 blocks are walked by consumers that share keys.
        (64, {"mask_block": (192, 128)}, 64),
        (64, {"mask_block": (128, 64)}, 64),
        (64, {"dropout": True}, 64),
        (128, {}, 64),
    ],
)
def test_the_backward_walks_128_rows_a_step_where_they_fit(dim, more, rows):
    kernel = backward_kernel(shape(1, 1, 1, 512, 512, dim, **more))
    assert (kernel.rows, kernel.units) == (rows, rows // 64 * (kernel.dim // 64))


@pytest.mark.parametrize(
    ("problem", "planes"),
    [
        # A row of Q, dO and sums: 1 KB at hd128, so that 32 MB hold 32k rows, of all heads of a group.
        (shape(16, 16, 16, 1024, 1024), 32),
        (shape(16, 16, 4, 1024, 1024), 8),
        (shape(16, 32, 32, 1024, 4096, dim=64), 64),
        (shape(1, 4, 2, 1024, 1024), 2),
        (shape(1, 16, 16, 65536, 65536), 1),
        # Without a band neighbours read the same rows.
        (shape(16, 16, 16, 1024, 1024, right=False), 1),
        (shape(16, 16, 4, 1024, 1024, right=False, mask_block=(128, 128)), 1),
    ],
)
def test_rows_of_a_wave_of_the_backward_fit_in_cache(problem, planes):
    assert key_planes_per_wave(problem) == planes


@pytest.mark.parametrize(
    ("rows", "more", "kept"),
    [
        (16384, {"right": False}, True),
        (32768, {"right": False}, False),
        (32768, {"right": False, "mask_block": (128, 128)}, True),
        (32768, {"right": True}, True),
    ],
)
def test_long_rows_without_a_band_or_lists_are_not_kept_in_cache(rows, more, kept):
    assert keeps_rows(shape(1, 16, 16, rows, rows, **more)) is kept
