"""The GPUs as CUDA counts them, asked of a stand-in for its driver."""

from __future__ import annotations

import ctypes
import uuid
from typing import Any

import pytest

from attnbench.harness.run import gpus
from attnbench.harness.run.gpus import Gpu, visible_gpus

UUIDS = [uuid.UUID(int=number) for number in (7, 9)]


class Driver:
    """libcuda with two GPUs; device handles are not their ordinals."""

    def __init__(self) -> None:
        self.init = 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(UUIDS)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 40 + ordinal
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = f"card {device.value}".encode()
        return 0

    def cuDeviceGetUuid_v2(self, identity: Any, device: Any) -> int:  # noqa: N802
        identity[:] = UUIDS[device.value - 40].bytes
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: device.value - 40}[attribute]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    monkeypatch.setattr(gpus, "_driver_version", lambda: "580.1")
    return made


def test_gpus_come_in_cuda_s_order_with_the_uuid_that_torch_writes(driver: Driver) -> None:
    assert visible_gpus() == [
        Gpu("card 40", str(UUIDS[0]), (9, 0), "580.1"),
        Gpu("card 41", str(UUIDS[1]), (9, 1), "580.1"),
    ]


@pytest.mark.parametrize("code", [100, 999], ids=["no device", "unknown"])
def test_a_driver_that_does_not_answer_shows_none(driver: Driver, code: int) -> None:
    driver.init = code
    assert visible_gpus() == []


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert visible_gpus() == []


@pytest.mark.gpu
def test_they_are_torch_s_gpus() -> None:
    import torch

    there = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    assert [(gpu.name, gpu.uuid, gpu.capability) for gpu in visible_gpus()] == [
        (one.name, str(one.uuid), (one.major, one.minor)) for one in there
    ]
    assert all(gpu.driver for gpu in visible_gpus())
