"""One figure of what the other commands wrote."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attnbench.harness.limits.ceilings import Sampled, to_json
from attnbench.harness.limits.counters import Counted
from attnbench.harness.limits.overview import draw_overview
from attnbench.harness.problem import Problem
from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import load_run
from attnbench.harness.run.errors import Exit

LENGTHS = (1024, 4096)
SAMPLED = [
    Sampled(
        "gemm_bf16", "matrix product, bf16", "TFLOP/s", [[700.0, 800.0], [800.0, 900.0]], datasheet=1000.0
    ),
    Sampled("l2_read", "L2 read", "GB/s", [[7000.0]]),
    Sampled("exp", "exponentials", "Gexp/s", why="cuda.core is not installed", datasheet=4182.0),
]


def counted() -> list[Counted]:
    """Two implementations that read the least once and twice and write nothing; a backward; one that failed."""
    forwards = [Problem(16384 // n, 16, n, 128) for n in LENGTHS]
    found = [
        Counted(
            impl, "1", p, dram_read=times * p.minimal_bytes, dram_write=0.0, l2=10.0 * times * p.minimal_bytes
        )
        for impl, times in (("fused_a", 1.0), ("older", 2.0))
        for p in forwards
    ]
    backward = forwards[0].with_direction("bwd")
    found.append(Counted("fused_a", "1", backward, dram_read=9.0, dram_write=9.0, l2=9.0))
    return [*found, Counted("fused_b", "1", forwards[0], reason="OutOfMemoryError")]


@pytest.fixture(scope="module")
def folders(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("limits")
    run = builder.problems(LENGTHS, head_dims=(64, 128), directions=("fwd", "bwd"))
    paper = builder.problems(LENGTHS, head_dims=(64,), directions=("fwd", "fwd_bwd"))
    made = {
        "run": builder.write_run(home / "run", run),
        "paper": builder.write_run(home / "paper", paper),
        "limits": home / "limits",
    }
    made["limits"].mkdir()
    counters = {"counted": [one.to_json() for one in counted()]}
    (made["limits"] / "ceilings.json").write_text(json.dumps(to_json(SAMPLED, {})))
    (made["limits"] / "counters.json").write_text(json.dumps(counters))
    return made


def test_each_panel_shows_what_was_measured(folders: dict[str, Path]) -> None:
    run, paper = (frame(load_run(folders[name])) for name in ("run", "paper"))
    figure = draw_overview(SAMPLED, counted(), run, paper)
    roofs, dram, l2, ceilings, time, memory = figure.axes

    forwards = run[(run["head_dim"] == 128) & (run["direction"] == "fwd") & (run["mask"] == "full")]
    drawn = sorted(y for line in roofs.lines for y in line.get_ydata() if line.get_linestyle() == "None")
    shown = forwards[forwards["impl"].isin(["fused_a", "older"])]["tflops"]
    assert drawn == pytest.approx(sorted(shown))

    assert [list(line.get_ydata()) for line in dram.lines[:2]] == [[1.0, 1.0], [2.0, 2.0]]
    assert [list(line.get_ydata()) for line in l2.lines[:2]] == [[10.0, 10.0], [20.0, 20.0]]

    assert [label.get_text() for label in ceilings.get_yticklabels()] == ["matrix product, bf16"]
    assert ceilings.patches[0].get_width() == pytest.approx(80.0)
    assert list(ceilings.lines[0].get_xdata()) == pytest.approx([73.0, 87.0])

    asked = paper[(paper["direction"] == "fwd_bwd") & (paper["mask"] == "full")]
    for axes, column in ((time, "median_ms"), (memory, "peak_mib")):
        drawn = sorted(y for line in axes.lines for y in line.get_ydata())
        assert drawn == pytest.approx(sorted(asked[column].dropna()))


def test_the_command_writes_the_figure(bench: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    asked = ["limits", str(folders["limits"]), "--run", str(folders["run"]), "--paper", str(folders["paper"])]
    done = bench(*asked, "--output-dir", str(tmp_path))
    assert done.exit_code == Exit.OK, done.stderr
    assert done.stdout.split() == [str(tmp_path / "limits.png"), str(tmp_path / "limits.svg")]
    assert all((tmp_path / name).stat().st_size for name in ("limits.png", "limits.svg"))


def test_what_is_not_there_is_said_in_one_line(bench: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    limits, run, paper = (str(folders[name]) for name in ("limits", "run", "paper"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "ceilings.json").write_text('{"ceilings": [{"rate": 1}]}')
    for arguments, said in (
        ((str(other), "--run", run, "--paper", paper), "ceilings.json: not what bench writes"),
        ((str(tmp_path), "--run", run, "--paper", paper), "ceilings.json: not what bench writes"),
        ((limits, "--run", run, "--paper", str(tmp_path)), "holds no records"),
        ((limits, "--run", run, "--paper", run), "no cell was timed with direction fwd_bwd"),
    ):
        done = bench("limits", *arguments)
        assert done.exit_code == Exit.USAGE
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
