"""Joules over a window of calls, with a counter and a stream that stand in for a card's."""

from __future__ import annotations

import pytest
import torch

from attnbench.harness.measure import clocks
from attnbench.harness.measure.clocks import ClockReader
from attnbench.harness.measure.energy import energy_of

DEVICE = torch.device("cuda:0")


class Counter:
    """A card that uses a joule whenever its counter is read, or one that counts nothing."""

    def __init__(self, counts: bool = True) -> None:
        self.joules, self.counts = 100.0, counts

    def energy_j(self) -> float | None:
        self.joules += 1
        return self.joules if self.counts else None


class Marker:
    def synchronize(self) -> None: ...
    def record(self) -> None: ...


@pytest.fixture(autouse=True)
def _stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", Marker)


def test_calls_rotate_for_the_whole_window_and_are_counted() -> None:
    made: list[str] = []
    calls = [lambda: made.append("a"), lambda: made.append("b")]
    found = energy_of(calls, 10.0, DEVICE, Counter(), window_s=0.02)
    assert found is not None
    assert found.calls == len(made) > 0
    assert found.calls % 5 == 0  # batches of 50 ms
    assert found.seconds >= 0.02
    assert found.joules == 1
    assert abs(made.count("a") - made.count("b")) <= 1


def test_a_card_that_counts_no_energy_gives_no_figure() -> None:
    assert energy_of([lambda: None], 1.0, DEVICE, None) is None
    assert energy_of([lambda: None], 1.0, DEVICE, Counter(counts=False)) is None


def test_the_counter_is_in_joules_and_absent_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ClockReader("no such card")
    assert reader.energy_j() is None
    monkeypatch.setattr(reader, "_handle", object())
    monkeypatch.setattr(
        reader, "_nvml", type("Nvml", (), {"nvmlDeviceGetTotalEnergyConsumption": None}), raising=False
    )
    monkeypatch.setattr(reader, "_ask", lambda *_: 2500)
    assert clocks.ClockReader.energy_j(reader) == 2.5
