"""The support matrix as pages: Markdown for reading in a repository, HTML for reading anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from attnbench.harness.conform.matrix import tables
from attnbench.harness.conform.records import Recorded
from attnbench.harness.report.escape import markdown_escape
from attnbench.harness.run.errors import Exit, RunError

MOST_EVIDENCE = 300


def write_matrix(runs: Sequence[Recorded], folder: Path) -> list[Path]:
    """Writes ``matrix.md`` and ``matrix.html``; RunError where it cannot."""
    environment = Environment(
        loader=PackageLoader("attnbench.harness.conform"),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"cut": _cut, "cell": markdown_escape}
    context = {"tables": tables(runs), "runs": [run.folder.name for run in runs]}
    written = []
    for name in ("matrix.md", "matrix.html"):
        path = folder / name
        try:
            path.write_text(environment.get_template(f"{name}.j2").render(context) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}", Exit.MACHINE) from error
        written.append(path)
    return written


def _cut(text: str) -> str:
    return text if len(text) <= MOST_EVIDENCE else text[: MOST_EVIDENCE - 1] + "…"
