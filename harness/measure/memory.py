"""How much memory a call needs beyond its inputs: torch's allocator's peak, and the driver's or the system's figure.

The second catches what bypasses torch (a library's own cudaMalloc, a workspace). It sees what the call left behind
or grew to, not what was taken and given back between two looks; on a CPU it is the growth of the resident set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """MiB beyond what was held before the call; None where there is no such figure."""

    peak_mib: float | None
    driver_mib: float | None
    result: Any = None


def peak_of(call: Callable[[], Any], device: torch.device, before: Callable[[], None] = lambda: None) -> Peak:
    """Runs ``call`` once, alone on the device, from a cache that holds at most what ``before`` left there."""
    return _peak_on_cuda(call, device, before) if device.type == "cuda" else _peak_on_host(call, before)


def held_mib(device: torch.device) -> float | None:
    """What torch's allocator holds for this process, in MiB; None on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else None


def reserve(mib: float, device: torch.device) -> None:
    """Has torch's CUDA allocator hold that much ready, so that the next call need not ask the driver for it."""
    torch.empty(int(mib * MIB), dtype=torch.uint8, device=device)


def _peak_on_cuda(call: Callable[[], Any], device: torch.device, prelude: Callable[[], None]) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info(device)
    prelude()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    free_after, _ = torch.cuda.mem_get_info(device)
    return Peak(peak / MIB, (free_before - free_after) / MIB, result)


def _peak_on_host(call: Callable[[], Any], prelude: Callable[[], None]) -> Peak:
    prelude()
    resident_before = _reset_high_water()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return Peak(peak / MIB, _growth(resident_before), result)


def _reset_high_water() -> int | None:
    """Sets the peak of the resident set back to its present size and returns that, in bytes; Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except (OSError, ValueError):
        return None


def _growth(before: int | None) -> float | None:
    return None if before is None else max(0, _status_bytes("VmHWM") - before) / MIB


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
