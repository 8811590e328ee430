"""The GPUs that CUDA shows this process, in its order; asked of the driver, and no context is made."""

from __future__ import annotations

import ctypes
import uuid
from dataclasses import dataclass
from typing import Any

# Of CUdevice_attribute in cuda.h.
CAPABILITY = (75, 76)
NAME_BYTES = 100


@dataclass(frozen=True)
class Gpu:
    """uuid: as torch and ``nvidia-smi -L`` write it, without their prefix. capability: CUDA compute capability. driver:
    the driver's version, empty where NVML does not tell.
    """

    name: str
    uuid: str
    capability: tuple[int, int]
    driver: str


def visible_gpus() -> list[Gpu]:
    """The GPUs so that ``cuda:N`` is the N-th; none without a driver that answers.

    CUDA itself is asked: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are its to read, and NVML's order is another.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        _call(cuda.cuInit, 0)
        count = ctypes.c_int()
        _call(cuda.cuDeviceGetCount, ctypes.byref(count))
        driver = _driver_version() if count.value else ""
        return [_gpu(cuda, ordinal, driver) for ordinal in range(count.value)]
    except (OSError, AttributeError, CudaError):  # no driver, one of another age, or one without a device
        return []


class CudaError(Exception):
    """A driver call that answered with an error code."""


def _call(function: Any, *arguments: Any) -> None:
    if code := function(*arguments):
        raise CudaError(f"{getattr(function, '__name__', function)} answered {code}")


def _gpu(cuda: Any, ordinal: int, driver: str) -> Gpu:
    device, figure = ctypes.c_int(), ctypes.c_int()
    _call(cuda.cuDeviceGet, ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(NAME_BYTES)
    _call(cuda.cuDeviceGetName, name, NAME_BYTES, device)
    identity = (ctypes.c_ubyte * 16)()
    _call(cuda.cuDeviceGetUuid_v2, identity, device)
    capability = []
    for attribute in CAPABILITY:
        _call(cuda.cuDeviceGetAttribute, ctypes.byref(figure), attribute, device)
        capability.append(figure.value)
    return Gpu(
        name.value.decode(), str(uuid.UUID(bytes=bytes(identity))), (capability[0], capability[1]), driver
    )


def _driver_version() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""
    return version.decode() if isinstance(version, bytes) else version
