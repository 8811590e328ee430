"""``bench matrix``: the support matrix from conformance runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnbench.harness.run.errors import make_folder, writing


def matrix(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of conformance runs.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the pages go (default the first run's folder).")
    ] = None,
) -> None:
    """Write the support matrix of conformance runs, Markdown and HTML; print their paths."""
    from attnbench.harness.conform.records import read
    from attnbench.harness.conform.write_matrix import write_matrix

    read_runs = [read(run) for run in runs]
    for run in read_runs:
        for problem in run.problems:
            typer.echo(f"{run.folder}: left out: {problem}", err=True)
    folder = make_folder(output_dir or runs[0])
    with writing(folder):
        files = write_matrix(read_runs, folder)
    typer.echo("\n".join(map(str, files)))
