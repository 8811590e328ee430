"""Guard bands: a write or a read that leaves a tensor is seen, wherever the memory came from."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.checks import guard_bands
from attnbench.harness.conform.examine import Outcome
from attnbench.harness.conform.mutants.plain import Plain, Steps
from attnbench.harness.conform.verdict import Verdict
from attnbench.harness.contract import Device, Implementation, Prepared
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem

Examine = Callable[[Implementation, Case], Outcome]
CASE = Case(
    Problem(1, 2, 20, 16, seqlen_k=24, dtype="fp32", mask=Mask.causal(), direction="fwd_bwd"),
    "bands", "a test of what is seen outside of a tensor", suite="memory", check="guard_bands",
)  # fmt: skip

FULL = dataclasses.replace(CASE, problem=dataclasses.replace(CASE.problem, mask=Mask.full()))


@torch.library.custom_op("attnbench_tests::copy_with_overrun", mutates_args=())
def copy_with_overrun(x: Tensor, at: int) -> Tensor:
    """A copy in memory of its own, and 1.0 written at element ``at``, counted from the copy's end or before its start.

    A plain copy where there are no guard bands: the write would land in somebody else's memory.
    """
    if not hasattr(torch.empty_like, "__wrapped__"):
        return x.clone()
    out = torch.empty_like(x)
    out.copy_(x)
    element = out.numel() + at if at >= 0 else at
    ctypes.c_float.from_address(out.data_ptr() + 4 * element).value = 1.0
    return out


def overruns(at: int) -> type[Steps]:
    class Overruns(Steps):
        def write(self, name: str, x: Tensor, like: Tensor) -> Tensor:
            result = super().write(name, x, like)
            return copy_with_overrun(result, at) if name == "out" else result

    return Overruns


@pytest.mark.parametrize(("at", "element"), [(0, 640), (5, 645), (-1, -1), (-200, -200)])
def test_a_write_outside_of_what_an_operator_allocates_is_seen(
    examine_on_cpu: Examine, at: int, element: int
) -> None:
    outcome = examine_on_cpu(Plain("overruns", overruns(at)), CASE)
    assert outcome.verdict is Verdict.FAIL
    assert outcome.reason == f"writes outside of memory it allocated, at element {element} of it"


def test_memory_that_an_operator_never_writes_is_nan(examine_on_cpu: Examine) -> None:
    class NeverWritten(Steps):
        def write(self, name: str, x: Tensor, like: Tensor) -> Tensor:
            result = super().write(name, x, like)
            if name == "dk":
                fresh = torch.empty_like(result)
                fresh[:, 1:] = result[:, 1:]
                return fresh
            return result

    outcome = examine_on_cpu(Plain("never", NeverWritten), CASE)
    assert outcome.verdict is Verdict.FAIL
    assert "dk[0, 0, 0, 0] is nan" in outcome.reason


def test_memory_asked_for_as_zeros_is_zero(examine_on_cpu: Examine) -> None:
    class Accumulates(Steps):
        def write(self, name: str, x: Tensor, like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=like.dtype).add_(super().write(name, x, like))

    assert examine_on_cpu(Plain("sums", Accumulates), CASE).verdict is Verdict.PASS


def test_a_guarded_tensor_is_the_tensor_it_stands_for() -> None:
    like = torch.randn(2, 5, 3, 4).transpose(1, 2)
    for apart in (True, False):
        band = guard_bands.Guarded("x", like.shape, like.stride(), like.dtype, like.device, apart=apart)
        band.tensor.copy_(like)
        assert torch.equal(band.tensor, like)
        assert band.tensor.stride() == like.stride()
        assert band.written() is None
        assert band.tensor.storage_offset() == (0 if apart else guard_bands.BAND)


def test_what_a_compiler_asks_for_without_memory_is_let_through() -> None:
    with guard_bands._Allocations() as allocations, FakeTensorMode():
        assert torch.empty(3).new_empty(4).shape == (4,)
    assert not allocations.guarded


def test_torchs_functions_are_given_back() -> None:
    before = torch.empty, torch.zeros_like, torch.Tensor.new_empty
    with guard_bands._Allocations() as allocations:
        assert torch.ones(3).new_empty(4).isnan().all()
    assert (torch.empty, torch.zeros_like, torch.Tensor.new_empty) == before
    assert "new_empty" not in vars(torch.Tensor)
    assert len(allocations.guarded) == 1


class Compiled(Plain):
    """Asks torch for memory inside what it compiles."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        @torch.compile(backend="eager", fullgraph=True, dynamic=False)
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.softmax_scale
            out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
            return out + torch.empty(out.shape).zero_() + torch.zeros_like(out)

        return Prepared(attend)


def test_what_is_compiled_is_not_traced_through_the_guards(examine_on_cpu: Examine) -> None:
    outcome = examine_on_cpu(Compiled(), FULL)
    assert outcome.verdict is Verdict.PASS, outcome.reason
