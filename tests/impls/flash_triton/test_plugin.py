"""The harness adapter: what it declares, and that a Problem's words reach the kernel with their meaning."""

import pytest
import torch

from attnbench.harness.contract import Device
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls.flash_api.scale import LARGEST_SCALE, SMALLEST_SCALE
from attnbench.impls.flash_triton.plugin import FlashTriton, deterministic

H200 = Device("cuda", capability=(9, 0))


@pytest.mark.parametrize(
    "mask",
    ["full", "causal", "causal@top_left", "window(9,4)", "blocks(random,32x64,density=0.5,per_head=1)",
     "causal&blocks(butterfly,32x32)"],
)  # fmt: skip
def test_masks_mean_what_the_harness_means(make, wrong, device, mask):
    problem = Problem(1, 2, 70, 16, seqlen_k=100, dtype="fp16", mask=Mask.parse(mask))
    assert FlashTriton().unsupported_reasons(problem, H200) == []
    tensors = make(70, 100, 2)
    tensors.visible = problem.mask.dense(torch.arange(70, device=device), 2, 70, 100)[None]
    prepared = FlashTriton().prepare(problem, Device(device))

    def attend(q, k, v, return_lse):
        return prepared.attend_with_lse(q, k, v)

    assert wrong(tensors, attend) == []
    q, k, v = tensors.q, tensors.k, tensors.v
    assert torch.equal(prepared.attend(q, k, v), prepared.attend_with_lse(q, k, v)[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 8}, "head_dim 8 is below 16"),
        ({"head_dim": 20}, "multiple of 8"),
        ({"head_dim": 264}, "exceeds 256"),
        ({"scale": -1.0}, "scale -1 is not positive"),
        ({"scale": 1e39}, "scale 1e+39 does not lie in 1.18e-38 to 2.36e+38"),
        ({"scale": 1e-46}, "scale 1e-46 does not lie in"),
        ({"dtype": "fp64"}, "dtype fp64"),
        ({"mask": Mask.parse("blocks(random,16x64)")}, "16x64 are not multiples of 32"),
    ],
)
def test_what_it_declines(changes, reason):
    problem = Problem(**{"batch": 1, "heads": 2, "seqlen_q": 8, "head_dim": 16} | changes)
    assert any(reason in found for found in FlashTriton().unsupported_reasons(problem, H200))


def test_it_is_available_where_it_computes_anything():
    assert FlashTriton().unavailable(H200) is None
    older = FlashTriton().unavailable(Device("cuda", name="Tesla T4", capability=(7, 5)))
    assert older.reason.startswith("Tesla T4 has compute capability 7.5, its kernels are for 8.0")


@pytest.mark.parametrize("scale", [SMALLEST_SCALE, 1.0, LARGEST_SCALE])
def test_it_declines_no_scale_that_the_call_takes(scale):
    assert FlashTriton().unsupported_reasons(Problem(1, 2, 8, 16, scale=scale), H200) == []


@pytest.mark.parametrize("plugin", [FlashTriton(), deterministic], ids=lambda plugin: plugin.name)
def test_only_the_variant_asks_for_determinism(plugin):
    prepared = plugin.prepare(Problem(1, 2, 70, 16, dtype="fp16"), Device("cuda", capability=(9, 0)))
    assert prepared.attend.keywords["deterministic"] == plugin.name.endswith("-deterministic")
