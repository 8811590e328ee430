from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.harness.problem import Problem
from attnbench.harness.report import render
from attnbench.harness.report.frame import COLUMNS, frame
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.report.metrics import METRICS
from attnbench.harness.report.summary import Summary, summarise
from attnbench.harness.report.tables import Tables, build
from attnbench.harness.run.record import Status

Material = tuple[pd.DataFrame, Tables, Summary]
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


def material(run: Run) -> Material:
    table = frame(run)
    return table, build(table, [METRICS["latency"], METRICS["memory"]]), summarise(run, table)


@pytest.fixture(scope="module")
def made_up(run_folder: Path) -> Material:
    return material(load_run(run_folder))


def assert_rectangular(text: str) -> None:
    """Every Markdown table has a head, a rule and a row at least, all with as many columns."""
    block: list[int] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        elif block:
            assert len(set(block)) == 1, block
            assert len(block) > 2
            block = []


def hostile(builder: ModuleType, text: str) -> Material:
    """A run whose implementation, reason and warning are all ``text``."""
    problem = Problem(1, 16, 1024, 64)
    cells = [
        builder.ok_cell("the right one", problem, 0.5),
        builder.failed_cell(text, problem, Status.ERROR, [text]),
    ]
    return material(
        Run(Path(), cells, [builder.group_of(cells)], {"command": ["bench", text]}, [f"here: {text}"])
    )


class Elements(HTMLParser):
    """Names of all elements and attributes, and all visible text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_runs_nothing_and_shows_everything(made_up: Material, builder: ModuleType) -> None:
    _, tables, summary = made_up
    document = render.html(tables, summary, [("Time", {"svg": SVG, "png": b""})], 10**6)
    found = Elements(document)
    assert "script" not in found.tags
    assert builder.HOSTILE in found.text
    assert "src=" in document
    assert "http" not in document.replace("http-equiv", "")
    for said in (
        "tried to allocate 128.00 GiB",
        "power cap",
        "4242 someone_else",
        "bench run --suite made-up",
        "580.65.06",
        "40.5%",
    ):
        assert said in found.text, said


def test_html_falls_back_to_smaller_pictures_and_then_to_none(made_up: Material) -> None:
    _, tables, summary = made_up
    bare = len(render.html(tables, summary, [], 10**7).encode())
    plots = [("Time", {"svg": b"s" * 9000, "png": b"p" * 3000})]
    assert "svg+xml" in render.html(tables, summary, plots, bare + 20_000)
    assert "image/png" in render.html(tables, summary, plots, bare + 6_000)
    last = render.html(tables, summary, plots, bare + 100)
    assert "<img" not in last
    assert "too large to stand in this file" in last


@settings(max_examples=25)
@given(
    text=st.text(
        st.characters(codec="utf-8", categories=["L", "P", "S", "Nd", "Zs"]), min_size=1, max_size=30
    )
)
def test_text_of_records_never_becomes_markup(builder: ModuleType, text: str) -> None:
    _, tables, summary = hostile(builder, text)
    _, plain, plain_summary = hostile(builder, "plain")
    found = Elements(render.html(tables, summary, [], 10**6))
    expected = Elements(render.html(plain, plain_summary, [], 10**6))
    assert (sorted(found.tags), found.attributes) == (sorted(expected.tags), expected.attributes)
    assert_rectangular(render.markdown(tables, summary))


def test_markdown_tables_are_rectangular(made_up: Material) -> None:
    _, tables, summary = made_up
    assert_rectangular(render.markdown(tables, summary))
    text = render.markdown(tables, summary)
    assert "&lt;script&gt;" in text
    assert "<script>" not in text
    assert "OOM: tried to allocate" in text


def test_latex_escapes_what_latex_reads(made_up: Material) -> None:
    _, tables, summary = made_up
    text = render.latex(tables, summary)
    assert r"RuntimeError: 50\% of \$x\_1 \& \{y\} \textbar{} z" in text
    assert r"\textless{}script\textgreater{}" in text
    for tabular in text.split(r"\begin{tabular}")[1:]:
        rows = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(tables.tables)


def test_csv_reads_back_with_every_column_and_missing_stays_missing(made_up: Material) -> None:
    table, _, _ = made_up
    back = pd.read_csv(io.StringIO(render.csv(table)))
    assert list(back.columns) == [name for name in COLUMNS if name != "round_ms"]
    assert len(back) == len(table)
    assert back["median_ms"].isna().sum() == (table["status"] != "OK").sum()
    assert back["impl"].to_list() == table["impl"].to_list()
