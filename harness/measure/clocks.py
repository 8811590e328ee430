"""What the card was doing while it was measured: SM clock, power, temperature, throttle reasons, other processes.

Read through NVML where it is there. Where it is not, every reading is None and ``ClockReader.why`` says why.
"""

from __future__ import annotations

import functools
import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A turn is read at most this often: NVML answers in about a millisecond, and the host has nothing better to do.
MOST_READINGS = 20

# Reasons that slow the card below what was asked of it (NVML clocks event reasons): software power cap 0x4,
# hardware slowdown 0x8, software thermal 0x20, hardware thermal 0x40, hardware power brake 0x80.
SLOWING_REASONS = 0xEC


@dataclass(frozen=True)
class Clocks:
    """Medians over one turn; throttle is every reason bit seen."""

    sm_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle: int | None = None


class ClockReader:
    """NVML's view of one GPU, found by the UUID that CUDA reports."""

    def __init__(self, uuid: str) -> None:
        self.why = ""
        self._handle = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(
                uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            )
        except Exception as error:  # noqa: BLE001 - NVML absent, no driver, a virtual device: all mean no readings
            self.why = f"no NVML readings: {error}"

    def read_during(self, done: Callable[[], bool]) -> Clocks:
        """Readings taken until ``done`` or MOST_READINGS, at least one; ``done`` leaves a further one unfinished."""
        if self._handle is None:
            return Clocks()
        readings: list[tuple[int | None, ...]] = []
        while len(readings) < MOST_READINGS:
            reading = self._read(done if readings else lambda: False)
            if reading is None:
                break
            readings.append(reading)
        mhz, watts, celsius, throttle = (
            [value for value in column if value is not None] for column in zip(*readings, strict=True)
        )
        return Clocks(
            sm_mhz=int(statistics.median(mhz)) if mhz else None,
            power_w=round(statistics.median(watts) / 1e3, 1) if watts else None,
            temperature_c=int(statistics.median(celsius)) if celsius else None,
            throttle=functools.reduce(operator.or_, throttle) if throttle else None,
        )

    def _read(self, done: Callable[[], bool]) -> tuple[int | None, ...] | None:
        """SM clock (MHz), power (mW), temperature (C), throttle reason bits; None if ``done`` comes before the last."""
        nvml = self._nvml
        values = []
        for query, *arguments in (
            (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            (nvml.nvmlDeviceGetPowerUsage,),
            (nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            (nvml.nvmlDeviceGetCurrentClocksThrottleReasons,),
        ):
            if done():
                return None
            values.append(self._ask(query, *arguments))
        return tuple(values)

    def _ask(self, query: Callable[..., Any], *arguments: int) -> Any:
        """One figure of the card, or None where it does not offer it (a virtual or shared one may not)."""
        try:
            return query(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def facts(self) -> dict[str, int | float | str | None]:
        """Driver version, highest SM clock (MHz) and power limit (W), or an empty dict."""
        if self._handle is None:
            return {}
        nvml = self._nvml
        milliwatts = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
        return {
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "max_sm_mhz": self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            "power_limit_w": None if milliwatts is None else milliwatts / 1e3,
        }

    def energy_j(self) -> float | None:
        """Joules that the card has used since its driver was loaded; None where it does not count them."""
        if self._handle is None:
            return None
        millijoules = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1e3

    def foreign_processes(self, own: set[int]) -> list[str] | None:
        """``pid name`` of every process with a context on the GPU that is not in ``own``; None where none can be told.

        NVML reports pids of the host's namespace: where none of ``own``, which is on the GPU, is among them (a
        container), whose they are is unknown.
        """
        if self._handle is None:
            return None
        running = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses) or []
        pids = {process.pid for process in running}
        if not pids & own:
            return None
        return [f"{pid} {_process_name(pid)}" for pid in sorted(pids - own)]


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "(gone)"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
