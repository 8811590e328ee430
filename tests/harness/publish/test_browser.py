"""The site in a real headless Chromium, opened from files: sorted, filtered, read on a phone and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("site")]
HOSTILE = "<script>alert(1)</script>"
HOSTILE_REASON = "<img src=x onerror=alert(1)> in <b>row</b> 3 & more"
RUN = "run-nvidia-h200-newer.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage",
)  # fmt: skip
PAGES = ("index.html", "support.html", "history.html", "method.html", RUN)


class Site:
    """A page at a time, with what the tests ask of it."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, page: str, *, width: int = 1400, dark: bool = False) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")  # a new address within one page would not load it again
        self.driver.get(f"file://{self.folder}/{page}")

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def heads(self, table: str) -> dict[str, WebElement]:
        found = self.driver.find_elements(By.CSS_SELECTOR, f"{table} thead th button")
        return {button.text: button for button in found}

    def column(self, table: str, place: int) -> list[str]:
        """The sort values, else the texts, of the column's shown cells."""
        return list(self.run(
            "return [...document.querySelectorAll(arguments[0] + ' tbody tr:not([hidden])')].map("
            "row => row.cells[arguments[1]].dataset.value ?? row.cells[arguments[1]].textContent)", table, place,
        ))  # fmt: skip

    def shown(self) -> int:
        return len(self.column("#cell-table", 0))

    def choose(self, field: str, value: str) -> None:
        Select(self.one(f"form select[name={field}]")).select_by_value(value)

    def console(self) -> list[Any]:
        return list(self.driver.get_log("browser"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, service = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    assert browser, f"none of {', '.join(BROWSERS)} is on the path, and ATTNBENCH_BROWSER says there is one"
    assert service, "chromedriver is not on the path"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(service))
    yield chrome
    chrome.quit()


@pytest.fixture
def site(driver: webdriver.Chrome, site_folder: Path) -> Iterator[Site]:
    made = Site(driver, site_folder)
    yield made
    assert made.console() == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_without_a_word_on_the_console(site: Site, page: str) -> None:
    site.open(page)
    assert "attnbench" in site.driver.title
    assert site.one("h1").is_displayed()


def test_a_forbidden_script_is_seen_on_the_console(
    driver: webdriver.Chrome, site_folder: Path, tmp_path: Path
) -> None:
    """The negative control of all tests here that find the console empty, and of the content security policy."""
    text = (site_folder / "method.html").read_text()
    (tmp_path / "page.html").write_text(
        text.replace("</main>", "<script>document.title = 'run'</script></main>")
    )
    broken = Site(driver, tmp_path)
    broken.open("page.html")
    assert broken.driver.title != "run"
    assert any("Content Security Policy" in line["message"] for line in broken.console())


def test_a_column_sorts_both_ways_and_leaves_what_is_missing_last(site: Site) -> None:
    site.open(RUN)
    place = list(site.heads("#cell-table")).index("ms")
    before = sorted(site.column("#cell-table", place))
    for direction in ("ascending", "descending"):
        site.heads("#cell-table")["ms"].click()
        values = site.column("#cell-table", place)
        known = [float(value) for value in values if value]
        assert known == sorted(known, reverse=direction == "descending")
        assert values == [*values[: len(known)], *[""] * (len(values) - len(known))]
        assert len(known) < len(values)
        assert sorted(values) == before
        sorted_by = site.driver.find_elements(By.CSS_SELECTOR, "#cell-table th[aria-sort]")
        assert [(head.text, head.get_attribute("aria-sort")) for head in sorted_by] == [("ms", direction)]


def test_the_overview_sorts_by_family(site: Site) -> None:
    site.open("index.html")
    site.driver.find_elements(By.CSS_SELECTOR, ".heat thead button")[2].click()
    speeds = [float(value) for value in site.column(".heat", 2) if value]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] == 1.0


def test_filters_narrow_and_clear(site: Site) -> None:
    site.open(RUN)
    every = site.shown()
    site.choose("impl", "compiled")
    some = site.shown()
    assert set(site.column("#cell-table", 0)) == {"compiled"}
    site.choose("status", "INCORRECT")
    assert 0 < site.shown() < some < every
    assert site.one("form output").text == f"{site.shown()} of {every} cells"
    site.one("form button[type=reset]").click()
    assert site.shown() == every
    site.one("form input[type=search]").send_keys("fused_a 1k forward")
    assert 0 < site.shown() < every
    assert set(site.column("#cell-table", 0)) == {"fused_a"}


def test_families_filter(site: Site) -> None:
    site.open("index.html")
    site.choose("mask", "causal")
    site.choose("direction", "bwd")
    titles = [
        heading.text
        for heading in site.driver.find_elements(By.CSS_SELECTOR, ".families h3")
        if heading.is_displayed()
    ]
    assert titles == ["Backward, causal, head_dim 64, bf16", "Backward, causal, head_dim 128, bf16"]


def test_a_failing_cell_says_why(site: Site) -> None:
    site.open(RUN)
    site.choose("status", "INCORRECT")
    button = site.one("#cell-table tbody tr:not([hidden]) button.open")
    button.click()
    detail = site.one("tr.detail")
    assert "out[0, 17, 3, 5] is 1.5, the oracle says 1.0, budget 0.004" in detail.text
    assert "bench verify" in detail.text
    assert "NVIDIA H200" in detail.text
    assert "commit bbbbbbbbbbbb" in detail.text
    assert button.get_attribute("aria-expanded") == "true"
    button.click()
    assert site.driver.find_elements(By.CSS_SELECTOR, "tr.detail") == []


def test_a_hostile_name_is_shown_as_text(site: Site) -> None:
    site.open(RUN)
    site.choose("impl", HOSTILE)
    assert site.shown() > 0
    button = site.one("#cell-table tbody tr:not([hidden]) button.open")
    assert button.text == HOSTILE
    button.click()
    assert HOSTILE.replace("'", "") in site.one("tr.detail").text
    assert (
        site.run(
            "return [...document.scripts].filter(script => script.textContent.startsWith('alert')).length"
        )
        == 0
    )
    site.open("index.html")
    assert HOSTILE in site.one("table.heat").text


def test_a_hostile_reason_is_shown_as_text(site: Site) -> None:
    site.open(RUN)
    site.choose("impl", "unlucky")
    site.one("#cell-table tbody tr:not([hidden]) button.open").click()
    assert site.one("tr.detail li").text == HOSTILE_REASON
    assert site.one("tr.detail pre").text == HOSTILE_REASON
    assert site.driver.find_elements(By.CSS_SELECTOR, "img, main b b") == []


@pytest.mark.parametrize("width", [1920, 1400, 1384, 1280, 1024, 721, 560])
def test_no_column_of_a_ranking_is_cut_off(site: Site, width: int) -> None:
    site.open("index.html", width=width)
    # As long as the longest name in the field, and figures of the widest kind, in a run of hundreds of problems.
    site.run(
        "for (const row of document.querySelectorAll('.boards tbody tr'))"
        " for (const [n, text] of [[1, 'xformers-cutlass'], [4, '0.0532'], [5, '1234'], [7, '248/248']])"
        " row.cells[n].textContent = text"
    )
    cut = "[...document.querySelectorAll('.boards .scroll')].map(box => box.scrollWidth - box.clientWidth)"
    assert set(site.run(f"return {cut}")) == {0}


def test_without_script_everything_is_there_to_read(driver: webdriver.Chrome, site: Site) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        site.open(RUN)
        assert site.one("#cell-table").is_displayed()
        assert not site.one("form").is_displayed()
        assert not site.one("#theme").is_displayed()
        assert HOSTILE_REASON in site.one("#failures ~ .scroll").text
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_ranked_name_leads_to_its_cells(site: Site) -> None:
    site.open("index.html")
    link = site.one(".families section:not([hidden]) tbody a")
    name = link.text
    site.driver.get(str(link.get_attribute("href")))
    assert set(site.column("#cell-table", 0)) == {name}
    assert set(site.column("#cell-table", 1)) == {"forward"}


def test_an_address_opens_its_row(site: Site) -> None:
    site.open(RUN)
    row = str(site.run("return document.querySelector('#cell-table tbody tr:nth-child(7)').id"))
    site.open(f"{RUN}#{row}")
    assert f"bench verify {row.removeprefix('row-')}" in site.one("tr.detail").text


def test_the_keyboard_reaches_everything(site: Site) -> None:
    site.open(RUN)
    site.one("body").send_keys(Keys.TAB)
    assert site.run("return document.activeElement.className") == "skip"
    button = site.heads("#cell-table")["TFLOP/s"]
    button.send_keys(Keys.ENTER)
    assert site.one("#cell-table th[aria-sort]").text == "TFLOP/s"
    site.one("#cell-table tbody tr:not([hidden]) button.open").send_keys(Keys.SPACE)
    assert site.one("tr.detail").is_displayed()
    unlabelled = (
        "return [...document.querySelectorAll('select, input')].filter(field => !field.labels.length).length"
        " + [...document.querySelectorAll('svg')].filter(svg => !svg.getAttribute('aria-label')).length"
    )
    assert site.run(unlabelled) == 0


def test_the_theme_follows_the_system_until_it_is_chosen(site: Site) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    plot = "return getComputedStyle(document.querySelector('figure svg')).filter"
    site.open(RUN)
    light = site.run(colour), site.run(plot)
    site.open(RUN, dark=True)
    dark = site.run(colour), site.run(plot)
    assert light[0] != dark[0]
    assert (light[1], dark[1]) == ("none", "invert(1) hue-rotate(180deg)")
    chosen = []
    for _ in range(2):
        site.one("#theme").click()
        chosen.append((site.one("#theme").text, site.run(colour), site.run(plot)))
    assert chosen == [("Theme: light", *light), ("Theme: dark", *dark)]
    site.one("#theme").click()


@pytest.mark.parametrize("page", PAGES)
def test_a_phone_scrolls_tables_and_not_pages(site: Site, page: str) -> None:
    site.open(page, width=390)
    assert site.run("return document.documentElement.scrollWidth") <= 390
    too_wide = (
        "return [...document.querySelectorAll('p, h1, h2, h3, form, nav, pre, dl')].filter("
        "e => e.getBoundingClientRect().right > 391 && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert site.run(too_wide) == []


def test_heads_stay_in_sight(site: Site) -> None:
    site.open(RUN)
    site.run("document.querySelector('.tall').scrollTop = 600")
    top = "const e = arguments[0].getBoundingClientRect(); return e.top"
    table = site.run(top, site.one(".tall"))
    head = site.run(top, site.one("#cell-table thead th:nth-child(2)"))
    assert abs(head - table) < 3
