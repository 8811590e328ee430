"""The GPUs that CUDA would show this process, asked of the driver: cheap, and no CUDA context is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """capability: CUDA compute capability. driver: the driver's version."""

    name: str
    uuid: str
    capability: tuple[int, int]
    driver: str


def visible_gpus() -> list[Gpu]:
    """The GPUs in CUDA's order, so that ``cuda:N`` is the N-th; none without a driver that answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = [
            Gpu(
                _text(pynvml.nvmlDeviceGetName(handle)),
                _text(pynvml.nvmlDeviceGetUUID(handle)),
                tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                driver,
            )
            for handle in handles
        ]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
    return left_visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def left_visible(found: Sequence[Gpu], chosen: str | None) -> list[Gpu]:
    """``found`` as CUDA_VISIBLE_DEVICES = ``chosen`` leaves it: indices or UUID prefixes, up to one that is none."""
    if chosen is None:
        return list(found)
    left: list[Gpu] = []
    for word in (part.strip() for part in chosen.split(",")):
        matches = [
            gpu for i, gpu in enumerate(found) if word == str(i) or (word and gpu.uuid.startswith(word))
        ]
        if len(matches) != 1:
            break
        left.append(matches[0])
    return left


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
