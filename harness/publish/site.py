"""The site: static pages from runs, each complete in itself, for a browser without a server or a network.

Everything out of a record passes jinja2's autoescape, or reaches the page as JSON that the script sets as text. The
content security policy allows one script by its hash, so that even what were to slip through could not run.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
import markupsafe

from attnbench.harness.publish import figures
from attnbench.harness.publish.boards import Board, FamilyBoard, boards
from attnbench.harness.publish.cells import details_of, failures, filters_of, lines_of
from attnbench.harness.publish.conformance import Conformance
from attnbench.harness.publish.families import capitalize_first
from attnbench.harness.publish.integrity import RULES
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.publish.support import FAILED, Matrix, matrices
from attnbench.harness.publish.timeline import timelines
from attnbench.harness.publish.tolerance import TOLERANCE
from attnbench.harness.report.summary import summarise
from attnbench.harness.report.tables import DIRECTION_TITLES, figure, length_text
from attnbench.harness.run.errors import make_folder, writing

TEMPLATES = Path(__file__).parent / "templates"
PAGES = (
    ("index.html", "Leaderboard"), ("support.html", "Support"), ("history.html", "Runs and history"),
    ("method.html", "Method"),
)  # fmt: skip


def write_site(runs: Sequence[PublishedRun], folder: Path, found: Sequence[Conformance] = ()) -> list[Path]:
    """Writes the pages of ``runs`` (latest first) and of what conformance runs found; returns their paths."""
    make_folder(folder)
    written = []
    for name, text in pages(runs, found):
        with writing(folder / name):
            (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    # Tells GitHub Pages to serve the files as they are.
    with writing(folder):
        (folder / ".nojekyll").touch()
    return written


def pages(runs: Sequence[PublishedRun], conformance: Sequence[Conformance] = ()) -> Iterator[tuple[str, str]]:
    """Each page's file name and text."""
    environment = _environment(runs)
    found = boards(runs)
    yield (
        "index.html",
        _render(environment, "index.html", boards=found, link=_link, options=_options, spans=_spans),
    )
    yield (
        "support.html",
        _render(
            environment,
            "support.html",
            matrices=matrices(runs),
            conformance=conformance,
            groups=_groups,
            reasons_of=_reasons_of,
        ),
    )
    lines = [(timeline, figures.of_timeline(timeline, n)) for n, timeline in enumerate(timelines(runs))]
    yield "history.html", _render(environment, "history.html", timelines=lines, timed=_timed, failed=_failed)
    yield "method.html", _render(environment, "method.html", rules=_rules(), tolerance=f"{TOLERANCE:.0%}")
    for run in runs:
        yield f"run-{run.slug}.html", _run_page(environment, run)


def _run_page(environment: jinja2.Environment, run: PublishedRun) -> str:
    summary = summarise(run.run, run.table)
    return _render(
        environment,
        "run.html",
        page=f"run-{run.slug}.html",
        run=run,
        summary=summary,
        filters=filters_of(run),
        lines=lines_of(run),
        failures=failures(run),
        plots=list(figures.of_run(run.table)),
        details=details_of(run),
    )


def _render(environment: jinja2.Environment, template: str, **context: Any) -> str:
    return environment.get_template(f"{template}.j2").render({"page": template, **context})


def _environment(runs: Sequence[PublishedRun]) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("site.css", "site.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.filters["capitalize_first"] = capitalize_first
    environment.globals |= {
        "style": markupsafe.Markup(style),
        "script": markupsafe.Markup(script),
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        "pages": PAGES,
        "runs": runs,
        "version": importlib.metadata.version("attnbench"),
        "directions": DIRECTION_TITLES,
        "figure": figure,
        "length": length_text,
        "percent": lambda share: max(0.0, min(100.0, 100 * share)),
    }
    return environment


def _link(board: FamilyBoard, impl: str) -> str:
    """The implementation's cells of the board's family, on its run's page."""
    wanted: dict[str, object] = {"impl": impl, "direction": DIRECTION_TITLES[board.ranking.direction]}
    if board.family:
        wanted |= {"mask": board.family.mask, "head_dim": board.family.head_dim}
    return f"run-{board.run.slug}.html#{urlencode(wanted)}"


def _options(board: Board, field: str) -> list[tuple[str, str]]:
    """What a filter over a board's families offers: value and text."""
    values = dict.fromkeys(getattr(column.family, field) for column in board.families)
    titles = DIRECTION_TITLES if field == "direction" else {}
    return [(str(value), titles.get(str(value), str(value).replace("_", "-"))) for value in values]


def _spans(board: Board) -> list[tuple[str, int]]:
    directions = [column.ranking.direction for column in board.families]
    return [(direction, len(list(own))) for direction, own in groupby(directions)]


def _groups(matrix: Matrix) -> list[tuple[str, int]]:
    return [(group, len(list(own))) for group, own in groupby(group for group, _ in matrix.features)]


def _reasons_of(matrix: Matrix) -> list[tuple[str, list[str]]]:
    """Every implementation with reasons, each said once."""
    found = []
    for impl, entries in matrix.entries.items():
        reasons = Counter(reason for entry in entries for reason in entry.reasons)
        if reasons:
            found.append((impl, list(reasons)))
    return found


def _timed(run: PublishedRun) -> int:
    return sum(row.cell.timing is not None for row in run.rows)


def _failed(run: PublishedRun) -> int:
    return sum(row.cell.status in FAILED or bool(row.refusals) for row in run.rows)


def _rules() -> list[tuple[str, str]]:
    return [(rule, (check.__doc__ or "").strip()) for rule, check in RULES.items()]
