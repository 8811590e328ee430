"""Memory: a call that is known to need so much is measured to need so much; on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnbench.harness.measure import memory
from attnbench.harness.measure.memory import MIB, peak_of

CPU = torch.device("cpu")


def floats(mib: float) -> torch.Tensor:
    return torch.ones(int(mib * MIB / 4), dtype=torch.float32)


def peak(call: Callable[[], object]) -> float:
    measured = peak_of(call, CPU).peak_mib
    assert measured is not None
    return measured


def test_the_result_is_what_the_call_returned() -> None:
    assert peak_of(lambda: "answer", CPU).result == "answer"


def test_a_call_that_allocates_nothing_needs_nothing() -> None:
    held = floats(8)
    assert peak(lambda: held.add_(1)) == pytest.approx(0.0, abs=0.1)


def test_a_result_counts() -> None:
    assert peak(lambda: floats(16)) == pytest.approx(16.0, rel=0.03)


def test_a_workspace_counts_although_it_is_given_back() -> None:
    def call() -> torch.Tensor:
        workspace = floats(24)
        workspace.add_(1)
        del workspace
        return floats(4)

    assert peak(call) == pytest.approx(24.0, rel=0.03)


def test_what_is_held_together_adds_up_and_what_follows_does_not() -> None:
    def together() -> float:
        first, second = floats(8), floats(8)
        return float(first[0] + second[0])

    def in_turn() -> float:
        return float(floats(8)[0]) + float(floats(8)[0])

    assert peak(together) == pytest.approx(16.0, rel=0.03)
    assert peak(in_turn) == pytest.approx(8.0, rel=0.03)


def test_what_was_held_before_does_not_count() -> None:
    held = [floats(32)]

    def call() -> torch.Tensor:
        held.clear()
        return floats(8)

    assert peak(call) <= 8.3


def test_scores_in_memory_show_as_quadratic_and_one_row_at_a_time_as_linear() -> None:
    def materialised(q: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ q.T, dim=-1) @ q

    def by_rows(q: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        for begin in range(0, len(q), 64):
            rows = q[begin : begin + 64]
            out[begin : begin + 64] = torch.softmax(rows @ q.T, dim=-1) @ q
        return out

    def growth(attend: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Of the peak, when the sequence is four times as long."""
        short, long = (torch.ones(n, 16) for n in (256, 1024))
        return peak(lambda: attend(long)) / peak(lambda: attend(short))

    assert growth(materialised) == pytest.approx(16.0, rel=0.1)
    assert growth(by_rows) == pytest.approx(4.0, rel=0.1)


def test_the_system_sees_what_bypasses_torch() -> None:
    taken: list[bytearray] = []
    measured = peak_of(lambda: taken.append(bytearray(b"x" * (64 * MIB))), CPU)
    assert measured.peak_mib == pytest.approx(0.0, abs=0.1)
    if measured.driver_mib is not None:
        assert 60 < measured.driver_mib < 200


def test_where_the_system_tells_nothing_the_figure_is_missing_and_not_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_reset_high_water", lambda: None)
    measured = peak_of(lambda: floats(4), CPU)
    assert measured.driver_mib is None
    assert measured.peak_mib == pytest.approx(4.0, rel=0.05)


def test_an_exception_of_the_call_passes() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_of(lambda: 1 / 0, CPU)
    assert peak(lambda: floats(4)) == pytest.approx(4.0, rel=0.05)
