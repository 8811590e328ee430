"""The kernels for Hopper, judged without one: their source on a CPU, by `gluon_on_cpu`."""

from pathlib import Path

import pytest
import torch

from attnbench.impls import flash_api
from attnbench.impls.flash_triton import configs, flash_attention, launch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the other launches run in Triton's interpreter"
)


@pytest.fixture
def machine(monkeypatch, load_module):
    """Launches of the specialised kernels on a `Machine`, all others by Triton's interpreter."""
    machine = load_module("gluon_on_cpu", Path(__file__).with_name("gluon_on_cpu.py")).Machine()

    def run(calls, tensors):
        for call in calls:
            specialised = "hopper" in call.kernel.fn.__module__
            machine.run(call, tensors) if specialised else call.first(tensors)

    few = 3  # so that each program of a forward computes several tiles
    monkeypatch.setattr(configs, "HOPPER_WHEREVER_POSSIBLE", True)
    monkeypatch.setattr(launch, "device_for", lambda *_: configs.Device((9, 0), few))
    monkeypatch.setattr(launch, "launch", run)
    launch.forget_plans()
    yield machine
    launch.forget_plans()


BANDS = [
    (256, 256, (None, None), None),
    (300, 500, (None, 0), None),
    (300, 200, (100, 30), 0),
    (128, 300, (None, 5), 0),
]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "window", "shift"), BANDS, ids=str)
def test_matches_fp64(machine, make, wrong, head_dim, seqlen_q, seqlen_k, window, shift):
    problem = make(seqlen_q, seqlen_k, 2, 1, head_dim, left=window[0], right=window[1], shift=shift)
    alignment = "bottom_right" if shift is None else "top_left"
    assert wrong(problem, flash_attention, window=window, alignment=alignment) == []


def test_three_consumers(machine, make, wrong):
    """Rows past the end, and tiles of 192 rows over 128 keys, of which not every consumer needs all."""
    problem = make(1100, 300, head_dim=64, right=0, shift=0)
    assert wrong(problem, flash_attention, causal=True, alignment="top_left") == []


@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_lists(machine, make, wrong, head_dim):
    blocks = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    full = torch.tensor([[False, False, True], [False, False, False], [True, False, False]])
    problem = make(384, 350, 2, 1, head_dim, right=0)
    partial, whole = (x.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :350] for x in (blocks, full))
    problem.visible = (problem.visible & partial) | whole
    mask = flash_api.BlockMask.from_dense(blocks, full=full)
    assert wrong(problem, flash_attention, window=(None, 0), block_mask=mask) == []


@pytest.mark.parametrize(
    ("head_dim", "p", "window"),
    # the threshold on either side of 128
    [(64, 0.3, (None, 0)), (64, 0.7, (100, 30)), (128, 0.3, (None, 0)), (256, 0.7, (None, 0))],
    ids=str,
)
def test_dropout_is_the_published_mask(machine, make, wrong, monkeypatch, head_dim, p, window):
    state = torch.tensor([-(2**50) + 3, 11])
    monkeypatch.setattr("attnbench.impls.flash_api.call.draw_dropout_state", lambda device: state)
    problem = make(150, 200, 2, 1, head_dim, left=window[0], right=window[1])
    keep = flash_api.dropout_keep_mask(*state.tolist(), 1, 2, 150, 200, p)
    dropped = keep, 1 - flash_api.dropout_effective_p(p)
    assert wrong(problem, flash_attention, dropped=dropped, window=window, dropout_p=p) == []


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("right", [None, 200], ids=str)
def test_keys_past_the_end_weigh_nothing(machine, make, wrong, head_dim, right):
    """Of rows whose every score is far below 0, the score. The copy engine fills such keys with 0, and exp(0 - LSE)
    overflows."""
    problem = make(256, 200, head_dim=head_dim, right=right)
    problem.q = problem.q.abs() * 40
    problem.k = -problem.k.abs()
    assert wrong(problem, flash_attention, window=(None, right)) == []
