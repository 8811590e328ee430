"""Forms of the forward kernel, emulated: block lists, split keys, packed groups, dropout shared by two warps."""

import pytest
import torch

from attnbench.impls.flash_api import BlockMask, call, dropout_effective_p, dropout_keep_mask
from attnbench.impls.flash_cuda import flash_attention

pytestmark = pytest.mark.emulated

BF16 = torch.bfloat16
SEED, OFFSET = -(2**50) + 3, 11


@pytest.fixture(autouse=True)
def _same_inputs() -> None:
    torch.manual_seed(0)


@pytest.fixture
def judge(emulate, errors, monkeypatch):
    """Called with a problem, the emulation's options and the call's: what is wrong with out and lse."""

    def run(problem, emulation=(), dropout_p=0.0, **options):
        batch, seqlen_q, heads, _ = problem.q.shape
        monkeypatch.setattr(call, "draw_dropout_state", lambda device: torch.tensor([SEED, OFFSET]))
        dropped = ()
        if dropout_p:
            keep = dropout_keep_mask(SEED, OFFSET, batch, heads, seqlen_q, problem.k.shape[1], dropout_p)
            dropped = (keep, 1 - dropout_effective_p(dropout_p))
        with emulate.emulating(**dict(emulation)) as device:
            got = flash_attention(
                problem.q, problem.k, problem.v, dropout_p=dropout_p, return_lse=True, **options
            )
            assert not device.ticket.any(), "the next launch would miss tiles"
        expected = [problem.attention(kind, *dropped)[:2] for kind in (torch.float64, problem.q.dtype)]
        return errors(list(got), *expected)

    return run


def elements(blocks, size, seqlen_q, seqlen_k):
    """Block matrix to element mask."""
    grown = blocks.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)[..., :seqlen_q, :seqlen_k]
    return grown.reshape((1,) * (4 - grown.ndim) + grown.shape)


@pytest.mark.parametrize(
    ("seqlens", "size", "lead", "head_dim", "band", "dropout_p"),
    [
        ((300, 500), (128, 128), (), 128, {}, 0.0),
        ((300, 500), (128, 256), (2, 4), 64, {"right": 0}, 0.0),
        ((129, 300), (128, 256), (1, 4), 64, {"right": 0, "shift": 0}, 0.0),
        ((70, 430), (64, 96), (2, 1), 64, {"left": 200, "right": 30}, 0.3),
        ((200, 300), (64, 64), (), 256, {"left": 90}, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("some_full", [False, True])
def test_block_lists(make, judge, seqlens, size, lead, head_dim, band, dropout_p, some_full):
    """Ragged last blocks, listed as partial or as full, where the band does not apply; an empty row."""
    rows, columns = (-(-n // b) for n, b in zip(seqlens, size, strict=True))
    blocks = torch.rand(*lead, rows, columns) < 0.6
    blocks[..., 0, :] = False
    blocks[..., -1, -1] = True
    full = blocks & (torch.rand(blocks.shape) < 0.5) & some_full
    problem = make(
        *seqlens, 4, 2, head_dim, batch=2, dtype=BF16, blocks=elements(blocks, size, *seqlens), **band
    )
    problem.visible = problem.visible | elements(full, size, *seqlens)
    options = {
        "window": (band.get("left"), band.get("right")),
        "alignment": "top_left" if "shift" in band else "bottom_right",
        "block_mask": BlockMask.from_dense(blocks, size, full=full),
        "dropout_p": dropout_p,
    }
    assert judge(problem, **options) == []


@pytest.mark.parametrize("multiprocessors", [1, 40])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "kv_heads", "head_dim", "band"),
    [
        (5, 1300, 6, 2, 64, {"right": 0}),
        (64, 1030, 1, 1, 64, {"right": 0}),
        (20, 1024, 5, 1, 64, {"right": 0, "shift": 0}),
        (40, 10, 4, 2, 64, {"right": 0}),
        (1, 520, 8, 2, 256, {"left": 400, "right": 100}),
    ],
    ids=str,
)
def test_few_queries(make, judge, seqlen_q, seqlen_k, heads, kv_heads, head_dim, band, multiprocessors):
    """Groups that divide 64 and that do not, splits without a key to see, rows that see none at all; all tiles one
    block's, or a block for every split."""
    problem = make(seqlen_q, seqlen_k, heads, kv_heads, head_dim, batch=2, dtype=BF16, **band)
    options = {
        "window": (band.get("left"), band.get("right")),
        "alignment": "top_left" if "shift" in band else "bottom_right",
    }
    assert judge(problem, {"multiprocessors": multiprocessors}, **options) == []


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("attn/block_lists.cuh", "+ within % each * STEP", ""),
        ("attn/block_lists.cuh", "steps.whole = steps.full - steps_past", "steps.whole = steps.full - 0 * steps_past"),
        ("forward/kernel.cuh", "block < work.steps.full", "block < 0"),
        ("forward/kernel.cuh", "ptx::wait(plan.k_barriers.empty[at.slot], at.parity ^ 1);", ""),
    ],
)  # fmt: skip
def test_a_planted_bug_of_block_lists_is_seen(emulate, make, judge, broken, file, old, new):
    size, seqlens = (128, 256), (300, 900)  # more steps than slots
    blocks = torch.ones(3, 4, dtype=torch.bool)
    full = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
    problem = make(*seqlens, dtype=BF16, head_dim=64, right=0)
    problem.visible = problem.visible | elements(full, size, *seqlens)
    mask = BlockMask.from_dense(blocks, size, full=full)
    assert judge(problem, causal=True, block_mask=mask) == []
    csrc = broken(file, old, new)
    assert seen(
        emulate, lambda seed: judge(problem, {"csrc": csrc, "seed": seed}, causal=True, block_mask=mask)
    )


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("forward/kernel.cuh", "? first + local :", "? first + row + 8 * h :"),
        ("forward/kernel.cuh", "entry / params.batch, params.splits", "0, params.splits"),
        ("forward/merge.cuh", "params.lse_parts[at] - origin", "0 * params.lse_parts[at] - origin"),
    ],
)
def test_a_planted_bug_of_few_queries_is_seen(make, judge, broken, file, old, new):
    problem = make(5, 1300, 6, 2, 64, batch=2, dtype=BF16, right=0)
    device = {"multiprocessors": 40, "csrc": broken(file, old, new)}
    assert judge(problem, device, causal=True) != []


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("forward/dropout.cuh", "[thread ^ 32]", "[thread]"),
        ("forward/kernel.cuh", "buffer ^= 1;", ""),
        ("forward/kernel.cuh", "ptx::sync_threads(FIRST_PAIR_BARRIER", "(void)(FIRST_PAIR_BARRIER"),
    ],
)
def test_a_planted_bug_of_dropout_is_seen(emulate, make, judge, broken, file, old, new):
    problem = make(100, 290, dtype=BF16, head_dim=64)
    csrc = broken(file, old, new)
    assert seen(emulate, lambda seed: judge(problem, {"csrc": csrc, "seed": seed}, dropout_p=0.3))


@pytest.fixture
def rising(make):
    """Scores that rise by e^7, more than an origin may lag behind, in both parts of every step, with a mask or not."""
    problem = make(130, 700, dtype=BF16, head_dim=64, right=0)
    j = torch.arange(700)
    problem.q[..., 0] = 8
    part, step = j % 128 // 64, 5 - j // 128  # from the right
    problem.k[..., 0] = 7 * (2 * step + part)[:, None]
    return problem


def test_rising_scores(rising, judge):
    assert judge(rising, causal=True) == []


@pytest.mark.parametrize(
    ("file", "bug"),
    [
        ("attn/softmax.cuh", "scores[i] *= factor"),
        ("attn/softmax.cuh", "total[h][0] *= factor"),
        ("attn/softmax.cuh", "sum[h] *= factor"),
        ("forward/kernel.cuh", "if (rose) attn::scale_rows(out, rescale)"),
    ],
)
def test_what_does_not_shrink_when_scores_rise_is_seen(rising, judge, broken, file, bug):
    assert judge(rising, {"csrc": broken(file, bug, "")}, causal=True) != []


def seen(emulate, judge):
    """Whether some order of events shows a bug, as an error or in the values."""
    for seed in range(8):
        try:
            if judge(seed):
                return True
        except emulate.EmulationError:
            return True
    return False
