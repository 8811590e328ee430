"""The support matrix as pages: Markdown for reading in a repository, HTML for reading anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.families import Family, families
from attnbench.harness.conform.matrix import tables, totals
from attnbench.harness.conform.records import Recorded
from attnbench.harness.conform.reproduce import FOLDER
from attnbench.harness.conform.summary import verdict_rows
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
    found = totals(runs)
    context = {
        "tables": tables(runs),
        "verdicts": verdict_rows(found),
        "absent": [f"{total.impl} on {total.device}" for total in found if not total.there],
        "failures": [failure for run in runs for failure in _failures(run)],
        "unexamined": [unexamined for run in runs for unexamined in _unexamined(run)],
        "runs": [run.folder.name for run in runs],
        "folder": FOLDER,
    }
    written = []
    for name in ("matrix.md", "matrix.html"):
        path = folder / name
        try:
            path.write_text(environment.get_template(f"{name}.j2").render(context) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}", Exit.MACHINE) from error
        written.append(path)
    return written


def _failures(run: Recorded) -> list[tuple[Family, Case, list[str]]]:
    """Each family of failures with the case of its first and the scripts that show any of it."""
    scripts = {(one["impl"], one["found"]): one["script"] for one in run.reproducers if one["script"]}
    return [
        (
            family,
            run.cases[family.failed[0].case],
            [scripts[finding.pair] for finding in family.failed if finding.pair in scripts],
        )
        for family in families(run.findings, run.cases)
    ]


def _unexamined(run: Recorded) -> list[tuple[str, str, str]]:
    """(implementation, the machine's fault or empty, how many of which case), for those that have that reason."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for pair in run.unexamined:
        impl, case = pair
        found.setdefault((impl, run.faults.get(pair, "")), Counter())[run.cases[case].family] += 1
    return [
        (impl, why, ", ".join(f"{name} ({count})" for name, count in counts.items()))
        for (impl, why), counts in found.items()
    ]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_EVIDENCE else text[: MOST_EVIDENCE - 1] + "…"
