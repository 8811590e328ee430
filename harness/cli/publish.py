"""``bench publish``: a site and Markdown pages from runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnbench.harness.cli import left_out, published
from attnbench.harness.cli.results import print_paths
from attnbench.harness.run.errors import RunError

PAGE = "A Markdown page whose markers are filled; made if it is not there."


def publish(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help="Folders of runs, or above them (default results)."),
    ] = None,
    site: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the static site here.")] = None,
    page: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=PAGE)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The paths as one JSON document on stdout.")
    ] = False,
) -> None:
    """Write a site and leaderboard pages from runs; print their paths."""
    if site is None and not page:
        raise RunError("name what to write: --site DIR, or --page results/LEADERBOARD.md")
    from attnbench.harness.publish import conformance

    found = published.find(runs or [published.RESULTS])
    loaded = published.load(found.runs)
    reports = conformance.load(found.conformance) if site is not None else []
    for folder, problems in (
        *((one.run.folder, one.run.problems) for one in loaded),
        *(told for report in reports for told in report.problems.items()),
    ):
        left_out.tell(folder, problems)
    written: list[Path] = []
    for file in page or []:
        from attnbench.harness.publish.leaderboard import write_page

        write_page(loaded, file)
        written.append(file)
    if site is not None:
        from attnbench.harness.publish.site import write_site

        written += write_site(loaded, site, reports)
    print_paths(written, as_json)
