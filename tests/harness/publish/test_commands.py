"""``bench publish`` and ``bench export``: what they write, what they print, and their mistakes in one line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from attnbench.harness.cli import published
from attnbench.harness.publish import commands, rows
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.run.errors import Exit

Bench = Callable[..., Result]


def test_publish_writes_a_site_and_a_page(bench: Bench, folders: list[Path], tmp_path: Path) -> None:
    page, site = tmp_path / "LEADERBOARD.md", tmp_path / "site"
    answer = bench("publish", folders[0], "--site", site, "--page", page, "--json")
    assert answer.exit_code == Exit.OK
    written = [Path(name) for name in json.loads(answer.stdout)["files"]]
    assert {page, site / "index.html", site / "run-nvidia-h200-older.html"} <= set(written)
    assert all(path.stat().st_size for path in written)


def test_a_folder_above_runs_stands_for_all_of_them(folders: list[Path]) -> None:
    assert sorted(published.find([folders[0].parent]).runs) == sorted(folders)
    assert published.find([folders[0]]).runs == [folders[0]]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("publish",), "name what to write"),
        (
            ("publish", "nowhere", "--site", "site"),
            "nowhere holds no run (records*.jsonl, or cases.json), nor does a folder in it",
        ),
        (("export", "nowhere", "--format", "csv"), "nowhere is not a folder"),
        (("export", "nowhere", "--format", "cvs"), "unknown format 'cvs'; did you mean csv?"),
        (
            ("verify", "123456789abc", "--tolerance", "much"),
            "--tolerance much: write a share above 0, such as 5%",
        ),
        (("verify", "123456789abc", "--results", "nowhere"), "nowhere holds no run"),
    ],
)
def test_a_mistake_is_one_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = bench(*arguments)
    assert answer.exit_code == Exit.USAGE
    assert answer.stdout == ""
    assert why in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_export_prints_data_on_stdout_and_talk_on_stderr(bench: Bench, folders: list[Path]) -> None:
    answer = bench("export", folders[0], "--format", "bmf")
    assert answer.exit_code == Exit.OK
    assert json.loads(answer.stdout)
    assert "cells have no time, and are left out" in answer.stderr


def test_export_writes_a_file_and_prints_its_path(bench: Bench, folders: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "run.parquet"
    answer = bench("export", folders[0], "--format", "parquet", "--output", target)
    assert answer.stdout == f"{target}\n"
    assert target.read_bytes()[:4] == b"PAR1"


def test_the_command_of_a_row_is_one_that_bench_run_takes(runs: list[PublishedRun], bench: Bench) -> None:
    """Of a run with its options recorded; the suite of these records is made up, so that is what bench objects to."""
    row = next(row for row in runs[0].rows if row.cell.timing)
    words = shlex.split(commands.of_row(runs[0], row))
    assert words[:4] == ["bench", "run", "--suite", "made-up"]
    answer = bench(*words[1:])
    assert answer.exit_code == Exit.USAGE
    assert "unknown suite 'made-up'" in answer.stderr or "unknown implementation" in answer.stderr


def test_the_command_of_a_row_repeats_the_runs_method(runs: list[PublishedRun], folders: list[Path]) -> None:
    plan = folders[1] / "plan.json"
    plan.write_text(
        json.dumps({"plans": [], "options": {"rounds": 9, "samples": 5, "hot": True, "cudagraph": False}})
    )
    try:
        (run,) = rows.load([folders[1]])
        command = commands.of_row(run, run.rows[0])
    finally:
        plan.unlink()
    assert command.endswith("--rounds 9 --hot")


def test_the_command_of_a_run_is_as_typed(runs: list[PublishedRun]) -> None:
    assert commands.of_run(runs[0]) == "bench run --suite made-up --only '<script>alert(1)</script>'"
