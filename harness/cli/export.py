"""``bench export``: a run in the format of another tool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from attnbench.harness.cli import left_out, options
from attnbench.harness.cli.results import usage_errors
from attnbench.harness.run.errors import Exit, RunError, make_folder, writing

# As publish.export names its formats; written out here because that module imports pandas.
FORMATS = ("pytest-benchmark", "bmf", "csv", "parquet")
BINARY = ("parquet",)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="A file (default stdout).")] = None,
) -> None:
    """Write a run for another tool: pytest-benchmark, Bencher (BMF), or a table as CSV or Parquet."""
    (chosen,) = options.known("--format", "format", [format_], FORMATS) or ("",)
    if not chosen:
        raise RunError(f"--format: name one of {', '.join(FORMATS)}")
    if chosen in BINARY and output is None and sys.stdout.isatty():
        raise RunError(f"--format {chosen} is binary: name a file with --output, or redirect stdout")
    from attnbench.harness.publish.export import FORMATS as WRITERS
    from attnbench.harness.report.load import load_run

    with usage_errors():
        loaded = load_run(run)
    left_out.tell(run, loaded.problems)
    content = WRITERS[chosen](loaded)
    if chosen in ("pytest-benchmark", "bmf"):
        untimed = sum(cell.timing is None for cell in loaded.cells)
        if untimed == len(loaded.cells):
            raise RunError(f"{run} holds no timed cell, which is all that {chosen} can say", Exit.NOTHING)
        if untimed:
            typer.echo(f"{untimed} of {len(loaded.cells)} cells have no time, and are left out", err=True)
    if output is None:
        typer.echo(content, nl=False)
    else:
        make_folder(output.parent)
        with writing(output):
            output.write_bytes(content)
        typer.echo(output)
