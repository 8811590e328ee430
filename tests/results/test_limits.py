"""Published ceilings and counters: their pages are made again from the JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnbench.harness.limits import ceiling_table, io_tables
from attnbench.harness.limits.ceilings import Sampled
from attnbench.harness.limits.counters import Counted

FOLDERS = sorted((Path(__file__).parents[2] / "results").glob("*/*-limits"))
by_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def test_some_are_published() -> None:
    assert FOLDERS


@by_folder
def test_ceilings_are_what_was_sampled_and_within_the_hardwares_bound(folder: Path) -> None:
    document = json.loads((folder / "ceilings.json").read_text())
    sampled = [Sampled(**one) for one in document["ceilings"]]
    assert (folder / "ceilings.md").read_text() == ceiling_table.markdown(sampled)
    for one in sampled:
        one.judge()
        assert one.rounds
        assert not one.why
    assert document["environment"]["commit"] in folder.name
    assert document["environment"]["dirty"] is False


@by_folder
def test_counters_are_what_was_counted(folder: Path) -> None:
    document = json.loads((folder / "counters.json").read_text())
    counted = [Counted.from_json(one) for one in document["counted"]]
    names = sorted(next(iter(document["models"].values())))
    rows = io_tables.counted_rows(counted, document["models"], names)
    page = (folder / "counters.md").read_text()
    assert all(f"| {' | '.join(row)} |" in page for row in rows)
    assert len(rows) == page.count("\n") - 4
    assert document["environment"]["commit"] in folder.name
    assert not any(one.reason for one in counted)
