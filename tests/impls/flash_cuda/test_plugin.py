"""What flash-cuda declares and declines, and what its public call says where it cannot run."""

import pytest
import torch

from attnbench.harness.contract import Device
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls.flash_api import Options
from attnbench.impls.flash_cuda import flash_attention
from attnbench.impls.flash_cuda.backward import refuse
from attnbench.impls.flash_cuda.plugin import FlashCuda, deterministic

HOPPER = Device("cuda", capability=(9, 0))


def reasons(device=HOPPER, **changes):
    problem = Problem(**{"batch": 1, "heads": 2, "seqlen_q": 8, "head_dim": 64, "direction": "fwd"} | changes)
    return FlashCuda().unsupported_reasons(problem, device)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"direction": "fwd_bwd"},
        {"direction": "fwd_bwd", "head_dim": 256},
        {"head_dim": 256},
        {"head_dim": 192, "head_dim_v": 128},
        {"mask": Mask.parse("window(9,4)@top_left")},
        {"direction": "fwd_bwd", "dropout_p": 0.1},
        {"mask": Mask.parse("causal&blocks(random,64x32)")},
        {"direction": "fwd_bwd", "mask": Mask.parse("causal&blocks(random,64x64)")},
        {"dtype": "fp16"},
    ],
)
def test_what_it_computes(changes):
    assert reasons(**changes) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "fp32"}, "dtype fp32"),
        ({"head_dim": 20}, "multiple of 8"),
        ({"head_dim": 8}, "head_dim 8 is below 16"),
        ({"head_dim": 264}, "exceeds 256"),
        ({"mask": Mask.parse("blocks(random,96x128)")}, "mask blocks 96x128 are not multiples of 64x32"),
        ({"mask": Mask.parse("blocks(random,128x48)")}, "mask blocks 128x48 are not multiples of 64x32"),
        ({"direction": "bwd", "mask": Mask.parse("blocks(random,128x96)")}, "multiples of 64 keys, not 96"),
        ({"scale": 1e39}, "scale 1e+39 does not lie in 1.18e-38 to 2.36e+38"),
        ({"scale": 1e-46}, "scale 1e-46 does not lie in"),
        ({"device": Device("cuda", capability=(8, 0))}, "compute capability 9.0 to 9.0"),
        ({"device": Device("cuda", capability=(10, 0))}, "compute capability 9.0 to 9.0"),
    ],
)
def test_what_it_declines(changes, reason):
    assert any(reason in found for found in reasons(**changes))


def test_a_deterministic_one_has_gradients_under_a_band_alone():
    problem = {"batch": 1, "heads": 2, "seqlen_q": 8, "head_dim": 64}
    blocks = Mask.parse("blocks(random,128x128)")
    for direction, mask, declined in (
        ("fwd", blocks, 0),
        ("fwd_bwd", blocks, 1),
        ("fwd_bwd", Mask.parse("causal"), 0),
    ):
        found = deterministic.unsupported_reasons(Problem(**problem, direction=direction, mask=mask), HOPPER)
        assert len(found) == declined
    assert deterministic.repeats(HOPPER) == ("fwd", "bwd")
    assert deterministic.prepare(Problem(**problem), Device("cpu")).attend.keywords["deterministic"]


@pytest.mark.parametrize(
    ("block", "repeat", "message"),
    [
        ((64, 32), False, "block_mask: blocks of 64 x 32, allowed with gradients are multiples of 64 x 64"),
        ((32, 64), False, "block_mask: blocks of 32 x 64, allowed"),
        ((64, 64), True, "deterministic: got True"),
    ],
)
def test_gradients_that_are_not_offered_are_refused(block, repeat, message):
    q = torch.empty(1, 64, 2, 64, dtype=torch.float16)
    refuse(q, q, Options(None, None, True, 1.0, 0.1, (64, 64), False))
    refuse(q, q, Options(None, 0, True, 1.0, 0.1, (0, 0), True))
    with pytest.raises(ValueError, match=message):
        refuse(q, q, Options(None, None, True, 1.0, 0.0, block, repeat))


def test_it_is_available_where_it_computes_anything():
    assert FlashCuda().unavailable(HOPPER) is None
    older = FlashCuda().unavailable(Device("cuda", name="NVIDIA A100", capability=(8, 0)))
    assert older.reason == "NVIDIA A100 has compute capability 8.0, its kernels are for 9.0 to 9.0"
    assert FlashCuda().unavailable(Device("cuda", capability=(10, 0)))
    assert "runs on cuda" in FlashCuda().unavailable(Device("cpu")).reason


def test_blocks_outside_the_band_are_not_visited_and_those_inside_need_no_mask():
    mask = Mask.parse("causal&blocks(full,64x64)")
    problem = Problem(batch=1, heads=2, seqlen_q=256, head_dim=64, mask=mask)
    prepared = FlashCuda().prepare(problem, Device("cpu"))
    lists = prepared.attend.keywords["block_mask"].by_query
    assert lists.partial_count.tolist() == [[[1, 1, 1, 1]]]
    assert lists.partial_index[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert lists.full_count.tolist() == [[[0, 1, 2, 3]]]


def test_the_public_call_names_what_is_wrong():
    q = torch.zeros(1, 8, 2, 64, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"q: on a cpu device, allowed are CUDA devices of compute capability 9\.0"
    ):
        flash_attention(q, q, q)
    with pytest.raises(TypeError, match=r"q: got torch.float32, allowed are float16 and bfloat16"):
        flash_attention(q.float(), q.float(), q.float())


def test_the_operator_traces_without_a_device():
    """Fake kernels carry shapes and types, for torch.compile and for memory estimates."""
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 30, 4, 64, dtype=torch.float16, requires_grad=True)
        k = torch.empty(2, 50, 2, 64, dtype=torch.float16)
        v = torch.empty(2, 50, 2, 128, dtype=torch.float16)
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (2, 30, 4, 128)
    assert lse.shape == (2, 4, 30)
    assert lse.dtype == torch.float32
