"""``pytest --pyargs attnbench.suites --benchmark-only``: cells as pytest-benchmark's benchmarks, for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.harness.speed.pytest_plugin import SampleClock

GROUP = "b1_h4_q128_d64_fp32_full"
CELLS = [f"{impl}/{GROUP}_fwd" for impl in ("sdpa-math", "standard")]


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "attnbench.suites",
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)


def baseline(path: Path, seconds: float) -> Path:
    """A file of an earlier run in which every cell took ``seconds``."""
    names = [
        "min",
        "max",
        "mean",
        "stddev",
        "median",
        "iqr",
        "q1",
        "q3",
        "ld15iqr",
        "hd15iqr",
        "ops",
        "total",
    ]
    stats = dict.fromkeys(names, seconds) | {
        "rounds": 1, "iterations": 1, "outliers": "0;0", "iqr_outliers": 0, "stddev_outliers": 0,
    }  # fmt: skip
    benchmarks = [
        {"name": cell, "fullname": f"attnbench/smoke::{cell}", "group": cell, "param": None, "params": None,
         "extra_info": {}, "options": {}, "stats": stats}
        for cell in CELLS
    ]  # fmt: skip
    document = {
        "machine_info": {},
        "commit_info": {},
        "benchmarks": benchmarks,
        "datetime": "",
        "version": "5",
    }
    path.write_text(json.dumps(document))
    return path


def test_cells_are_measured_saved_and_found_slower_than_an_impossible_baseline(tmp_path: Path) -> None:
    done = run_pytest(
        tmp_path, "--benchmark-only", "--impl", "sdpa-math,standard,flash-attn-2", "--suite", "smoke",
        "--attnbench-device", "cpu", "-k", f"{GROUP}_fwd", "--benchmark-json", "out.json", "-rs",
        f"--benchmark-compare={baseline(tmp_path / 'base.json', 1e-9)}", "--benchmark-compare-fail=min:5%",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Performance has regressed" in done.stdout + done.stderr
    assert re.search(r"smoke\.toml [.s]{3} ", done.stdout)
    assert "UNAVAILABLE: " in done.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    found = {entry["name"]: entry for entry in document["benchmarks"]}
    assert sorted(found) == CELLS
    for entry in found.values():
        assert entry["fullname"] == f"attnbench/smoke::{entry['name']}"
        assert entry["group"] == f"{GROUP}_fwd"
        assert entry["options"]["timer"] == "device_clock"
        assert len(entry["stats"]["data"]) == sum(entry["extra_info"]["samples_per_round"])
        assert entry["stats"]["min"] > 1e-9
        assert entry["extra_info"]["judged"]
        assert entry["extra_info"]["timed_calls_checked"] == len(entry["extra_info"]["samples_per_round"])
    assert document["machine_info"]["attnbench"]["devices"][0]["id"] == "cpu"


def test_a_baseline_that_was_slower_passes(tmp_path: Path) -> None:
    done = run_pytest(
        tmp_path, "--benchmark-only", "--impl", "standard", "--attnbench-device", "cpu", "-k", f"{GROUP}_fwd",
        f"--benchmark-compare={baseline(tmp_path / 'base.json', 1e9)}", "--benchmark-compare-fail=min:5%",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--benchmark-only", "--impl", "nobody"), 4, "unknown implementation 'nobody'"),
        (("--benchmark-only",), 5, "no tests ran"),
        (("-p", "no:benchmark"), 5, "no tests ran"),
        (
            ("--impl", "standard", "--suite", "smoke"),
            5,
            "no tests ran",
        ),  # a speed suite, and nobody asked for speed
    ],
)
def test_what_is_not_asked_for_is_not_collected(
    tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = run_pytest(tmp_path, *arguments, "--collect-only" if code == 4 else "-q")
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


def test_the_clock_is_the_samples() -> None:
    clock = SampleClock()
    clock.load([0.25, 0.5])
    readings = [clock()]
    for _ in range(2):
        clock.advance()
        readings.append(clock())
    assert readings == [0.0, 0.25, 0.75]
