"""A run in other tools' formats: read back by the tools themselves where they are at hand."""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import Result

from attnbench.harness.publish import export
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.run.errors import Exit, RunError


@pytest.fixture(scope="module")
def run(folders: list[Path]) -> Run:
    return load_run(folders[0])


@pytest.fixture(scope="module")
def timed(run: Run) -> dict[str, Any]:
    return {cell.id: cell for cell in run.cells if cell.timing}


def test_pytest_benchmark_holds_every_sample_in_seconds(run: Run, timed: dict[str, Any]) -> None:
    document = json.loads(export.pytest_benchmark(run))
    assert {entry["name"] for entry in document["benchmarks"]} == set(timed)
    for entry in document["benchmarks"]:
        samples = [ms for turn in timed[entry["name"]].timing.rounds for ms in turn]
        assert entry["stats"]["data"] == pytest.approx([ms / 1e3 for ms in samples])
        assert entry["stats"]["median"] == pytest.approx(statistics.median(samples) / 1e3)
        assert entry["stats"]["rounds"] == len(samples)


def test_pytest_benchmark_reads_it(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(export.pytest_benchmark(run))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(file), "--csv", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == len(json.loads(file.read_bytes())["benchmarks"])


def test_bmf_has_measures_with_bounds_around_them(run: Run, timed: dict[str, Any]) -> None:
    document = json.loads(export.bmf(run))
    assert set(document) == set(timed)
    for name, measures in document.items():
        assert {"latency", "tflops"} <= set(measures)
        for metric in measures.values():
            assert set(metric) <= {"value", "lower_value", "upper_value"}
            assert metric.get("lower_value", 0) <= metric["value"] <= metric.get("upper_value", float("inf"))
        medians = [statistics.median(turn) for turn in timed[name].timing.rounds]
        assert measures["latency"]["value"] == pytest.approx(statistics.median(medians) * 1e6, rel=1e-5)


@pytest.mark.parametrize("read", [export.csv, export.parquet])
def test_a_table_has_a_row_a_cell_and_no_zero_for_what_is_missing(run: Run, read: Any) -> None:
    content = io.BytesIO(read(run))
    table = pd.read_csv(content) if read is export.csv else pd.read_parquet(content)
    assert len(table) == len(run.cells)
    failed = table[table["status"] != "OK"]
    assert len(failed)
    assert failed[["median_ms", "tflops"]].isna().all(axis=None)
    assert (table.loc[table["status"] == "OK", "median_ms"] > 0).all()


def test_parquet_without_its_library_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'attnbench\[parquet\]'"):
        export.parquet(run)


def test_a_file_is_written_where_no_folder_is_yet(
    folders: list[Path], bench: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "run.csv"
    done = bench("export", folders[0], "--format", "csv", "--output", file)
    assert done.exit_code == Exit.OK, done.stderr
    assert done.stdout.strip() == str(file)
    assert file.read_text().startswith("run,suite,")
