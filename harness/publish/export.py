"""A run in formats that other tools read: pytest-benchmark's JSON, Bencher's, and the long table as CSV or Parquet."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Callable
from typing import Any

from attnbench.harness.report import render
from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import Run
from attnbench.harness.run.errors import RunError
from attnbench.harness.speed.benchmark import extra_info, fullname_of, group_of, seconds_of

MS_TO_NS = 1e6


def pytest_benchmark(run: Run) -> bytes:
    """As ``--benchmark-json`` writes it, with every sample: ``pytest-benchmark compare`` and ``--benchmark-compare``
    read it. Cells without a time are not in it."""
    from pytest_benchmark import __version__
    from pytest_benchmark.stats import Stats

    environment = run.environment
    benchmarks = []
    for cell in run.cells:
        if not cell.timing:
            continue
        stats = Stats()
        stats.data = seconds_of(cell)
        benchmarks.append(
            {
                "group": group_of(cell),
                "name": cell.id,
                "fullname": fullname_of(cell),
                "params": None,
                "param": None,
                "extra_info": extra_info(cell),
                "options": {"timer": "device_clock"},
                "stats": stats.as_dict() | {"data": stats.data, "iterations": 1},
            }
        )
    host = environment.get("host") or {}
    document = {
        "machine_info": {
            "node": "",
            "python_version": environment.get("python"),
            "system": host.get("os"),
            "cpu": {"brand_raw": host.get("cpu"), "count": host.get("cores")},
            "attnbench": {name: environment.get(name) for name in ("devices", "torch", "triton", "packages")},
        },
        "commit_info": {
            "id": environment.get("commit"),
            "dirty": environment.get("dirty"),
            "branch": "",
            "time": None,
        },
        "benchmarks": benchmarks,
        "datetime": environment.get("started"),
        "version": __version__,
    }
    return _json(document)


def bmf(run: Run) -> bytes:
    """Bencher Metric Format: a benchmark a cell; ``latency`` in ns with its interval, as Bencher's own measure of that
    name has it, and ``tflops``, ``percent-of-ceiling`` and ``peak-memory-mib``. A missing figure is left out."""
    table = frame(run)
    measures = {
        "latency": ("median_ms", MS_TO_NS),
        "tflops": ("tflops", 1.0),
        "percent-of-ceiling": ("percent_of_floor", 1.0),
        "peak-memory-mib": ("peak_mib", 1.0),
    }
    document: dict[str, dict[str, dict[str, float]]] = {}
    for record in table[table["median_ms"].notna()].drop(columns="round_ms").to_dict("records"):
        name = f"{record['impl']}/{record['group']}_{record['direction']}"
        found = {measure: _metric(record, *source) for measure, source in measures.items()}
        document[name] = {measure: metric for measure, metric in found.items() if metric}
    return _json(document)


def csv(run: Run) -> bytes:
    """Long form, a line a cell, failed ones too."""
    return render.csv(frame(run)).encode()


def parquet(run: Run) -> bytes:
    """Long form, a row a cell, failed ones too; ``round_ms`` holds the median of each round.

    RunError without pyarrow.
    """
    if importlib.util.find_spec("pyarrow") is None:  # what pandas writes with
        raise RunError("--format parquet needs pyarrow: pip install 'attnbench[parquet]'")
    table = frame(run)
    # A scale of None among numbers and an absent text are the same missing value to Parquet.
    target = io.BytesIO()
    table.assign(scale=table["scale"].astype(float)).to_parquet(target, index=False)
    return target.getvalue()


FORMATS: dict[str, Callable[[Run], bytes]] = {
    "pytest-benchmark": pytest_benchmark,
    "bmf": bmf,
    "csv": csv,
    "parquet": parquet,
}


def _metric(record: dict[str, Any], column: str, factor: float) -> dict[str, float]:
    bounds = {"value": column, "lower_value": f"{column}_low", "upper_value": f"{column}_high"}
    figures = {name: record.get(source) for name, source in bounds.items()}
    found = {
        name: float(f"{value * factor:.6g}")
        for name, value in figures.items()
        if value and not math.isnan(value)
    }
    return found if "value" in found else {}


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()
