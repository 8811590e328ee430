"""``bench report`` and ``bench plot``: what reaches the report, and their mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.cli.results import FORMATS
from attnbench.harness.run.errors import Exit


def test_report_passes_its_options_on(bench: Any) -> None:
    done = bench(
        "report",
        "run",
        "--format",
        "md,csv",
        "--baseline",
        "a",
        "--metrics",
        "speedup",
        "--output-dir",
        "there",
    )
    assert done.stdout == "run/tables.md\n"
    assert bench.reported == {
        "folder": Path("run"), "formats": ("md", "csv"), "baseline": "a", "metrics": ("speedup",), "out": Path("there"),
    }  # fmt: skip


def test_plot_passes_its_options_on(bench: Any) -> None:
    done = bench("plot", "run", "--metrics", "tflops", "--json")
    assert json.loads(done.stdout) == {"files": ["run/tables.md"]}
    assert bench.reported == {"folder": Path("run"), "metrics": ("tflops",), "out": None, "baseline": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "run", "--format", "htm"], "unknown format 'htm'; did you mean html"),
        (["report", "run", "--metrics", "latancy"], "unknown metric 'latancy'; did you mean latency"),
        (["plot", "run", "--metrics", "speedup"], "name it with --baseline"),
    ],
)
def test_a_mistake_is_one_line(bench: Any, arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == Exit.USAGE
    assert message in done.stderr
    assert not bench.reported


def test_a_folder_without_records_is_one_line(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise ValueError("run holds no records*.jsonl")

    monkeypatch.setattr(sys.modules["attnbench.harness.report.write"], "write_report", refuse)
    done = bench("report", "run")
    assert (done.exit_code, done.stderr) == (Exit.USAGE, "bench: run holds no records*.jsonl\n")


def test_an_interrupt_is_one_line(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["attnbench.harness.report.write"], "write_report", interrupted)
    done = bench("report", "run")
    assert (done.exit_code, done.stderr) == (Exit.INTERRUPTED, "bench: interrupted\n")


def test_the_formats_are_the_reports_own() -> None:
    from attnbench.harness.report.write import FILES

    assert tuple(FILES) == FORMATS
