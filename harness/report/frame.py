"""Records as one tidy table: a row a cell, a column a figure. A missing figure is NaN or None, never 0."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from attnbench.harness.problem import Problem
from attnbench.harness.report import stats
from attnbench.harness.report.load import Run
from attnbench.harness.report.metrics import did_you_mean
from attnbench.harness.report.stats import Array, Estimate
from attnbench.harness.run.record import Ceilings, Cell, Timing

MIB = 2**20
EXP_PER_CLOCK_PER_SM = 16
"""Exponentials one SM's special-function unit starts in a clock (CUDA Programming Guide, arithmetic throughput)."""

# NVML's clocks-event reasons that hold the clock below what was asked for; idle and set clocks are no throttling.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}

PROBLEM_FIELDS = (
    "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v",
    "dtype", "mask", "dropout_p", "scale", "layout", "strides", "direction",
)  # fmt: skip
ESTIMATES = ("median_ms", "tflops", "percent_of_gemm", "percent_of_floor")
FIGURES = (
    *(name for column in ESTIMATES for name in (column, f"{column}_low", f"{column}_high")),
    "q10_ms", "q90_ms", "gbs", "gemm_tflops", "copy_gbs",
    "host_us", "prepare_ms", "first_call_ms", "peak_mib", "driver_mib", "minimum_mib", "sm_mhz", "power_w",
)  # fmt: skip
COLUMNS = (
    "run", "suite", "case", "group", "impl", "version", "device", *PROBLEM_FIELDS,
    "visible_pairs", "flops", "status", "reason", *FIGURES,
    "throttled", "throttle", "timing_mode", "rounds", "samples", "unheld", "warnings", "round_ms",
)  # fmt: skip
PROBLEM_KEY = ["group", "direction"]
"""Columns that name one problem of a run: one row of a table, and what may be compared round by round."""


def frame(run: Run) -> pd.DataFrame:
    """One row a cell, with ``COLUMNS``. Figures are float (NaN if missing); intervals are 95%, over rounds.

    round_ms holds the median of each round as an array, for what is paired by round; everything else is plain.
    """
    groups = {group.group: group for group in run.groups}
    sm_counts = _sm_counts(run.environment)
    rows = []
    for cell in run.cells:
        group = groups.get(cell.group)
        ceilings = group.ceilings.get(cell.problem.direction) if group else None
        rows.append(_row(cell, ceilings, sm_counts.get(cell.device)))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype(
        dict.fromkeys(FIGURES, float)
        | dict.fromkeys(("throttled",), "boolean")
        | dict.fromkeys(("rounds", "samples", "unheld"), "Int64")
    )


def with_speedup(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A copy with speedup, speedup_low, speedup_high: time of ``baseline`` over time, paired by round.

    NaN where the baseline did not run the same problem in the same group. ValueError if it has no cell at all.
    """
    if baseline not in set(table["impl"]):
        known = sorted(table["impl"].unique())
        raise ValueError(f"baseline {baseline!r} is not in this run{did_you_mean(baseline, known)}")
    ok = table[table["round_ms"].notna()]
    of_baseline = ok[ok["impl"] == baseline].set_index(PROBLEM_KEY)["round_ms"].to_dict()
    found = [_speedup(row, of_baseline) for row in table[[*PROBLEM_KEY, "round_ms"]].itertuples(index=False)]
    columns = pd.DataFrame(found, columns=["speedup", "speedup_low", "speedup_high"], index=table.index)
    return table.join(columns.astype(float))


def _speedup(row: Any, of_baseline: dict[tuple[str, ...], Array]) -> Estimate:
    *problem, rounds = row
    reference = of_baseline.get(tuple(problem))
    return Estimate(None) if rounds is None or reference is None else stats.ratio(reference, rounds)


def _row(cell: Cell, ceilings: Ceilings | None, sm_count: int | None) -> dict[str, Any]:
    problem, memory = cell.problem, cell.memory
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {name: getattr(cell, name) for name in ("run", "suite", "case", "group", "impl", "device")}
    row |= {name: getattr(problem, name) for name in PROBLEM_FIELDS}
    row |= {
        "version": cell.impl_version,
        "mask": problem.mask.label,
        "strides": " ".join(f"{name}:{'.'.join(map(str, strides))}" for name, strides in problem.strides),
        "visible_pairs": _visible_pairs(problem.with_direction("fwd")),
        "flops": problem.flops,
        "status": str(cell.status),
        "reason": "; ".join(cell.reasons),
        "prepare_ms": cell.prepare_ms,
        "first_call_ms": cell.first_call_ms,
        "minimum_mib": problem.minimal_result_bytes / MIB if memory is None else memory.minimum_mib,
        "warnings": "; ".join(cell.warnings),
    }
    if memory:
        row |= {"peak_mib": memory.peak_mib, "driver_mib": memory.driver_mib}
    if cell.timing:
        row |= _timed(problem, cell.timing, ceilings, sm_count)
    return row


def _timed(
    problem: Problem, timing: Timing, ceilings: Ceilings | None, sm_count: int | None
) -> dict[str, Any]:
    rounds = stats.round_medians(timing.rounds)
    time = stats.median_over_rounds(rounds)
    estimates = {"median_ms": time, "tflops": time.inverse(problem.flops / 1e9)}
    row: dict[str, Any] = {}
    if ceilings:
        gemm, copy = stats.round_medians(ceilings.gemm_tflops), stats.round_medians(ceilings.copy_gbs)
        row |= {"gemm_tflops": _nanmedian(gemm), "copy_gbs": _nanmedian(copy)}
        estimates["percent_of_gemm"] = stats.ratio(problem.flops / 1e9 / rounds, gemm).scaled(100)
        floor = _floor_ms(problem, gemm, copy, _figures(timing.sm_mhz), sm_count)
        estimates["percent_of_floor"] = stats.ratio(floor, rounds).scaled(100)
    for column, estimate in estimates.items():
        row |= {column: estimate.value, f"{column}_low": estimate.low, f"{column}_high": estimate.high}
    read = [bits for bits in timing.throttle if bits is not None]
    causes = [name for bit, name in THROTTLE_REASONS.items() if any(bits & bit for bits in read)]
    return row | {
        "q10_ms": stats.quantile(timing.rounds, 0.1),
        "q90_ms": stats.quantile(timing.rounds, 0.9),
        "gbs": problem.minimal_bytes / 1e6 / time.value if time.value else None,
        "host_us": _nanmedian(_figures(timing.host_us)),
        "sm_mhz": _nanmedian(_figures(timing.sm_mhz)),
        "power_w": _nanmedian(_figures(timing.power_w)),
        "throttled": bool(causes) if read else None,
        "throttle": ", ".join(causes),
        "timing_mode": timing.mode,
        "rounds": len(timing.rounds),
        "samples": sum(map(len, timing.rounds)),
        "unheld": timing.unheld,
        "round_ms": rounds,
    }


def _floor_ms(problem: Problem, gemm: Array, copy: Array, sm_mhz: Array, sm_count: int | None) -> Array:
    """Least time the card could take, per round: matrix work at the GEMM's rate, minimal traffic at the copy's,
    exponentials at the SM clock (only where clock and SM count are known), whichever is longest; overlap perfect."""
    paired = min(len(gemm), len(copy))
    terms = [problem.flops / 1e9 / gemm[:paired], problem.minimal_bytes / 1e6 / copy[:paired]]
    if sm_count and len(sm_mhz) >= paired:
        passes = 2 if problem.direction == "fwd_bwd" else 1
        exponentials = passes * _visible_pairs(problem.with_direction("fwd"))
        rate = EXP_PER_CLOCK_PER_SM * sm_count * sm_mhz[:paired] * 1e3
        terms.append(np.nan_to_num(exponentials / rate, nan=0.0))
    return np.maximum.reduce(terms)


@lru_cache(maxsize=1024)
def _visible_pairs(problem: Problem) -> int:
    return problem.visible_pairs


def _figures(values: list[Any]) -> Array:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _nanmedian(values: Array) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _sm_counts(environment: dict[str, Any]) -> dict[str, int]:
    devices = environment.get("devices") or []
    return {
        d["id"]: d["sm_count"] for d in devices if isinstance(d, dict) and d.get("id") and d.get("sm_count")
    }
