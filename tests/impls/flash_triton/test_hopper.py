"""The warp-specialised kernels, which the interpreter cannot run: on a Hopper GPU, the same judgements."""

import pytest
import torch

from attnbench.impls.flash_triton import configs, flash_attention, hopper, launch

H200 = configs.Device((9, 0), 132)


@pytest.fixture
def specialised(monkeypatch):
    for switch in ("HOPPER_FORWARD", "HOPPER_DROPOUT", "HOPPER_BACKWARD"):
        monkeypatch.setattr(configs, switch, True)
    for chosen in (configs.forward_config, configs.backward_config):
        chosen.cache_clear()
    yield
    for chosen in (configs.forward_config, configs.backward_config):
        chosen.cache_clear()


def shape(**changes):
    usual = {
        "batch": 2, "heads": 8, "kv_heads": 4, "seqlen_q": 1000, "seqlen_k": 1000, "head_dim": 128, "head_dim_v": 128,
        "itemsize": 2, "causal": False, "banded": False, "dropout": False, "mask_block": (0, 0), "tma_able": True,
    }  # fmt: skip
    return configs.Shape(**usual | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_block": (128, 128)},
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
    assert configs.backward_config(H200, shape(), True).hopper is None
    assert configs.forward_config(H200, shape(**changes)).hopper is None
    assert configs.forward_config(configs.Device((8, 0), 108), shape()).hopper is None


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_kernel_that_has_not_passed_on_hardware_stays_off(head_dim):
    long = {"head_dim": head_dim, "head_dim_v": head_dim, "seqlen_q": 8192, "seqlen_k": 8192}
    assert configs.forward_config(H200, shape(**long)).hopper is not None
    assert configs.forward_config(H200, shape(dropout=True, **long)).hopper is None
    assert configs.backward_config(H200, shape(**long), False).hopper is None


@pytest.mark.parametrize(
    ("changes", "specialised_wins"),
    [({}, True), ({"causal": True, "banded": True}, False), ({"seqlen_k": 1024}, False)],
    ids=str,
)
def test_head_dim_64_is_specialised_only_where_that_is_faster(changes, specialised_wins):
    usual = {"head_dim": 64, "head_dim_v": 64, "seqlen_q": 8192, "seqlen_k": 8192}
    assert (configs.forward_config(H200, shape(**usual | changes)).hopper is not None) == specialised_wins


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "window", "alignment"),
    [
        (512, 512, (None, None), "bottom_right"),
        (300, 500, (None, 0), "bottom_right"),
        (500, 300, (None, 0), "bottom_right"),
        (130, 70, (None, 0), "top_left"),
        (400, 400, (100, 30), "bottom_right"),
        (400, 333, (50, None), "bottom_right"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_fp64(specialised, make, wrong, dtype, head_dim, seqlen_q, seqlen_k, window, alignment):
    if launch.device_of("cuda", 0).capability[0] != 9 or not hopper.available():
        pytest.skip("needs a Hopper GPU and Gluon")
    shift = None if alignment == "bottom_right" else 0
    problem = make(
        seqlen_q, seqlen_k, 4, 2, head_dim, batch=2, dtype=dtype, left=window[0], right=window[1], shift=shift
    )
    for _ in range(3):
        assert wrong(problem, flash_attention, window=window, alignment=alignment) == []
