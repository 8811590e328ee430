"""Tables written out: Markdown, LaTeX, HTML by jinja2 templates, CSV by pandas.

Each format has its own jinja2 environment whose ``finalize`` escapes every expression, so that nothing out of a record
(an implementation's name, an exception's text) can break the document or run in it, whatever a template forgets.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe

from attnbench.harness.report.escape import markdown_escape
from attnbench.harness.report.summary import Summary
from attnbench.harness.report.tables import DIRECTION_TITLES, NOT_RUNNABLE, Tables, figure

if TYPE_CHECKING:
    import pandas as pd

TEMPLATES = Path(__file__).parent / "templates"

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "×": r"$\times$", "µ": r"$\mu$", "–": "--", "…": r"\dots{}", "\n": " ",
}  # fmt: skip
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def markdown(tables: Tables, summary: Summary, plots: Sequence[tuple[str, PurePath]] = ()) -> str:
    """plots: title and file of each figure, relative to the document."""
    text = _render("tables.md.j2", markdown_escape, tables=tables, summary=summary, plots=plots)
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def latex(tables: Tables, summary: Summary) -> str:
    return _render("tables.tex.j2", latex_escape, LATEX_DELIMITERS, tables=tables, summary=summary)


def html(
    tables: Tables, summary: Summary, plots: Sequence[tuple[str, dict[str, bytes]]], most_bytes: int
) -> str:
    """One self-contained document. plots: title and encodings (svg, png) of each figure; embedded as images, so that
    none can script. The SVGs if they fit into ``most_bytes``, else the PNGs; without plots if these do not fit either.
    """
    for kind, mime in (("svg", "image/svg+xml"), ("png", "image/png")):
        images = [
            (title, f"data:{mime};base64,{base64.b64encode(files[kind]).decode()}") for title, files in plots
        ]
        text = _render("report.html.j2", markupsafe.escape, tables=tables, summary=summary, plots=images)
        if len(text.encode()) <= most_bytes:
            return text
    return _render("report.html.j2", markupsafe.escape, tables=tables, summary=summary, plots=None)


def csv(table: pd.DataFrame) -> str:
    """Long form: one line a cell with every column of the frame; a missing figure is an empty field."""
    return table.drop(columns="round_ms").to_csv(index=False, float_format="%.6g", lineterminator="\n")


def latex_escape(value: Any) -> str:
    return _LATEX_SPECIAL.sub(lambda match: _LATEX[match.group()], str(value))


LATEX_DELIMITERS: dict[str, Any] = {
    "block_start_string": "<%", "block_end_string": "%>", "variable_start_string": "<<", "variable_end_string": ">>",
    "comment_start_string": "<#", "comment_end_string": "#>",
}  # fmt: skip


def _render(
    template: str, escape: Callable[[Any], str], delimiters: dict[str, Any] | None = None, **context: Any
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        **(delimiters or {}),
    )
    environment.globals |= {"directions": DIRECTION_TITLES, "not_runnable": NOT_RUNNABLE, "figure": figure}
    return environment.get_template(template).render(context)
