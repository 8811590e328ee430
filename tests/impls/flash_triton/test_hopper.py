"""The warp-specialised kernels, which the interpreter cannot run: on a Hopper GPU, the same judgements."""

from dataclasses import replace

import pytest
import torch
import triton

from attnbench.impls import flash_api
from attnbench.impls.flash_api import call
from attnbench.impls.flash_triton import configs, flash_attention, hopper, launch

H200 = configs.Device((9, 0), 132)


@pytest.fixture
def specialised(monkeypatch):
    monkeypatch.setattr(configs, "HOPPER_WHEREVER_POSSIBLE", True)
    of_hardware = launch.device_for
    few = 3  # so that each program of a forward computes several tiles
    monkeypatch.setattr(launch, "device_for", lambda *of: replace(of_hardware(*of), sms=few))
    launch.forget_plans()
    yield
    launch.forget_plans()


def shape(**changes):
    usual = {
        "batch": 2, "heads": 8, "kv_heads": 4, "seqlen_q": 1000, "seqlen_k": 1000, "head_dim": 128, "head_dim_v": 128,
        "itemsize": 2, "causal": False, "banded": False, "dropout": False, "mask_block": (0, 0), "tma_able": True,
    }  # fmt: skip
    return configs.Shape(**usual | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_block": (64, 128)},
        {"mask_block": (128, 32)},
        {"itemsize": 4},
        {"tma_able": False},
        {"head_dim": 96},
        {"head_dim_v": 64},
        {"seqlen_q": 1},
    ],
    ids=str,
)
def test_what_falls_back_to_the_portable_kernels(specialised, changes):
    assert configs.forward_config(H200, shape()).hopper is not None
    assert configs.backward_config(H200, shape(), False).hopper is not None
    assert configs.forward_config(H200, shape(**changes)).hopper is None
    assert configs.forward_config(configs.Device((8, 0), 108), shape()).hopper is None


def test_the_triton_that_is_installed_has_the_gluon_they_are_written_in():
    """A mistake in a kernel's module would otherwise pass for an old Triton, and the portable kernels would serve."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip("needs Triton 3.6")
    assert hopper.available()


@pytest.mark.parametrize(
    ("head_dim", "seqlen", "causal", "specialised_wins"),
    [
        (64, 512, False, False), (64, 1024, True, True), (64, 8192, False, True),
        (128, 512, False, False), (128, 1024, False, True), (128, 2048, True, True),
        (256, 512, True, True), (256, 8192, False, True),
    ],
)  # fmt: skip
def test_a_backward_is_specialised_only_where_that_is_faster(head_dim, seqlen, causal, specialised_wins):
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim, "seqlen_q": seqlen, "seqlen_k": seqlen}
    posed = shape(causal=causal, banded=causal, **sizes)
    assert (configs.backward_config(H200, posed, False).hopper is not None) == specialised_wins


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_deterministic_backward_adds_to_nothing_in_memory(specialised, head_dim):
    posed = shape(head_dim=head_dim, head_dim_v=head_dim)
    assert configs.backward_config(H200, posed, False).hopper.fused
    config = configs.backward_config(H200, posed, True)
    assert config.hopper == (configs.HopperBackward(64, 2, False) if head_dim == 256 else None)


@pytest.mark.parametrize(
    ("changes", "consumers"),
    [
        ({}, 3),
        ({"causal": True, "banded": True}, 3),
        ({"seqlen_q": 1024}, 2),
        ({"mask_block": (128, 128)}, None),
    ],
    ids=str,
)
def test_head_dim_64_is_specialised_only_where_that_is_faster(changes, consumers):
    usual = {"head_dim": 64, "head_dim_v": 64, "seqlen_q": 8192, "seqlen_k": 8192}
    hopper = configs.forward_config(H200, shape(**usual | changes)).hopper
    assert (hopper and hopper.consumers) == consumers


def need_hopper():
    if launch.device_of("cuda", 0).capability[0] != 9 or not hopper.available():
        pytest.skip("needs a Hopper GPU and Gluon")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (100, 30)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.7])  # the threshold on either side of 128
def test_dropout_is_the_published_mask(specialised, make, wrong, monkeypatch, head_dim, window, p):
    need_hopper()
    seed, offset = -(2**50) + 3, 11
    state = torch.tensor([seed, offset], dtype=torch.int64, device="cuda")
    monkeypatch.setattr(call, "draw_dropout_state", lambda device: state)
    problem = make(300, 500, 4, 2, head_dim, batch=2, dtype=torch.bfloat16, left=window[0], right=window[1])
    keep = flash_api.dropout_keep_mask(seed, offset, 2, 4, 300, 500, p, device="cuda")
    dropped = keep, 1 - flash_api.dropout_effective_p(p)
    assert wrong(problem, flash_attention, dropped=dropped, window=window, dropout_p=p) == []


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (100, 30)], ids=str)
@pytest.mark.parametrize("lead", [(), (2, 4)], ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(512, 768), (500, 700)])
def test_block_lists(specialised, make, wrong, head_dim, window, lead, seqlen_q, seqlen_k):
    """Partial blocks under the band, full ones beyond it, a row of blocks without any, ragged last blocks."""
    need_hopper()
    blocks = torch.rand(*lead, 4, 6, device="cuda") < 0.5
    blocks[..., 1, :] = False
    blocks[..., 0, 0] = True
    full = blocks & (torch.rand(blocks.shape, device="cuda") < 0.5)
    problem = make(
        seqlen_q, seqlen_k, 4, 2, head_dim, batch=2, dtype=torch.bfloat16, left=window[0], right=window[1]
    )
    partial, whole = (
        x.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :seqlen_q, :seqlen_k]
        for x in (blocks, full)
    )
    problem.visible = (problem.visible & partial) | whole
    mask = flash_api.BlockMask.from_dense(blocks, full=full)
    assert wrong(problem, flash_attention, window=window, block_mask=mask) == []


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(None, None), (None, 0), (100, 30)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_wide_heads_with_a_kernel_for_dq(specialised, make, wrong, monkeypatch, window, p):
    """What a deterministic backward runs at head_dim 256; the other tests run the fused kernel there."""
    need_hopper()
    state = torch.tensor([5, 11], dtype=torch.int64, device="cuda")
    monkeypatch.setattr(call, "draw_dropout_state", lambda device: state)
    problem = make(300, 500, 4, 2, 256, batch=2, dtype=torch.bfloat16, left=window[0], right=window[1])
    keep = flash_api.dropout_keep_mask(5, 11, 2, 4, 300, 500, p, device="cuda")
    dropped = (keep, 1 - flash_api.dropout_effective_p(p)) if p else ()
    asked = {"window": window, "dropout_p": p, "deterministic": True}
    assert wrong(problem, flash_attention, dropped=dropped, **asked) == []


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "window", "alignment"),
    [
        (512, 512, (None, None), "bottom_right"),
        (300, 500, (None, 0), "bottom_right"),
        (500, 300, (None, 0), "bottom_right"),
        (130, 70, (None, 0), "top_left"),
        (128, 500, (None, 5), "top_left"),  # keys that no query sees, from amid a tile of queries
        (400, 400, (100, 30), "bottom_right"),
        (400, 333, (50, None), "bottom_right"),
        (1100, 900, (None, 0), "bottom_right"),  # more rows than two consumers have at head_dim 64
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_fp64(specialised, make, wrong, dtype, head_dim, seqlen_q, seqlen_k, window, alignment):
    need_hopper()
    shift = None if alignment == "bottom_right" else 0
    problem = make(
        seqlen_q, seqlen_k, 4, 2, head_dim, batch=2, dtype=dtype, left=window[0], right=window[1], shift=shift
    )
    for _ in range(3):
        assert wrong(problem, flash_attention, window=window, alignment=alignment) == []
