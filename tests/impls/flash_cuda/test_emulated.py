"""The kernels' sources on a CPU, their instructions emulated: judged against fp64, and seen to be judged.

The machine is `emulator/`; the problems are those of `test_on_gpu.py`, smaller.
"""

import pytest
import torch

from attnbench.impls.flash_api import call, dropout_effective_p, dropout_keep_mask
from attnbench.impls.flash_cuda import flash_attention

pytestmark = pytest.mark.emulated

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _same_inputs() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "kv_heads", "head_dim", "head_dim_v", "dtype", "band"),
    [
        (200, 200, 2, 2, 64, 64, BF16, {}),
        (70, 300, 4, 2, 64, 64, BF16, {"right": 0}),
        (300, 70, 2, 1, 64, 64, BF16, {"right": 0}),
        (300, 130, 2, 2, 128, 128, FP16, {"right": 0, "top_left": True}),
        (150, 260, 4, 2, 80, 72, BF16, {"left": 70, "right": 20}),
        (1, 1, 1, 1, 128, 64, BF16, {"left": 0, "right": 0}),
        (130, 190, 2, 1, 256, 192, BF16, {"right": 0}),
    ],
    ids=str,
)
def test_both_passes(
    emulate, make, wrong, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v, dtype, band, seed
):  # fmt: skip
    top_left = band.get("top_left", False)
    left, right = band.get("left"), band.get("right")
    problem = make(
        seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v, batch=2, dtype=dtype, left=left, right=right,
        shift=0 if top_left else None,
    )  # fmt: skip
    alignment = "top_left" if top_left else "bottom_right"
    with emulate.emulating(seed=seed):
        assert wrong(problem, flash_attention, window=(left, right), alignment=alignment) == []


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "left", "right"),
    [
        (1100, 90, 64, 64, None, None),
        (1100, 700, 64, 64, 200, 0),  # 192 rows a tile: to each warpgroup its own blocks, to the last none
        (100, 200, 192, 128, None, 0),
        (100, 200, 128, 256, None, None),
    ],
)
def test_forward(emulate, make, errors, seqlen_q, seqlen_k, head_dim, head_dim_v, left, right):
    """What the backward does not share: three consumers, the output staged apart from Q."""
    sizes = (seqlen_q, seqlen_k, 2, 1, head_dim, head_dim_v)
    problem = make(*sizes, dtype=BF16, left=left, right=right, shift=0)
    options = {"window": (left, right), "alignment": "top_left"}
    with emulate.emulating():
        got = flash_attention(problem.q, problem.k, problem.v, return_lse=True, **options)
    reference, eager = problem.attention(torch.float64), problem.attention(BF16)
    assert errors(list(got), reference[:2], eager[:2]) == []


@pytest.mark.parametrize(("head_dim", "p"), [(64, 0.1), (128, 0.9)])
def test_forward_with_dropout(emulate, make, errors, monkeypatch, head_dim, p):
    problem = make(150, 290, 4, 2, head_dim, batch=2, dtype=BF16, right=0)
    seed, offset = -(2**50) + 3, 11
    monkeypatch.setattr(call, "draw_dropout_state", lambda device: torch.tensor([seed, offset]))
    with emulate.emulating():
        got = flash_attention(problem.q, problem.k, problem.v, causal=True, dropout_p=p, return_lse=True)
    keep = dropout_keep_mask(seed, offset, 2, 4, 150, 290, p)
    dropped = (keep, 1 - dropout_effective_p(p))
    reference, eager = problem.attention(torch.float64, *dropped), problem.attention(BF16, *dropped)
    assert errors(list(got), reference[:2], eager[:2]) == []


def test_one_seed_is_one_run(emulate, make):
    """dQ adds up in the order in which tiles finish, which only the seed decides."""
    problem = make(200, 400, 2, 1, 64, dtype=BF16)
    with emulate.emulating(seed=5):
        first = problem.run(flash_attention)
    with emulate.emulating(seed=5):
        again = problem.run(flash_attention)
    assert all(map(torch.equal, first, again))


FORWARD, BACKWARD, CONSUMER = "forward/kernel.cuh", "backward/narrow.cuh", "backward/consumer.cuh"
PANELS, RING, FRAGMENT = "tile/panels.cuh", "tile/ring.cuh", "tile/fragment.cuh"


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        (FORWARD, "plan.k_barriers.wait_full(k_at);", "", "no barrier puts that after a copy into it"),
        (FORWARD, "ptx::wait_products<LATER>();", "ptx::wait_products<LATER + 1>();", "race: "),
        (RING, "ptx::wait(full[at.slot], at.parity);", "", "no barrier puts that after"),
        (RING, "parity ^= 1;", "", "more arrivals than the 1 of the barrier's phase"),
        (FORWARD, "ptx::fence_async_shared();", "", "wrote without a proxy fence since"),
        (FORWARD, "ptx::publish_barriers();", "", "initialised without a fence since"),
        (FORWARD, "ptx::pin(weights);\n        ptx::begin_products();", "", "without wgmma.fence since the last wait"),
        (FORWARD, "begin_fill(at, Plan::Key::BYTES)", "begin_fill(at, 2 * Plan::Key::BYTES)", "deadlock"),
        (PANELS, "ptx::shared_address(tile) >> 4", "ptx::shared_address(tile) + 229376 >> 4",
         "the block's shared memory is"),
        (PANELS, "SWIZZLE_ROWS * ROW_BYTES >> 4", "SWIZZLE_ROWS * ROW_BYTES >> 5", None),
        (PANELS, "((chunk ^ (row % SWIZZLE_ROWS)) << 4)", "(chunk << 4)", None),
        (FRAGMENT, "return (i >> 2) * 8 + (i & 1);", "return (i >> 2) * 8 + (i & 1) + 1;", None),
    ],
)  # fmt: skip
def test_a_planted_bug_of_the_forward_is_found(emulate, make, errors, broken, file, old, new, found):
    problem = make(150, 400, 2, 2, 64, dtype=BF16, right=0)
    csrc = broken(file, old, new)
    expected = [problem.attention(kind)[:2] for kind in (torch.float64, BF16)]

    def judge(seed):
        with emulate.emulating(seed=seed, csrc=csrc):
            got = flash_attention(problem.q, problem.k, problem.v, causal=True, return_lse=True)
        return errors(list(got), *expected)

    assert seen(emulate, judge, found)


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        (BACKWARD, "ptx::sync_threads(BOTH_CONSUMERS, CONSUMERS * WARPGROUP);", "",
         "no barrier puts that after the write"),
        (BACKWARD, "ptx::fence_async_shared();", "", "without a proxy fence since"),
        (CONSUMER, "ptx::wait_stores_read<PENDING>();\n        }\n        ptx::sync", "}\n        ptx::sync",
         "from which a store is still to read"),
        (BACKWARD, "buffer ^= 1;", "", "no barrier puts that after"),
        (BACKWARD, "this->draw(plane, block);", "if (last) this->release_v();", "no barrier puts that after"),
        ("backward/rows.cuh", "    __syncthreads();\n", "", "wrote without a proxy fence since"),
    ],
)  # fmt: skip
def test_a_planted_bug_of_the_backward_is_found(emulate, make, wrong, broken, file, old, new, found):
    problem = make(150, 400, 1, 1, 128, dtype=BF16)
    csrc = broken(file, old, new)

    def judge(seed):
        with emulate.emulating(seed=seed, csrc=csrc):
            return wrong(problem, flash_attention)

    assert seen(emulate, judge, found)


def seen(emulate, judge, found):
    """Whether some order of events shows the bug: as the error `found`, or, where that is None, in the values."""
    for seed in range(4):
        try:
            wrong = judge(seed)
        except emulate.EmulationError as error:
            return found is not None and found in str(error)
        if wrong:
            return found is None
    return False
