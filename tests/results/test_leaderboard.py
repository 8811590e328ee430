"""The published leaderboard is what the records say; `bench publish --page results/LEADERBOARD.md` writes it."""

from __future__ import annotations

from pathlib import Path

from attnbench.harness.cli import published
from attnbench.harness.publish.boards import boards
from attnbench.harness.publish.leaderboard import fill, sections

RESULTS = Path(__file__).parents[2] / "results"
PAGE = RESULTS / "LEADERBOARD.md"


def test_the_page_is_what_the_records_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    runs = published.load(published.find([RESULTS]).runs)
    assert fill(text, sections(boards(runs), RESULTS), PAGE.name) == text
