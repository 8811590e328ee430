"""Published figures come from the records beside them: the tables are made again and compared, the README with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attnbench.harness.report.load import load_run
from attnbench.harness.report.write import write_report

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.parent for path in ROOT.glob("results/*/*/environment.json"))
MOST_BYTES = 2 * 2**20


def baseline(run: Path) -> str | None:
    """The one that the published tables were made with, as they say it."""
    found = re.search(r"speed-up over `?([\w-]+)", (run / "tables.md").read_text(), re.IGNORECASE)
    return found.group(1) if found else None


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_records_are_whole(run: Path) -> None:
    loaded = load_run(run)
    assert loaded.cells
    assert not loaded.problems


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_tables_are_what_the_records_say(run: Path, tmp_path: Path) -> None:
    write_report(run, formats=["md"], baseline=baseline(run), out=tmp_path, draw=False)
    tables = (run / "tables.md").read_text()
    assert (tmp_path / "tables.md").read_text() == tables
    assert all((run / name).exists() for name in re.findall(r"!\[.*\]\((.*)\)", tables))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_published_file_is_small(run: Path) -> None:
    large = [path.name for path in run.rglob("*") if path.is_file() and path.stat().st_size > MOST_BYTES]
    assert not large


def test_the_readme_shows_rankings_of_a_published_run() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(
        r"<!-- attnbench:(ranking-\w+):begin -->\n(.*?)\n<!-- attnbench:\1:end -->", readme, re.DOTALL
    )
    assert [name for name, _ in shown] == ["ranking-fwd", "ranking-bwd"]
    linked = re.search(r"\((results/[^)]+)/\)", readme)
    assert linked
    tables = (ROOT / linked.group(1) / "tables.md").read_text()
    for _, table in shown:
        assert table in tables
