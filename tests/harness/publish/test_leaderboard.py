"""Markdown between markers: filled from records alone, around whatever people wrote, with nothing that could run."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.harness.publish.boards import boards
from attnbench.harness.publish.leaderboard import fill, sections, write_page
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.report import render
from attnbench.harness.report.frame import frame
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.summary import summarise
from attnbench.harness.report.tables import build
from attnbench.harness.run.errors import RunError

BEGIN, END = "<!-- attnbench:leaderboard:begin -->\n", "<!-- attnbench:leaderboard:end -->"


def test_a_new_page_is_made_and_written_again_alike(runs: list[PublishedRun], tmp_path: Path) -> None:
    page = tmp_path / "results" / "LEADERBOARD.md"
    write_page(runs, page)
    first = page.read_text()
    assert "## NVIDIA H200, made-up" in first
    write_page(runs, page)
    assert page.read_text() == first


def test_what_people_wrote_stays(runs: list[PublishedRun], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{BEGIN}a stale line\n{END}\n\nAfter.\n")
    write_page(runs, page)
    text = page.read_text()
    assert text.startswith("Before.\n\n" + BEGIN)
    assert text.endswith(END + "\n\nAfter.\n")
    assert "a stale line" not in text


def test_a_ranking_is_the_reports_own_table(runs: list[PublishedRun], tmp_path: Path) -> None:
    table = frame(runs[0].run)
    report = render.markdown(build(table, [METRICS["latency"]]), summarise(runs[0].run, table))
    contents = sections(boards(runs), tmp_path)
    assert contents["ranking-fwd"] in report
    assert contents["ranking-bwd"] in report


def test_hostile_names_are_text(runs: list[PublishedRun], tmp_path: Path) -> None:
    text = sections(boards(runs), tmp_path)["leaderboard"]
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_every_link_leads_to_its_run(runs: list[PublishedRun], folders: list[Path], tmp_path: Path) -> None:
    root = folders[0].parents[1]
    text = sections(boards(runs), root)["leaderboard"]
    assert "](nvidia-h200/newer/)" in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nothing marked", "has no pair of markers"),
        (BEGIN, "has no pair of markers"),
        (
            "<!-- attnbench:speed:begin -->\n<!-- attnbench:speed:end -->",
            "marks 'speed'; these runs have leaderboard",
        ),
    ],
)
def test_a_page_that_cannot_be_filled_says_why(text: str, why: str) -> None:
    with pytest.raises(RunError, match=f"page.md {why}"):
        fill(text, {"leaderboard": ""}, "page.md")
