from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.report.frame import COLUMNS, FIGURES, frame, with_speedup
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.run.record import Memory


@pytest.fixture(scope="module")
def table(run_folder: Path) -> pd.DataFrame:
    return frame(load_run(run_folder))


def one(
    builder: ModuleType, problem: Problem, efficiency: float, environment: dict[str, object] | None = None
) -> pd.Series:
    cell = builder.ok_cell("impl", problem, efficiency)
    return frame(Run(Path(), [cell], [builder.group_of([cell])], environment or {})).iloc[0]


def test_a_row_a_cell_with_every_column(table: pd.DataFrame, run_folder: Path) -> None:
    assert len(table) == len(load_run(run_folder).cells)
    assert list(table.columns) == list(COLUMNS)


def test_what_was_not_measured_is_missing_and_never_zero(table: pd.DataFrame) -> None:
    failed = table[table["status"] != "OK"]
    figures = [name for name in FIGURES if name != "minimum_mib"]
    assert failed[figures].isna().all(axis=None)
    assert failed["reason"].ne("").all()
    assert not (table[list(FIGURES)] == 0).any(axis=None)
    assert table["driver_mib"].isna().all()
    assert table.loc[table["status"] == "OK", "throttled"].all()
    assert failed["throttled"].isna().all()


def test_throughput_follows_from_flops_and_time(table: pd.DataFrame) -> None:
    ok = table[table["status"] == "OK"]
    assert (ok["flops"] / ok["median_ms"] / 1e9).to_list() == pytest.approx(ok["tflops"].to_list())
    assert (ok["tflops_low"] <= ok["tflops"]).all()
    assert (ok["tflops"] <= ok["tflops_high"]).all()


def test_percent_of_gemm_is_paired_with_the_rounds_own_ceiling(builder: ModuleType) -> None:
    """The card drifts by 15%; a share of 60% of the GEMM stays 60% to a third of a percent of itself."""
    cell = one(builder, Problem(1, 16, 32768, 128), efficiency=0.6)
    assert cell["percent_of_gemm"] == pytest.approx(60, rel=0.005)
    assert cell["percent_of_gemm_high"] / cell["percent_of_gemm_low"] < 1.01
    assert cell["tflops_high"] / cell["tflops_low"] > 1.05


def test_the_floor_is_the_longest_of_matrix_traffic_and_exponentials(builder: ModuleType) -> None:
    wide, decode, narrow = (
        Problem(1, 8, 16384, 256),
        Problem(8, 32, 1, 128, seqlen_k=65536),
        Problem(1, 32, 16384, 64),
    )
    sms = {"devices": [{"id": builder.DEVICE, "sm_count": 132}]}
    # Matrix work alone decides at head_dim 256, with or without the exponentials.
    assert one(builder, wide, 0.5, sms)["percent_of_floor"] == pytest.approx(50, rel=0.01)
    assert one(builder, wide, 0.5)["percent_of_floor"] == pytest.approx(50, rel=0.01)
    # One query row against a long cache: bytes decide.
    cell = one(builder, decode, 0.005)
    bytes_ms = decode.minimal_bytes / 1e6 / builder.COPY_GBS
    assert cell["percent_of_floor"] == pytest.approx(100 * bytes_ms / cell["median_ms"], rel=0.01)
    # A narrow head is bound by exponentials, once the number of SMs is known: A / (16 x SMs x clock).
    alone, known = (
        one(builder, narrow, 0.5),
        one(builder, narrow, 0.5, {"devices": [{"id": builder.DEVICE, "sm_count": 60}]}),
    )
    assert alone["percent_of_floor"] == pytest.approx(50, rel=0.01)
    rounds_ms = known["visible_pairs"] / (16 * 60 * 1980e3)  # at the first round's clock
    assert known["percent_of_floor"] > 55
    assert known["percent_of_floor"] == pytest.approx(
        100 * rounds_ms / (known["median_ms"] * 0.925), rel=0.02
    )


def test_a_cell_of_a_group_without_ceilings_has_no_share(builder: ModuleType) -> None:
    cell = builder.ok_cell("impl", Problem(1, 16, 1024, 64), 0.5)
    bare = dataclasses.replace(builder.group_of([cell]), ceilings={})
    row = frame(Run(Path(), [cell], [bare])).iloc[0]
    assert row["median_ms"] > 0
    assert row[["percent_of_gemm", "percent_of_floor", "gemm_tflops"]].isna().all()


def test_unread_clocks_and_memory_are_missing(builder: ModuleType) -> None:
    cell = builder.ok_cell("impl", Problem(1, 16, 1024, 64), 0.5)
    timing = dataclasses.replace(cell.timing, sm_mhz=[None] * 8, throttle=[None] * 8, host_us=[])
    cell = dataclasses.replace(cell, timing=timing, memory=Memory(None, None, 1.5))
    row = frame(Run(Path(), [cell], [builder.group_of([cell])])).iloc[0]
    assert row[["sm_mhz", "host_us", "peak_mib", "throttled"]].isna().all()
    assert row["minimum_mib"] == 1.5


def test_speedup_is_over_the_baseline_of_the_same_problem(table: pd.DataFrame) -> None:
    fast = with_speedup(table, "older")
    own = fast[(fast["impl"] == "older") & (fast["status"] == "OK")]
    assert own[["speedup", "speedup_low", "speedup_high"]].eq(1).all(axis=None)
    long = fast[(fast["impl"] == "fused_a") & (fast["seqlen_q"] == 16384)]
    assert long["speedup"].between(1.87, 1.91).all()
    assert (long["speedup_high"] / long["speedup_low"]).max() < 1.01
    missing = with_speedup(table, "eager")
    assert missing.loc[missing["seqlen_q"] == 16384, "speedup"].isna().all()


def test_an_unknown_baseline_names_the_close_ones(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="'oldr' is not in this run; did you mean older"):
        with_speedup(table, "oldr")


def test_no_cells_make_an_empty_frame() -> None:
    assert list(frame(Run(Path(), [], [])).columns) == list(COLUMNS)
