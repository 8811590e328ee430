"""Forms of the backward kernel, emulated: wide heads, dropout where rows are keys, block lists, sums in turn.

Of each form some problem gives every block three tiles or more: what passes from a tile to the next is judged too.
"""

import ctypes

import pytest
import torch

from attnbench.impls.flash_api import BlockMask, call, dropout_effective_p, dropout_keep_mask
from attnbench.impls.flash_cuda import flash_attention
from attnbench.impls.flash_cuda.arguments import ROW_FIELDS

pytestmark = pytest.mark.emulated

BF16, FP16 = torch.bfloat16, torch.float16
SEED, OFFSET = -(2**50) + 3, 11


@pytest.fixture(autouse=True)
def _same_inputs() -> None:
    torch.manual_seed(0)


@pytest.fixture
def judge(emulate, wrong, monkeypatch):
    """Called with a problem, the emulation's options and the call's: what is wrong with results and gradients. Two
    blocks side by side."""

    def run(problem, emulation=(), dropout_p=0.0, **options):
        batch, seqlen_q, heads, _ = problem.q.shape
        dropped = ()
        if dropout_p:
            monkeypatch.setattr(call, "draw_dropout_state", lambda device: torch.tensor([SEED, OFFSET]))
            keep = dropout_keep_mask(SEED, OFFSET, batch, heads, seqlen_q, problem.k.shape[1], dropout_p)
            dropped = (keep, 1 - dropout_effective_p(dropout_p))
        with emulate.emulating(**{"multiprocessors": 2, **dict(emulation)}) as device:
            found = wrong(problem, flash_attention, dropped=dropped, dropout_p=dropout_p, **options)
            assert not device.ticket.any(), "the next launch would miss tiles"
        return found

    return run


@pytest.mark.parametrize(
    ("seqlens", "heads", "head_dims", "dtype", "band"),
    [
        ((130, 70), (2, 2), (128, 256), FP16, {"left": 20, "right": 7}),
        ((130, 200), (2, 2), (256, 128), FP16, {"left": 20, "right": 7}),
        ((1, 265), (3, 1), (200, 64), BF16, {"right": 3, "shift": 0}),  # most tiles have no rows
    ],
    ids=str,
)
def test_wide_heads(make, judge, seqlens, heads, head_dims, dtype, band):
    problem = make(*seqlens, *heads, *head_dims, batch=2, dtype=dtype, **band)
    alignment = "top_left" if band.get("shift") == 0 else "bottom_right"
    assert judge(problem, window=(band.get("left"), band.get("right")), alignment=alignment) == []


@pytest.mark.parametrize(("head_dims", "p", "right"), [((64, 64), 0.9, 0), ((256, 192), 0.1, None)])
def test_dropout(make, judge, head_dims, p, right):
    problem = make(150, 190, 4, 2, *head_dims, batch=2, dtype=BF16, right=right)
    assert judge(problem, dropout_p=p, window=(None, right)) == []


def test_a_wrong_walk_of_lists_is_seen(make, judge, broken):
    """The first 64 rows of a block in place of the last."""
    csrc = broken("backward/load.cuh", "member, block, partial | last}", "member, begin, partial | last}")
    problem = make(200, 200, dtype=BF16, head_dim=128)
    found = judge(
        problem, {"csrc": csrc}, block_mask=BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool))
    )
    assert {line.split(":")[0] for line in found} == {"dq", "dk", "dv"}


def test_the_second_half_of_a_step_is_seen(make, judge, broken):
    """Its weights with the rows of the first."""
    csrc = broken("backward/narrow.cuh", "d_out_at.slot], true, part * PART", "d_out_at.slot], true, 0")
    problem = make(200, 200, dtype=BF16, head_dim=64)
    assert {line.split(":")[0] for line in judge(problem, {"csrc": csrc})} == {"dv"}


def test_an_assignment_is_not_replaced_before_it_is_read(make, judge, emulate, broken):
    """Consumers are soon done with keys that no row sees."""
    wait = "ptx::wait(plan.assignment_barriers.empty[at.slot], at.parity);"
    csrc = broken("backward/load.cuh", wait, "")
    problem = make(70, 900, dtype=BF16, head_dim=64, right=0, shift=0)
    with pytest.raises(emulate.EmulationError, match="no barrier puts that after the read of thread 32"):
        judge(problem, {"csrc": csrc, "multiprocessors": 1}, causal=True, alignment="top_left")


def test_a_wrong_byte_of_dropout_is_seen(make, judge, broken):
    csrc = broken("backward/dropout.cuh", "i / 4 % 2 * 2 + i / 2 % 2", "i / 2 % 2 * 2 + i / 4 % 2")
    problem = make(70, 70, dtype=BF16, head_dim=64)
    found = judge(problem, {"csrc": csrc}, dropout_p=0.5)
    assert {line.split(":")[0] for line in found} == {"dq", "dk", "dv"}


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("backward/wide.cuh", "ptx::wait(plan.arrivals.d_scores_ready[buffer], received);", "",
         "no barrier puts that after"),
        ("backward/wide.cuh", "received ^= buffer;", "", "no barrier puts that after"),
        ("backward/load.cuh", "(rank * OthersKey::PANELS + p)", "p", None),
        ("backward/load.cuh", "ptx::wait(arrivals.tile_ready, parity);", "", "no barrier puts that after"),
        ("backward/kernel.cuh", "        __syncwarp();\n        ptx::sync_cluster();\n", "", "has ended|block ends"),
        ("tile/panels.cuh", " & 0x3FFF", "", "race: operand B of a product|the block's shared memory is"),
    ],
)  # fmt: skip
def test_a_planted_bug_of_what_blocks_exchange_is_found(emulate, make, judge, broken, file, old, new, found):
    problem = make(70, 300, 1, 1, 256, dtype=BF16)
    csrc = broken(file, old, new)
    if found is None:
        assert {line.split(":")[0] for line in judge(problem, {"csrc": csrc})} == {"dq"}
        return

    def judge_some_orders():
        for seed in range(10):
            judge(problem, {"csrc": csrc, "seed": seed})

    with pytest.raises(emulate.EmulationError, match=found):
        judge_some_orders()


def elements(blocks, size, seqlen_q, seqlen_k):
    """Block matrix to element mask."""
    grown = blocks.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)[..., :seqlen_q, :seqlen_k]
    return grown.reshape((1,) * (4 - grown.ndim) + grown.shape)


@pytest.mark.parametrize(
    ("seqlens", "size", "lead", "head_dim", "band", "dropout_p"),
    [
        ((200, 300), (128, 128), (2, 4), 128, {"right": 0}, 0.0),
        ((150, 200), (64, 64), (1, 4), 64, {"left": 100, "right": 30}, 0.3),
        ((130, 290), (64, 128), (), 256, {}, 0.0),
    ],
    ids=str,
)
def test_block_lists(make, judge, seqlens, size, lead, head_dim, band, dropout_p):
    """Partial and full blocks, a row and a column of none, ragged last blocks."""
    visited = torch.rand(*lead, *(-(-n // b) for n, b in zip(seqlens, size, strict=True))) < 0.7
    visited[..., 0, :] = visited[..., :, 1] = False
    full = visited & (torch.rand(visited.shape) < 0.5)
    problem = make(*seqlens, 4, 2, head_dim, batch=2, dtype=BF16, **band)
    problem.visible = problem.visible & elements(visited, size, *seqlens) | elements(full, size, *seqlens)
    mask = BlockMask.from_dense(visited, size, full=full)
    window = (band.get("left"), band.get("right"))
    assert judge(problem, block_mask=mask, dropout_p=dropout_p, window=window) == []


def test_tiles_that_visit_the_most_blocks_go_first(make, judge, emulate, monkeypatch):
    found = []

    class Watched(emulate.EmulatedKernel):
        def launch(self, grid, threads, params, *more, **options):
            super().launch(grid, threads, params, *more, **options)
            if self.name.endswith("prepare"):
                *_, order, tiles, planes, _, _ = ROW_FIELDS.unpack(params)
                found.extend((ctypes.c_int32 * (tiles * planes)).from_address(order))

    monkeypatch.setattr(emulate, "EmulatedKernel", Watched)
    visited = torch.rand(2, 4, 3, 5) < 0.5
    problem = make(300, 600, 4, 2, 128, batch=2, dtype=BF16, right=0)
    problem.visible = problem.visible & elements(visited, (128, 128), 300, 600)
    mask = BlockMask.from_dense(visited)
    assert judge(problem, block_mask=mask, window=(None, 0)) == []
    lengths = visited.reshape(4, 2, 3, 5).sum((1, 2)).tolist()  # of the two heads of a group
    wanted = [sorted(range(5), key=lambda tile: -plane[tile]) for plane in lengths]
    assert found == [tile for plane in wanted for tile in plane]


@pytest.fixture
def gradients(emulate, make):
    """Called with a head dim, a band, counts of blocks side by side and options: for each count, with a seed of its
    own, the gradients of one problem, whose dq is what two large sums leave of a small one, so that the order of its
    terms shows."""

    def run(head_dim, band, counts, **options):
        problem = make(200, 400, 2, 1, head_dim, dtype=BF16, **band)
        problem.k[:, 128:256] = problem.k[:, :128]
        problem.v[:, 128:256] = -problem.v[:, :128]
        problem.v[:, 256:] *= 1e-5
        problem.d_lse.zero_()
        alignment = "top_left" if band.get("shift") == 0 else "bottom_right"
        found = []
        for seed, multiprocessors in enumerate(counts):
            with emulate.emulating(seed=seed, multiprocessors=multiprocessors):
                window = (band.get("left"), band.get("right"))
                found.append(problem.run(flash_attention, window=window, alignment=alignment, **options)[2:])
        return found

    return run


BANDS = [(64, {}), (128, {"left": 180, "right": 90}), (256, {"right": 150, "shift": 0})]


@pytest.mark.parametrize(("head_dim", "band"), BANDS, ids=str)
def test_deterministic_gradients_repeat_in_any_order_of_events(make, judge, gradients, head_dim, band):
    problem = make(130, 300, 2, 1, head_dim, batch=2, dtype=BF16, **band)
    options = {
        "window": (band.get("left"), band.get("right")),
        "alignment": "top_left" if band.get("shift") == 0 else "bottom_right",
        "deterministic": True,
    }
    assert judge(problem, **options) == []
    first, *others = gradients(head_dim, band, (5, 5, 5, 2), deterministic=True)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_other_gradients_do_not_repeat(gradients):
    """The control: that the order of events reaches the sums."""
    first, *others = gradients(*BANDS[0], (5, 5, 5, 5))
    assert not all(torch.equal(first[0], other[0]) for other in others)


def test_turns_against_the_order_of_the_draw_are_a_deadlock(emulate, make, broken):
    """A block alone then waits for a tile that it would work on later."""
    problem = make(70, 300, 1, 1, 64, dtype=BF16, right=0)
    turn = "(keys.end - 1) / KEYS - key / KEYS"
    csrc = broken("backward/turns.cuh", turn, "key / KEYS - keys.begin / KEYS")
    with (
        emulate.emulating(csrc=csrc, multiprocessors=1),
        pytest.raises(emulate.EmulationError, match="deadlock"),
    ):
        problem.run(flash_attention, causal=True, deterministic=True)
