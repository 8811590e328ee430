"""A run's page: a line a cell, the details behind it, and the cells without a figure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pandas as pd

from attnbench.harness.problem import DIRECTIONS
from attnbench.harness.publish import commands
from attnbench.harness.publish.integrity import Finding
from attnbench.harness.publish.rows import REFUSED, PublishedRun, Row
from attnbench.harness.publish.support import FAILED
from attnbench.harness.report.tables import DIRECTION_TITLES, NOT_RUNNABLE, figure, in_reading_order
from attnbench.harness.run.record import Cell

Json = dict[str, Any]
SIDE_FIGURES = {
    "host_us": ("host time a call", "µs"),
    "sm_mhz": ("SM clock", "MHz"),
    "power_w": ("power", "W"),
}
_NUMBER = re.compile(r"\d[\d.]*")


def lines_of(run: PublishedRun) -> list[Json]:
    """The table's lines, in reading order: the text of each column, and the figure that sorts it (None: none)."""
    return [_line(run.rows[place], record) for place, record in _in_order(run)]


def details_of(run: PublishedRun) -> Json:
    """What opens beneath each line: ``rows`` in the order of ``lines_of``, the ``findings`` and ``names`` of facts that
    they number, and the ``environment`` that they share."""
    numbers: dict[Finding, int] = {}
    names: dict[str, int] = {}
    rows = [_details(run, run.rows[place], record, numbers, names) for place, record in _in_order(run)]
    findings = [[finding.rule, finding.state, finding.why] for finding in numbers]
    environment = list(_environment(run).items())
    return {"rows": rows, "findings": findings, "names": list(names), "environment": environment}


def _environment(run: PublishedRun) -> dict[str, str]:
    """What of the environment can move a figure, in a few words."""
    known = run.run.environment
    devices = [device for device in known.get("devices") or [] if isinstance(device, dict)]
    driver = next((str(device["driver"]) for device in devices if device.get("driver")), "")
    commit = f"{known.get('commit', 'unknown')}{' with uncommitted changes' if known.get('dirty') else ''}"
    versions = [f"{name} {known[name]}" for name in ("torch", "triton", "cuda", "python") if known.get(name)]
    facts = {
        "device": f"{run.device}{f', driver {driver}' if driver else ''}",
        "software": ", ".join(versions),
        "attnbench": f"{known.get('attnbench', 'unknown version')}, commit {commit}",
        "run": commands.of_run(run),
    }
    return {name: text for name, text in facts.items() if text}


def filters_of(run: PublishedRun) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The table's filters: field, label, and (value, text) of what it offers."""
    table = in_reading_order(run.table.iloc[: len(run.rows)])
    columns = {
        "impl": ("Implementation", sorted(table["impl"].unique())),
        "direction": ("Direction", [DIRECTION_TITLES[value] for value in table["direction"].unique()]),
        "mask": ("Mask", list(dict.fromkeys(family.mask for family in table["family"]))),
        "head_dim": ("head_dim", sorted(table["head_dim"].unique())),
        "dtype": ("dtype", list(table["dtype"].unique())),
        "status": ("Status", sorted(table["status"].unique())),
    }
    return [
        (name, label, [(str(value), str(value)) for value in values])
        for name, (label, values) in columns.items()
    ]


def failures(run: PublishedRun) -> list[tuple[str, str, str, int, str]]:
    """Implementation, status, tone, how many cells and why, for all that has no figure; defects first.

    Reasons that differ in nothing but numbers, as those of an out-of-memory do, are one line: the first of them.
    """
    table = run.table[run.table["status"] != "OK"]
    alike: dict[tuple[str, str, str], list[str]] = {}
    for impl, status, reason in zip(table["impl"], table["status"], table["reason"], strict=True):
        alike.setdefault((impl, status, _NUMBER.sub("#", reason)), []).append(reason)
    found = [(impl, status, _tone(status), len(own), own[0]) for (impl, status, _), own in alike.items()]
    return sorted(found, key=lambda line: (line[2] == "", line[1] in NOT_RUNNABLE, line[0], line[1]))


def _in_order(run: PublishedRun) -> Iterator[tuple[int, Json]]:
    """Place among the run's rows, and the frame's record: problem by problem, the fastest first."""
    table = run.table.iloc[: len(run.rows)].reset_index(drop=True)
    directions = table["direction"].map(DIRECTIONS.index)
    table = table.assign(at=directions).sort_values(["at", "median_ms"], kind="stable", na_position="last")
    for place, record in in_reading_order(table).drop(columns="round_ms").iterrows():
        yield int(place), record.to_dict()


def _tone(status: str) -> str:
    return "status-OK" if status == "OK" else "status-bad" if status in (*FAILED, REFUSED) else ""


def _line(row: Row, record: Json) -> Json:
    problem = row.cell.problem
    kv = f" ({problem.kv_heads} kv)" if problem.kv_heads != problem.heads else ""
    dv = f", v {problem.head_dim_v}" if problem.head_dim_v != problem.head_dim else ""
    dropout = f", dropout {problem.dropout_p:g}" if problem.dropout_p else ""
    shown = record["status"] == "OK"
    columns = {"ms": "median_ms", "tflops": "tflops", "ceiling": "percent_of_floor", "peak": "peak_mib"}
    figures = {name: _rounded(record[column]) if shown else None for name, column in columns.items()}
    texts = {f"{name}_text": "" if value is None else _text(name, value) for name, value in figures.items()}
    known = shown and _figure(record["median_ms_low"]) is not None
    return figures | texts | {
        "address": row.address,
        "impl": record["impl"],
        "direction": DIRECTION_TITLES[problem.direction],
        "mask": f"{problem.mask.label}{dropout}",
        "kind": row.family.mask,
        "head_dim": problem.head_dim,
        "head_dim_text": f"{problem.head_dim}{dv}",
        "dtype": problem.dtype,
        "heads": f"{problem.batch} × {problem.heads}{kv}",
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "status": record["status"],
        "tone": _tone(record["status"]),
        "interval": f"{figure(record['median_ms_low'])} to {figure(record['median_ms_high'])}" if known else "",
    }  # fmt: skip


def _details(
    run: PublishedRun, row: Row, record: Json, numbers: dict[Finding, int], names: dict[str, int]
) -> Json:
    cell = row.cell
    return {
        "address": row.address,
        "status": str(cell.status),
        "reasons": row.refusals or list(cell.reasons),
        "warnings": list(cell.warnings),
        "facts": [(names.setdefault(name, len(names)), text) for name, text in _facts(run, row, record)],
        "findings": [numbers.setdefault(finding, len(numbers)) for finding in row.findings],
        "evidence": cell.evidence,
        "command": commands.of_row(run, row),
    }


def _facts(run: PublishedRun, row: Row, record: Json) -> Iterator[tuple[str, str]]:
    cell = row.cell
    yield "version", cell.impl_version + (f", sources {cell.source}" if cell.source else "")
    yield "case", f"{cell.case}: {cell.problem.key}"
    for name, tensor in cell.judgement.tensors.items() if cell.judgement else ():
        errors = f"max error {_error(tensor.max_error)} of {_error(tensor.max_budget)} allowed"
        yield (
            f"error of {name}",
            f"{errors}, mean {_error(tensor.mean_error)} of {_error(tensor.mean_budget)}",
        )
    if cell.timing:
        yield from _timed(run, row, cell, record)
    if (error := _figure(record["error_percent"])) is not None:
        yield "error of the approximation", f"{error:.2g}% in the mean"
    if (joules := _figure(record["energy_j"])) is not None:
        yield "energy of a call", f"{figure(joules)} J"
    for name, title in (("prepare_ms", "set-up"), ("first_call_ms", "first call, with compilation")):
        if (value := _figure(record[name])) is not None:
            yield title, f"{figure(value)} ms"
    memory = cell.memory
    if memory and memory.peak_mib is not None:
        driver = f", {figure(memory.driver_mib)} by the driver" if memory.driver_mib is not None else ""
        yield (
            "peak memory",
            f"{figure(memory.peak_mib)} MiB{driver}; least possible {figure(memory.minimum_mib)}",
        )


def _timed(run: PublishedRun, row: Row, cell: Cell, record: Json) -> Iterator[tuple[str, str]]:
    assert cell.timing is not None
    rounds = [f"{figure(sorted(samples)[len(samples) // 2])}" for samples in cell.timing.rounds]
    count = sum(map(len, cell.timing.rounds))
    yield "time by round", f"{', '.join(rounds)} ms ({count} samples, {cell.timing.mode})"
    if baseline := run.baseline_of(row):
        yield "baseline", f"{baseline.cell.impl} in the same rounds"
    for column, (title, unit) in SIDE_FIGURES.items():
        if (value := _figure(record[column])) is not None:
            yield title, f"{figure(value)} {unit}"
    if record["throttle"]:
        yield "clock held down by", str(record["throttle"])


def _figure(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _rounded(value: Any) -> float | None:
    """Enough digits to sort by."""
    known = _figure(value)
    return None if known is None else float(f"{known:.6g}")


def _text(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "ceiling" else figure(value)


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"
