"""Records as one tidy table: a row a cell, a column a figure. A missing figure is NaN or None, never 0."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from attnbench.harness.problem import Problem
from attnbench.harness.report import stats
from attnbench.harness.report.floor import floor
from attnbench.harness.report.load import Run
from attnbench.harness.report.metrics import did_you_mean
from attnbench.harness.report.stats import Array, Estimate
from attnbench.harness.run.record import Ceilings, Cell, Timing

MIB = 2**20
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
    "q10_ms", "q90_ms", "gbs", "gemm_tflops", "copy_gbs", "floor_ms", "sm_count",
    "energy_j", "error_percent", "dram_over_least", "l2_over_least",
    "host_us", "prepare_ms", "first_call_ms", "peak_mib", "driver_mib", "minimum_mib", "setup_mib", "sm_mhz", "power_w",
)  # fmt: skip
COLUMNS = (
    "run", "suite", "case", "group", "impl", "version", "device", *PROBLEM_FIELDS,
    "visible_pairs", "flops", "intensity", "status", "reason", *FIGURES, "binding",
    "approximate", "throttled", "throttle", "timing_mode", "rounds", "samples", "unheld", "warnings", "round_ms",
)  # fmt: skip
NOT_RECORDED = "not recorded"
"""Stands for the status of a cell that was planned and is in no record."""
PROBLEM_KEY = ["group", "direction"]
"""Columns that name one problem of a run: one row of a table, and what may be compared round by round."""


def frame(run: Run) -> pd.DataFrame:
    """One row a cell with ``COLUMNS``, planned ones without a record among them. Figures are float (NaN if missing);
    intervals are 95%, over rounds.

    round_ms holds the median of each round as an array, for what is paired by round; everything else is plain.
    """
    groups = {group.group: group for group in run.groups}
    sm_counts = _sm_counts(run.environment)
    rows = []
    for cell in run.cells:
        group = groups.get(cell.group)
        ceilings = group.ceilings.get(cell.problem.direction) if group else None
        moved = run.counters.get((cell.impl, cell.problem.key))
        rows.append(_row(cell, ceilings, sm_counts.get(cell.device)) | _moved(cell.problem, moved))
    rows += [
        _problem_row(problem) | {"suite": plan.suite, "case": plan.case, "group": plan.group, "impl": impl}
        | {"status": NOT_RECORDED, "reason": "its group has no record"}
        for plan in run.missing for impl in plan.impls for problem in plan.problems
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype(
        dict.fromkeys(FIGURES, float)
        | dict.fromkeys(("approximate", "throttled"), "boolean")
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


def _problem_row(problem: Problem) -> dict[str, Any]:
    """A row with what follows from the problem alone."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {name: getattr(problem, name) for name in PROBLEM_FIELDS}
    return row | {
        "mask": problem.mask.label,
        "strides": " ".join(f"{name}:{'.'.join(map(str, strides))}" for name, strides in problem.strides),
        "visible_pairs": _visible_pairs(problem.with_direction("fwd")),
        "flops": problem.flops,
        "intensity": problem.flops / problem.minimal_bytes if problem.minimal_bytes else None,
        "minimum_mib": problem.minimal_result_bytes / MIB,
    }


def _row(cell: Cell, ceilings: Ceilings | None, sm_count: int | None) -> dict[str, Any]:
    problem, memory = cell.problem, cell.memory
    row = _problem_row(problem)
    row |= {name: getattr(cell, name) for name in ("run", "suite", "case", "group", "impl", "device")}
    row |= {
        "version": cell.impl_version,
        "status": str(cell.status),
        "reason": "; ".join(cell.reasons),
        "prepare_ms": cell.prepare_ms,
        "first_call_ms": cell.first_call_ms,
        "warnings": "; ".join(cell.warnings),
        "approximate": cell.approximate,
    }
    if cell.approximate:
        row |= {"impl": f"{cell.impl} (approximate)", "error_percent": _error_percent(cell)}
    if cell.energy:
        row["energy_j"] = cell.energy.joules / cell.energy.calls
    if memory:
        row |= {
            name: getattr(memory, name) for name in ("peak_mib", "driver_mib", "minimum_mib", "setup_mib")
        }
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
        row |= {"gemm_tflops": _nanmedian(gemm), "copy_gbs": _nanmedian(copy), "sm_count": sm_count}
        estimates["percent_of_gemm"] = stats.ratio(problem.flops / 1e9 / rounds, gemm).scaled(100)
        pairs = _visible_pairs(problem.with_direction("fwd"))
        least = floor(problem, pairs, gemm, copy, _figures(timing.sm_mhz), sm_count)
        row |= {"floor_ms": _nanmedian(least.ms), "binding": least.binding}
        estimates["percent_of_floor"] = stats.ratio(least.ms, rounds).scaled(100)
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


def _moved(problem: Problem, moved: dict[str, float] | None) -> dict[str, float]:
    """Bytes by the GPU's counters, over the least that any algorithm moves through HBM."""
    if not moved or not problem.minimal_bytes:
        return {}
    dram = moved["dram_read"] + moved["dram_write"]
    return {
        "dram_over_least": dram / problem.minimal_bytes,
        "l2_over_least": moved["l2"] / problem.minimal_bytes,
    }


def _error_percent(cell: Cell) -> float:
    """Of an approximation: mean error in percent of the mean size of what is right, the worst of its tensors; one
    within the budget of an exact answer counts as 0."""
    tensors = cell.judgement.tensors.values() if cell.judgement else ()
    return max(
        (100 * t.mean_error / t.mean_want for t in tensors if t.mean_error and t.mean_want), default=0.0
    )


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
