"""The pages as files: complete in themselves, well formed, with everything out of a record as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.publish.site import write_site
from attnbench.harness.run.errors import RunError

pytestmark = pytest.mark.xdist_group("site")  # one site for all of them
HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "input", "br", "link", "img", "hr", "use", "path", "rect"}


class Page(HTMLParser):
    """A page's tags, ids, links and texts; AssertionError where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.labelled: list[dict[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if found := named.get("id"):
            self.ids[found] += 1
        if tag == "a":
            self.links.append(named.get("href") or "")
        elif "href" in named and not (named["href"] or "").startswith("#"):
            self.loaded.append(named["href"] or "")
        self.loaded += [
            value
            for name, value in attrs
            if name in ("src", "xlink:href", "data") and value and value[0] != "#"
        ]
        assert not [name for name in named if name.startswith("on")], f"{tag} has a handler"

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.texts.append(data)


@pytest.fixture(scope="module")
def site(site_folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in site_folder.glob("*.html")}


@pytest.fixture(scope="module")
def pages(site: dict[str, str]) -> dict[str, Page]:
    return {name: Page(text) for name, text in site.items()}


def test_a_page_for_each_question_and_each_run(site: dict[str, str]) -> None:
    assert set(site) == {
        "index.html", "support.html", "history.html", "method.html",
        "run-nvidia-h200-newer.html", "run-nvidia-h200-older.html",
    }  # fmt: skip


def test_nothing_is_loaded_from_anywhere(pages: dict[str, Page]) -> None:
    assert {name: page.loaded for name, page in pages.items() if page.loaded} == {}


def test_ids_are_unique_and_links_lead_somewhere(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert [found for found, count in page.ids.items() if count > 1] == [], name
        for link in page.links:
            file, _, anchor = link.partition("#")
            target = pages[file or name]
            assert not anchor or "=" in anchor or anchor in target.ids, link


def test_hostile_names_are_text_in_every_page(site: dict[str, str], pages: dict[str, Page]) -> None:
    for name, text in site.items():
        assert HOSTILE not in text, name
        assert len(pages[name].scripts) == (2 if name.startswith("run-") else 1)
    assert any(HOSTILE in text for text in pages["run-nvidia-h200-newer.html"].texts)
    assert any(HOSTILE in text for text in pages["index.html"].texts)


def test_the_policy_allows_the_one_script_and_no_other(site: dict[str, str], pages: dict[str, Page]) -> None:
    for name, text in site.items():
        script = pages[name].scripts[-1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
        assert policy
        assert f"script-src &#39;sha256-{digest}&#39;" in policy[1]
        assert "default-src &#39;none&#39;" in policy[1]


def test_a_line_and_its_details_for_every_cell(runs: list[PublishedRun], pages: dict[str, Page]) -> None:
    page = pages["run-nvidia-h200-newer.html"]
    details = json.loads(page.scripts[0])
    addresses = [row.address for row in runs[0].rows]
    assert sorted(row["address"] for row in details["rows"]) == sorted(addresses)
    assert {f"row-{address}" for address in addresses} <= set(page.ids)
    wrong = [row for row in details["rows"] if row["status"] == "INCORRECT"]
    assert wrong
    assert all("the oracle says 1.0" in row["reasons"][0] for row in wrong)
    assert all(row["command"].startswith("bench run --suite ") for row in details["rows"])


def test_sites_of_equal_runs_are_equal(
    runs: list[PublishedRun], site: dict[str, str], tmp_path: Path
) -> None:
    again = {path.name: path.read_text() for path in write_site(runs[1:], tmp_path)}
    name = "run-nvidia-h200-older.html"
    plain = re.compile(r"<footer>.*?</footer>", re.DOTALL)
    assert plain.sub("", again[name]) == plain.sub("", site[name])


def test_a_folder_is_named_where_it_cannot_be_one(runs: list[PublishedRun], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file: is not a folder"):
        write_site(runs, tmp_path / "file")
