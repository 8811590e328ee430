"""Ceilings: the arithmetic of a rate, and that the work behind it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from attnbench.harness.measure import ceilings
from attnbench.harness.measure.ceilings import CeilingProbe
from attnbench.harness.measure.timing import Turn

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "GEMM_SIZE", {"cpu": 100})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 10**6})


@pytest.fixture
def taken(small: None, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Callable[[], Any]]]:
    """Every call takes half a millisecond, then one, then two."""
    seen: list[Sequence[Callable[[], Any]]] = []

    def take_turn(calls: Sequence[Callable[[], Any]], **options: Any) -> Turn:
        seen.append(calls)
        return Turn([0.5, 1.0, 2.0][: len(calls)])

    monkeypatch.setattr(ceilings, "take_turn", take_turn)
    return seen


def test_a_gemm_is_two_n_cubed_in_decimal_teraflops(taken: list[Any]) -> None:
    # 2e6 FLOPs in a millisecond are 2e9 a second.
    assert CeilingProbe(torch.float32, CPU).gemm_tflops(3) == pytest.approx([4e-3, 2e-3, 1e-3])


def test_a_copy_counts_what_is_read_and_what_is_written_in_decimal_gigabytes(taken: list[Any]) -> None:
    # 1 MB read and 1 MB written in a millisecond are 2 GB a second.
    assert CeilingProbe(torch.float32, CPU).copy_gbs(3) == pytest.approx([4.0, 2.0, 1.0])


def test_the_work_is_done(taken: list[Any]) -> None:
    probe = CeilingProbe(torch.float32, CPU)
    probe._product.zero_()
    probe._target.zero_()
    probe.gemm_tflops(1)
    probe.copy_gbs(1)
    for (call,) in taken:
        call()
    torch.testing.assert_close(probe._product, probe._a @ probe._b)
    assert probe._a.std() > 0.5  # random operands: power, and so the clock, depends on them
    assert torch.equal(probe._target, probe._source)
    assert probe._target.data_ptr() != probe._source.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rates_come_in_every_dtype(small: None, dtype: torch.dtype) -> None:
    probe = CeilingProbe(dtype, CPU)
    assert probe._product.dtype == dtype
    for rates in (probe.gemm_tflops(2), probe.copy_gbs(2)):
        assert len(rates) == 2
        assert all(rate > 0 for rate in rates)
