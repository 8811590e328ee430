"""The kernels on a Hopper GPU, judged against fp64: masks, lengths, head dims, groups, dropout, layouts, repeats."""

import pytest
import torch

from attnbench.impls.flash_api import BlockMask, call, dropout_effective_p, dropout_keep_mask
from attnbench.impls.flash_cuda import flash_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

BF16, FP16 = torch.bfloat16, torch.float16

TILES_A_BLOCK = 3
MOST_QUERIES, MOST_KEYS = 192, 128
"""Of a tile: no forward has more queries, no backward more keys."""


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.fixture
def batch_for():
    """Called with lengths and heads: a batch of which a persistent block gets TILES_A_BLOCK in either pass, so that
    what passes from a tile to the next (slots, stages, the counter that tiles are drawn from) is judged too."""

    def batch(seqlen_q, seqlen_k, heads, kv_heads):
        tiles = min(-(-seqlen_q // MOST_QUERIES) * heads, -(-seqlen_k // MOST_KEYS) * kv_heads)
        blocks = torch.cuda.get_device_properties().multi_processor_count
        return -(-TILES_A_BLOCK * blocks // tiles)

    return batch


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "kv_heads", "head_dim", "head_dim_v", "dtype"),
    [
        (1, 1, 1, 1, 128, 128, BF16), (5, 1, 1, 1, 128, 128, BF16), (64, 128, 1, 1, 64, 64, BF16),
        (1024, 1024, 4, 2, 128, 128, BF16), (1000, 777, 4, 1, 64, 64, FP16), (333, 555, 4, 2, 64, 128, BF16),
        (333, 555, 4, 2, 128, 64, BF16), (700, 900, 4, 2, 80, 72, BF16), (130, 70, 2, 2, 16, 24, FP16),
        (2048, 2048, 8, 4, 64, 64, BF16),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "band",
    [{}, {"right": 0}, {"right": 0, "top_left": True}, {"left": 100, "right": 20}, {"left": 0, "right": 0},
     {"left": 64}],
    ids=str,
)  # fmt: skip
def test_both_passes(
    make, wrong, batch_for, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v, dtype, band
):  # fmt: skip
    top_left = band.get("top_left", False)
    left, right = band.get("left"), band.get("right")
    problem = make(
        seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v,
        batch=batch_for(seqlen_q, seqlen_k, heads, kv_heads), dtype=dtype, left=left, right=right,
        shift=0 if top_left else None,
    )  # fmt: skip
    alignment = "top_left" if top_left else "bottom_right"
    assert wrong(problem, flash_attention, window=(left, right), alignment=alignment) == []


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(192, 128), (256, 256), (128, 256), (200, 248)])
@pytest.mark.parametrize("band", [{}, {"right": 0}, {"left": 100, "right": 20}], ids=str)
def test_wide_heads(make, wrong, batch_for, head_dim, head_dim_v, band):
    sizes = (700, 900, 4, 2)
    problem = make(*sizes, head_dim, head_dim_v, batch=batch_for(*sizes), dtype=BF16, **band)
    assert wrong(problem, flash_attention, window=(band.get("left"), band.get("right"))) == []


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_forward_with_dropout(make, errors, batch_for, monkeypatch, head_dim, p):
    batch = batch_for(500, 700, 4, 2)
    problem = make(500, 700, 4, 2, head_dim, batch=batch, dtype=BF16, right=0)
    state = torch.tensor([-(2**50) + 3, 11], dtype=torch.int64, device="cuda")
    monkeypatch.setattr(call, "draw_dropout_state", lambda device: state)
    got = flash_attention(problem.q, problem.k, problem.v, causal=True, dropout_p=p, return_lse=True)
    keep = dropout_keep_mask(-(2**50) + 3, 11, batch, 4, 500, 700, p, device="cuda")
    dropped = (keep, 1 - dropout_effective_p(p))
    reference, eager = problem.attention(torch.float64, *dropped), problem.attention(BF16, *dropped)
    assert errors(list(got), reference[:2], eager[:2]) == []


@pytest.mark.parametrize("band", [{}, {"right": 0}, {"left": 300, "right": 60}], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "size", "dropout_p"),
    [(64, (64, 128), 0.0), (64, (128, 128), 0.3), (128, (128, 128), 0.0), (128, (128, 64), 0.3),
     (256, (256, 96), 0.0)],
)  # fmt: skip
def test_forward_by_block_lists(make, errors, batch_for, monkeypatch, head_dim, band, size, dropout_p):
    """One pattern a head; ragged last blocks, partial and full, where the band does not apply; an empty row."""
    seqlen_q, seqlen_k = 1000, 1300
    batch = batch_for(seqlen_q, seqlen_k, 4, 2)
    blocks = torch.rand(1, 4, -(-seqlen_q // size[0]), -(-seqlen_k // size[1]), device="cuda") < 0.5
    blocks[..., 0, :] = False
    blocks[..., -1, -1] = True
    full = blocks & (torch.rand(blocks.shape, device="cuda") < 0.5)

    def elements(x):
        return x.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[..., :seqlen_q, :seqlen_k]

    problem = make(
        seqlen_q, seqlen_k, 4, 2, head_dim, batch=batch, dtype=BF16, blocks=elements(blocks), **band
    )
    problem.visible = problem.visible | elements(full)
    state = torch.tensor([5, 11], dtype=torch.int64, device="cuda")
    monkeypatch.setattr(call, "draw_dropout_state", lambda device: state)
    got = flash_attention(
        problem.q, problem.k, problem.v, window=(band.get("left"), band.get("right")), dropout_p=dropout_p,
        block_mask=BlockMask.from_dense(blocks, size, full=full), return_lse=True,
    )  # fmt: skip
    dropped = ()
    if dropout_p:
        keep = dropout_keep_mask(5, 11, batch, 4, seqlen_q, seqlen_k, dropout_p, device="cuda")
        dropped = (keep, 1 - dropout_effective_p(dropout_p))
    reference, eager = problem.attention(torch.float64, *dropped), problem.attention(BF16, *dropped)
    assert errors(list(got), reference[:2], eager[:2]) == []


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "kv_heads", "batch"),
    [(1, 20000, 32, 8, 1), (1, 70, 32, 8, 50), (7, 5000, 6, 2, 2), (64, 3000, 1, 1, 1), (20, 1500, 7, 1, 2),
     (3, 4000, 64, 1, 1), (600, 9000, 2, 1, 1), (40, 10, 4, 2, 2)],
)  # fmt: skip
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "band", [{}, {"right": 0}, {"right": 0, "shift": 0}, {"left": 900, "right": 20}], ids=str
)
def test_few_queries(make, errors, seqlen_q, seqlen_k, heads, kv_heads, batch, head_dim, band):
    """With split keys a tile for every block, at a batch of 50 the 400 tiles of 50 x 8 key heads."""
    problem = make(seqlen_q, seqlen_k, heads, kv_heads, head_dim, batch=batch, dtype=BF16, **band)
    got = flash_attention(
        problem.q, problem.k, problem.v, window=(band.get("left"), band.get("right")), return_lse=True,
        alignment="top_left" if "shift" in band else "bottom_right",
    )  # fmt: skip
    reference, eager = problem.attention(torch.float64), problem.attention(BF16)
    assert errors(list(got), reference[:2], eager[:2]) == []


@pytest.mark.parametrize("size", [(128, 128), (64, 192)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("band", [{}, {"left": 200, "right": 30}], ids=str)
def test_gradients_by_block_lists(make, wrong, batch_for, head_dim, band, size):
    seqlen_q, seqlen_k = 1000, 1100
    batch = batch_for(seqlen_q, seqlen_k, 4, 2)
    blocks = torch.rand(1, 4, -(-seqlen_q // size[0]), -(-seqlen_k // size[1]), device="cuda") < 0.5
    blocks[..., 0, :] = blocks[..., :, 1] = False
    full = blocks & (torch.rand(blocks.shape, device="cuda") < 0.5)

    def elements(matrix):
        grown = matrix.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)
        return grown[..., :seqlen_q, :seqlen_k]

    problem = make(seqlen_q, seqlen_k, 4, 2, head_dim, batch=batch, dtype=BF16, **band)
    problem.visible = problem.visible & elements(blocks) | elements(full)
    mask = BlockMask.from_dense(blocks, size, full=full)
    window = (band.get("left"), band.get("right"))
    assert wrong(problem, flash_attention, block_mask=mask, window=window) == []


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_with_dropout(make, wrong, batch_for, monkeypatch, head_dim, p):
    batch = batch_for(500, 700, 4, 2)
    problem = make(500, 700, 4, 2, head_dim, batch=batch, dtype=BF16, right=0)
    state = torch.tensor([-(2**50) + 3, 11], dtype=torch.int64, device="cuda")
    monkeypatch.setattr(call, "draw_dropout_state", lambda device: state)
    keep = dropout_keep_mask(-(2**50) + 3, 11, batch, 4, 500, 700, p, device="cuda")
    dropped = (keep, 1 - dropout_effective_p(p))
    assert wrong(problem, flash_attention, dropped=dropped, causal=True, dropout_p=p) == []


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("band", [{}, {"right": 0}, {"left": 300, "right": 20}], ids=str)
def test_deterministic_gradients_repeat_bit_for_bit(make, wrong, batch_for, head_dim, band):
    sizes = (1500, 1500, 4, 2)
    problem = make(*sizes, head_dim, batch=batch_for(*sizes), dtype=BF16, **band)
    options = {"window": (band.get("left"), band.get("right")), "deterministic": True}
    assert wrong(problem, flash_attention, **options) == []
    first = problem.run(flash_attention, **options)
    for _ in range(50):
        assert all(map(torch.equal, problem.run(flash_attention, **options), first))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "offset", "odd stride"])
def test_any_layout(make, wrong, layout):
    problem = make(200, 300, 2, 2, 64, batch=2, dtype=BF16, right=0)
    k = problem.k
    if layout == "expanded":
        k = k[:1, :, :1].expand(k.shape)
    elif layout == "transposed":
        k = k.transpose(1, 3).contiguous().transpose(1, 3)
    elif layout == "offset":
        flat = torch.empty(k.numel() + 1, dtype=k.dtype, device=k.device)
        k = flat[1:].view(k.shape).copy_(k)
    else:
        k = torch.nn.functional.pad(k, (0, 3))[..., :64]
    problem.k = k
    assert wrong(problem, flash_attention, causal=True) == []


@pytest.mark.parametrize("seqlens", [(1000, 1000), (4, 20000)])
def test_forward_repeats_bit_for_bit(make, batch_for, seqlens):
    """Several tiles a block, and split keys."""
    batch = batch_for(*seqlens, 8, 2) if seqlens[0] > 4 else 2
    problem = make(*seqlens, 8, 2, 128, batch=batch, dtype=BF16, right=0)
    first = flash_attention(problem.q, problem.k, problem.v, causal=True)
    for _ in range(200):
        assert torch.equal(flash_attention(problem.q, problem.k, problem.v, causal=True), first)


HELD_CYCLES = 20_000_000
"""Some 10 ms: longer than it takes to ask for both passes."""


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_replays_beside_eager_calls(make, errors, batch_for, deterministic):
    """Captured launches draw tiles from counters of their own, in either pass."""
    sizes = (1000, 1000, 4, 2)
    problem = make(*sizes, 128, batch=batch_for(*sizes), dtype=BF16, right=0)
    judged = problem.attention(torch.float64), problem.attention(BF16)
    other = torch.cuda.Stream()

    def both_passes():
        return problem.run(flash_attention, causal=True, deterministic=deterministic)

    def repeating(results):  # of the rest the order of sums is not settled
        return results if deterministic else [*results[:2], *results[3:]]

    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        expected = both_passes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes()
    for _ in range(20):
        torch.cuda._sleep(HELD_CYCLES)  # both begin when it ends
        other.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(other):
            eager = both_passes()
        torch.cuda.synchronize()
        for results in (captured, eager):
            assert errors(results, *judged) == []
            assert all(map(torch.equal, repeating(results), repeating(expected)))


def test_rows_that_see_nothing_pass_no_gradient_of_lse_on(make):
    """The derivative of a loss at lse = -inf is seldom finite."""
    problem = make(70, 40, 2, 2, 64, dtype=BF16, right=0)
    problem.d_lse[:, :, :30] = 0
    expected = problem.run(flash_attention, causal=True)
    problem.d_lse[:, :, :30] = float("nan")
    got = problem.run(flash_attention, causal=True)
    assert all(torch.isfinite(gradient).all() for gradient in got[2:])
    assert all(map(torch.equal, got[3:], expected[3:]))
