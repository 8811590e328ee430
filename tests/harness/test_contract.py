"""Capabilities: every declared limit gives its own reason, and only where it is broken."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.contract import (
    CONTRACT_VERSION,
    Capabilities,
    Device,
    Implementation,
    Prepared,
    missing_module,
)
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem

HOPPER = Device("cuda", 1, "NVIDIA H200", (9, 0))
CPU = Device("cpu")
EASY = Problem(1, 4, 128, 64)


class Plugin(Implementation):
    contract = CONTRACT_VERSION
    capabilities = Capabilities()

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        return Prepared(attend=lambda q, k, v: q)


@pytest.mark.parametrize(
    ("capabilities", "problem", "device", "reason"),
    [
        ({}, {}, CPU, "runs on cuda, not cpu"),
        (
            {"compute_capability": ((8, 0), (8, 9))},
            {},
            HOPPER,
            "needs compute capability 8.0 to 8.9, this is 9.0",
        ),
        ({}, {"dtype": "fp32"}, HOPPER, "dtype fp32 not in fp16/bf16"),
        ({}, {"mask": Mask.window(5, 0)}, HOPPER, "mask window not in full/causal"),
        (
            {},
            {"mask": Mask.causal("top_left"), "seqlen_k": 256},
            HOPPER,
            "causal alignment top_left with seqlen_q != seqlen_k not in bottom_right",
        ),
        ({}, {"head_dim": 60, "head_dim_v": 64}, HOPPER, "head_dim 60 is not a multiple of 8"),
        ({}, {"head_dim_v": 264}, HOPPER, "head_dim_v 264 exceeds 256"),
        ({}, {"head_dim_v": 32}, HOPPER, "head_dim_v 32 differs from head_dim 64"),
        ({"gqa": False}, {"kv_heads": 2}, HOPPER, "kv_heads differs from heads (GQA)"),
        ({}, {"dropout_p": 0.25}, HOPPER, "dropout_p 0.25 is not supported"),
        ({"backward": False}, {"direction": "bwd"}, HOPPER, "has no backward pass"),
        ({}, {"seqlen_k": 0}, HOPPER, "sequence length 0 is below 1"),
        (
            {"contiguous_head_dim": True},
            {"strides": (("k", (32768, 1, 8192, 128)),)},
            HOPPER,
            "last dimension of k is not contiguous",
        ),
        (
            {"stride_multiple": 8},
            {"strides": (("q", (33280, 260, 65, 1)), ("dout", (33280, 260, 65, 1)))},
            HOPPER,
            "strides of q are not multiples of 8 elements",
        ),
    ],
)
def test_each_limit_gives_its_reason(capabilities, problem, device, reason):
    declared = Capabilities(**capabilities)
    posed = dataclasses.replace(EASY, **problem)
    assert reason in declared.reasons(posed, device)
    assert declared.reasons(EASY, HOPPER) == ([] if "compute_capability" not in capabilities else [reason])


@pytest.mark.parametrize(
    ("capabilities", "problem", "device"),
    [
        ({"devices": ("cuda", "cpu")}, {}, CPU),
        ({"devices": ("cpu",), "compute_capability": ((8, 0), (8, 9))}, {}, CPU),
        ({"compute_capability": ((9, 0), (9, 0))}, {}, HOPPER),
        ({}, {"mask": Mask.causal("top_left")}, HOPPER),
        ({"alignments": ("top_left",)}, {"seqlen_k": 256}, HOPPER),
        ({"alignments": ("top_left",)}, {"mask": Mask.causal("top_left"), "seqlen_k": 256}, HOPPER),
        ({"head_dim_multiple": 1}, {"head_dim": 61, "head_dim_v": 61}, HOPPER),
        ({"head_dim_v_differs": True}, {"head_dim_v": 256}, HOPPER),
        ({}, {"kv_heads": 1}, HOPPER),
        ({"dropout": True}, {"dropout_p": 0.5}, HOPPER),
        ({"min_seqlen": 0}, {"seqlen_q": 0}, HOPPER),
    ],
)
def test_what_is_declared_is_not_complained_of(capabilities, problem, device):
    assert Capabilities(**capabilities).reasons(dataclasses.replace(EASY, **problem), device) == []


@given(st.integers(1, 40), st.integers(1, 300))
def test_a_head_dim_is_refused_exactly_beyond_the_declared_limits(multiple, head_dim):
    declared = Capabilities(head_dim_multiple=multiple, max_head_dim=128)
    refused = bool(declared.reasons(Problem(1, 1, 8, head_dim), HOPPER))
    assert refused == (head_dim % multiple != 0 or head_dim > 128)


def test_all_reasons_are_given_at_once():
    problem = Problem(1, 4, 16, 60, kv_heads=2, dtype="fp64", mask=Mask.window(1, 1), dropout_p=0.1)
    assert len(Capabilities(gqa=False).reasons(problem, CPU)) == 7


def test_an_implementation_answers_by_its_capabilities():
    plugin = Plugin()
    assert plugin.unsupported_reasons(EASY, HOPPER) == []
    assert plugin.unavailable(HOPPER) is None
    unavailable = plugin.unavailable(CPU)
    assert (unavailable.reason, unavailable.fix) == (
        "runs on cuda, and this run is on cpu",
        "run with --device cuda",
    )
    assert plugin.version() == Plugin().version() != "unknown"
    plugin.package = "no-such-distribution-anywhere"
    assert plugin.version() == "unknown"


def test_prepare_must_be_written():
    class Lazy(Implementation):
        contract = CONTRACT_VERSION

    with pytest.raises(TypeError, match="prepare"):
        Lazy()


def test_devices_are_written_as_torch_writes_them():
    assert (str(HOPPER), str(CPU)) == ("cuda:1", "cpu")


def test_a_missing_module_comes_with_its_fix():
    assert missing_module("json", "") is None
    assert missing_module("json.decoder", "") is None
    for absent in ("no_such_module_anywhere", "no_such_package_anywhere.inner", "json.no_such_part"):
        found = missing_module(absent, "pip install it")
        assert found is not None
        assert found.fix == "pip install it"
        assert absent in found.reason
