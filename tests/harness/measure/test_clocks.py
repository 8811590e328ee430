"""Clocks: medians and reason bits from a made-up NVML, and None with the reason where there is none."""

from __future__ import annotations

import itertools
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from attnbench.harness.measure.clocks import MOST_READINGS, SLOWING_REASONS, ClockReader, Clocks

UUID = "12345678-aaaa"


class NvmlError(Exception):
    pass


class FakeNvml(ModuleType):
    """One GPU; readings are taken in turn from lists, over and over."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.asked: list[str] = []
        self.mhz: Any = itertools.repeat(1980)
        self.milliwatts: Any = itertools.repeat(700_000)
        self.celsius: Any = itertools.repeat(60)
        self.reasons: Any = itertools.repeat(0)
        self.pids: list[int] = []
        self.NVMLError = NvmlError

    def nvmlInit(self) -> None: ...  # noqa: N802 - NVML's names

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        if UUID not in uuid:
            raise NvmlError("Not Found")
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        assert (handle, kind) == ("handle", self.NVML_CLOCK_SM)
        return next(self.mhz)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return next(self.milliwatts)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return next(self.celsius)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return next(self.reasons)

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.1"

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return 1980

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in self.pids]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    made = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def after(readings: float) -> Any:
    """A ``done`` that comes after so many readings of four figures; it is not asked for in the first."""
    count = itertools.count(4)
    return lambda: next(count) >= 4 * readings


@pytest.mark.parametrize("uuid", [UUID, f"GPU-{UUID}"])
def test_the_gpu_is_found_by_the_uuid_of_cuda(nvml: FakeNvml, uuid: str) -> None:
    assert ClockReader(uuid).why == ""
    assert nvml.asked == [f"GPU-{UUID}"]


def test_a_turn_is_the_median_of_its_readings(nvml: FakeNvml) -> None:
    nvml.mhz = iter([1980, 1200, 1700])
    nvml.milliwatts = iter([100_000, 690_040, 700_000])
    nvml.celsius = iter([40, 61, 60])
    assert ClockReader(UUID).read_during(after(3)) == Clocks(1700, 690.0, 60, 0)


@pytest.mark.parametrize("part", [0.25, 0.75])
def test_a_reading_that_the_end_comes_upon_is_left_unfinished(nvml: FakeNvml, part: float) -> None:
    nvml.mhz = iter([1980, 1200])
    nvml.milliwatts = itertools.chain([700_000], itertools.repeat(100_000))
    nvml.celsius, nvml.reasons = itertools.chain([60], itertools.repeat(40)), iter([0x4])
    assert ClockReader(UUID).read_during(after(1 + part)) == Clocks(1980, 700.0, 60, 0x4)


def test_every_throttle_reason_seen_is_kept(nvml: FakeNvml) -> None:
    nvml.reasons = itertools.chain([0x4, 0x0, 0x20, 0x1], itertools.repeat(0))
    throttle = ClockReader(UUID).read_during(after(6)).throttle
    assert throttle == 0x25
    assert throttle & SLOWING_REASONS == 0x24  # idle is no slowing


def test_there_is_at_least_one_reading_and_never_too_many(nvml: FakeNvml) -> None:
    counted = itertools.count()
    nvml.mhz = counted
    assert ClockReader(UUID).read_during(lambda: True).sm_mhz == 0
    assert next(counted) == 1
    ClockReader(UUID).read_during(lambda: False)
    assert next(counted) == 2 + MOST_READINGS


def test_facts_of_the_card(nvml: FakeNvml) -> None:
    assert ClockReader(UUID).facts() == {"driver": "580.1", "max_sm_mhz": 1980, "power_limit_w": 700.0}


# ---- without NVML -----------------------------------------------------------------------------------------


def unread(reader: ClockReader) -> bool:
    return reader.read_during(lambda: False) == Clocks(None, None, None, None) and reader.facts() == {}


def test_without_the_library_every_reading_is_none_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    reader = ClockReader(UUID)
    assert "no NVML readings: " in reader.why
    assert "pynvml" in reader.why
    assert unread(reader)
    assert reader.foreign_processes({1}) is None


def test_without_a_driver_every_reading_is_none_with_the_reason(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NvmlError("Driver Not Loaded")

    monkeypatch.setattr(nvml, "nvmlInit", fail)
    reader = ClockReader(UUID)
    assert reader.why == "no NVML readings: Driver Not Loaded"
    assert unread(reader)


def test_a_device_that_nvml_does_not_know_is_not_read(nvml: FakeNvml) -> None:
    reader = ClockReader("MIG-other")
    assert reader.why == "no NVML readings: Not Found"
    assert unread(reader)


# ---- other processes --------------------------------------------------------------------------------------


def test_foreign_processes_are_named_and_own_ones_are_not(nvml: FakeNvml) -> None:
    parent = os.getppid()
    nvml.pids = [999_999_999, os.getpid(), parent]
    found = ClockReader(UUID).foreign_processes({os.getpid(), 5})
    assert [line.split()[0] for line in found] == [str(parent), "999999999"]
    assert found[1] == "999999999 (gone)"
    with open(f"/proc/{parent}/comm") as file:  # noqa: PTH123 - one line
        assert found[0] == f"{parent} {file.read().strip()}"


def test_alone_on_the_card_there_is_none(nvml: FakeNvml) -> None:
    nvml.pids = [10, 11]
    assert ClockReader(UUID).foreign_processes({10, 11, 12}) == []


def test_in_a_container_whose_pids_are_not_the_hosts_nothing_is_claimed(nvml: FakeNvml) -> None:
    nvml.pids = [40_010, 40_011]
    assert ClockReader(UUID).foreign_processes({10, 11}) is None


# ---- a card that offers only some readings ----------------------------------------------------------------


def not_supported(*_: object) -> int:
    raise NvmlError("Not Supported")


def test_a_reading_that_the_card_does_not_offer_is_none_and_the_others_stay(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", not_supported)
    monkeypatch.setattr(nvml, "nvmlDeviceGetEnforcedPowerLimit", not_supported)
    reader = ClockReader(UUID)
    assert reader.read_during(after(3)) == Clocks(1980, None, 60, 0)
    assert reader.facts() == {"driver": "580.1", "max_sm_mhz": 1980, "power_limit_w": None}


def test_a_card_that_does_not_list_its_processes_tells_nothing(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeRunningProcesses", not_supported)
    assert ClockReader(UUID).foreign_processes({1}) is None
