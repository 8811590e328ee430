"""The rankings as Markdown, written between markers of pages that people edit around them.

A page says where with ``<!-- attnbench:NAME:begin -->`` and ``<!-- attnbench:NAME:end -->``; NAME is ``leaderboard``
(everything), or ``ranking-fwd``, ``ranking-bwd`` and ``ranking-fwd_bwd`` (one table, of the first board).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jinja2
import markupsafe

from attnbench.harness.publish import commands
from attnbench.harness.publish.boards import Board, boards
from attnbench.harness.publish.families import capitalize_first
from attnbench.harness.publish.rows import PublishedRun
from attnbench.harness.report.escape import markdown_escape
from attnbench.harness.report.tables import DIRECTION_TITLES, figure
from attnbench.harness.run.errors import RunError, make_folder, writing

TEMPLATES = Path(__file__).parent / "templates"
NEW_PAGE = """# Leaderboard

Rankings by problem family, made from the records beside this page by `bench publish`; none of it is typed.

<!-- attnbench:leaderboard:begin -->
<!-- attnbench:leaderboard:end -->
"""
_MARKED = re.compile(r"<!-- attnbench:([\w-]+):begin -->\n(.*?)<!-- attnbench:\1:end -->", re.DOTALL)


def write_page(runs: Sequence[PublishedRun], page: Path) -> None:
    """Fills the markers of ``page``, which is made if it is not there. RunError if it has none, or an unknown one."""
    text = page.read_text(encoding="utf-8") if page.is_file() else NEW_PAGE
    make_folder(page.parent)
    filled = fill(text, sections(boards(runs), page.parent), str(page))
    with writing(page):
        page.write_text(filled, encoding="utf-8")


def fill(text: str, contents: dict[str, str], name: str) -> str:
    """``text`` with what stands between its markers replaced. RunError names ``name`` and what is wrong with it."""
    found = [match[1] for match in _MARKED.finditer(text)]
    if not found:
        raise RunError(f"{name} has no pair of markers <!-- attnbench:leaderboard:begin --> and :end")
    for marker in found:
        if marker not in contents:
            raise RunError(f"{name} marks {marker!r}; these runs have {', '.join(contents) or 'nothing'}")

    def filled(match: re.Match[str]) -> str:
        return f"<!-- attnbench:{match[1]}:begin -->\n{contents[match[1]]}<!-- attnbench:{match[1]}:end -->"

    return _MARKED.sub(filled, text)


def sections(found: Sequence[Board], folder: Path) -> dict[str, str]:
    """Markdown by marker. folder: of the page, which links to runs start from."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        finalize=lambda value: value if isinstance(value, markupsafe.Markup) else markdown_escape(value),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"raw": markupsafe.Markup, "capitalize_first": capitalize_first}
    environment.globals |= {
        "by_direction": lambda board: groupby(board.families, key=lambda column: column.ranking.direction),
        "figure": figure,
        "directions": DIRECTION_TITLES,
        "command": commands.of_run,
        "folder": lambda run: Path(os.path.relpath(run.run.folder, folder)).as_posix(),
    }

    def render(template: str, **context: object) -> str:
        text = environment.get_template(template).render(**context)
        return "".join(line.rstrip() + "\n" for line in text.splitlines())

    contents = {"leaderboard": render("leaderboard.md.j2", boards=found)}
    for column in found[0].overall if found else ():
        contents[f"ranking-{column.ranking.direction}"] = render("ranking.md.j2", column=column)
    return contents
