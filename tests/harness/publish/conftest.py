"""Made-up runs to publish: two of the same suite on one card, an hour apart, with hostile text in their records."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from attnbench.harness.cli.app import app
from attnbench.harness.publish import rows
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.publish.site import write_site
from attnbench.harness.run import journal
from attnbench.harness.run.record import Cell

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DRIVER = "chromedriver"
HOSTILE_REASON = "<img src=x onerror=alert(1)> in <b>row</b> 3 & more"


def browser() -> str | None:
    """The Chromium here, None where it or its driver is missing."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found if shutil.which(DRIVER) else None


def browser_required() -> bool:
    """Set where a missing browser is a defect of the set-up, as in continuous integration, and not of the machine."""
    return bool(os.environ.get("ATTNBENCH_BROWSER"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked ``browser`` where there is none and none is required; where required, they fail."""
    needing = [item for item in items if item.get_closest_marker("browser")]
    if needing and not browser() and not browser_required():
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not browser() and not browser_required():
        terminalreporter.write_line(
            "deselected: tests of the site in a browser (no Chromium with chromedriver here)"
        )


@pytest.fixture(scope="session")
def environment(builder: ModuleType) -> Callable[..., dict[str, Any]]:
    """A full environment of an H200, with some fields of one's own."""

    def make(**fields: Any) -> dict[str, Any]:
        return builder.ENVIRONMENT | fields

    return make


@pytest.fixture(scope="session")
def folders(
    builder: ModuleType, environment: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """An older and a newer run; read only."""
    root = tmp_path_factory.mktemp("results") / "nvidia-h200"
    groups = builder.problems(lengths=(1024, 4096), head_dims=(64, 128))
    older = environment(started="2026-11-20T11:00:00+00:00", commit="aaaaaaaaaaaa", dirty=False)
    newer = environment(started="2026-11-20T12:00:00+00:00", commit="bbbbbbbbbbbb", dirty=False)
    return [
        with_hostile_reasons(builder.write_run(root / "older", groups[:2], older)),
        with_hostile_reasons(builder.write_run(root / "newer", groups, newer)),
    ]


def with_hostile_reasons(folder: Path) -> Path:
    """Markup in the reason and the evidence of every cell of one implementation."""
    lines = []
    for record in journal.read(folder)[0]:
        if isinstance(record, Cell) and record.impl == "unlucky":
            record = dataclasses.replace(record, reasons=[HOSTILE_REASON], evidence=HOSTILE_REASON)  # noqa: PLW2901
        lines.append(journal.seal(record) + "\n")
    (folder / "records.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def runs(folders: list[Path]) -> list[PublishedRun]:
    """Both, latest first."""
    return rows.load(folders)


@pytest.fixture(scope="session")
def site_folder(runs: list[PublishedRun], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of both runs; read only."""
    folder = tmp_path_factory.mktemp("site")
    write_site(runs, folder)
    return folder


@pytest.fixture
def bench() -> Callable[..., Result]:
    """Calls ``bench`` in this process; workers are processes of their own."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="bench")

    return call
