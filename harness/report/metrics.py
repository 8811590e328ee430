"""The figures a report can show, by the names the command line uses. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One figure of a cell. column: where the frame holds it; its interval is column_low and column_high, if any.

    family: metrics of one family order the implementations of a cell alike, so they share marks and a ranking:
    ``time`` (everything that follows from the timed rounds), ``memory``, or ``none`` (shown, never ranked).
    log: spans decades, so its axis is logarithmic. axis: title of an axis, where it is not ``title``.
    beside: column of a word that a table shows beside the figure, if any.
    """

    name: str
    column: str
    title: str
    unit: str
    family: Literal["time", "memory", "none"] = "none"
    higher_is_better: bool = False
    log: bool = False
    axis: str = ""
    beside: str = ""

    @property
    def low(self) -> str:
        return f"{self.column}_low"

    @property
    def high(self) -> str:
        return f"{self.column}_high"

    @property
    def label(self) -> str:
        """Title of an axis."""
        return f"{self.axis or self.title} ({self.unit})"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("latency", "median_ms", "Time", "ms", "time", log=True),
        Metric("tflops", "tflops", "Throughput", "TFLOP/s", "time", higher_is_better=True),
        Metric("speedup", "speedup", "Speed-up over", "×", "time", higher_is_better=True, axis="Speed-up"),
        Metric("percent_of_gemm", "percent_of_gemm", "Share of the GEMM ceiling", "%", "time", True),
        Metric(
            "percent_of_floor",
            "percent_of_floor",
            "Share of the attainable rate, and what limits it",
            "%",
            "time",
            True,
            axis="Share of the attainable rate",
            beside="binding",
        ),
        Metric(
            "floor", "floor_ms", "Least time attainable, and what limits it", "ms", log=True, beside="binding"
        ),
        Metric("gbs", "gbs", "Minimal traffic over time", "GB/s", "time", higher_is_better=True),
        Metric("memory", "peak_mib", "Peak memory beyond the inputs", "MiB", "memory", log=True),
        Metric("driver_memory", "driver_mib", "Peak memory by the driver", "MiB", log=True),
        Metric("setup_memory", "setup_mib", "Memory that set-up keeps", "MiB"),
        Metric("dram", "dram_over_least", "DRAM traffic by counters, over the least", "×", log=True),
        Metric("l2", "l2_over_least", "L2 traffic by counters, over the least of DRAM", "×", log=True),
        Metric("energy", "energy_j", "Energy per call", "J", log=True),
        Metric("error", "error_percent", "Mean error of approximations", "%"),
        Metric("host", "host_us", "Host time per call", "µs", log=True),
        Metric("prepare", "prepare_ms", "Set-up", "ms", log=True),
        Metric("first_call", "first_call_ms", "First call, with compilation", "ms", log=True),
    )
}
DEFAULT = ("latency", "tflops", "speedup", "percent_of_gemm", "memory")


def metrics_named(names: Sequence[str] | None) -> list[Metric]:
    """The metrics of these names, in this order (None: the default ones); ValueError names close matches."""
    chosen = DEFAULT if names is None else names
    for name in chosen:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}{did_you_mean(name, list(METRICS))}")
    return [METRICS[name] for name in dict.fromkeys(chosen)]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """``; did you mean a, b?`` or, with no close match, ``; known: ...``."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(known)}"
