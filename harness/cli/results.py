"""``bench report`` and ``bench plot``: from a run's records to tables and figures, at any later time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from attnbench.harness.cli import options
from attnbench.harness.run.errors import RunError

# As report.write names its files; written out here because that module imports pandas.
FORMATS = ("md", "csv", "tex", "html")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
Baseline = Annotated[str | None, typer.Option(help="Implementation that speed-ups are relative to.")]
Metrics = Annotated[list[str] | None, typer.Option(help="latency,tflops,speedup,memory ...")]
AsJson = Annotated[bool, typer.Option("--json", help="The paths as one JSON document on stdout.")]


def report(
    run: RunFolder,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="md,csv,tex,html (default all).")
    ] = None,
    baseline: Baseline = None,
    metrics: Metrics = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where to (default RUN).")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's tables; print their paths."""
    kinds = options.known("--format", "format", formats, FORMATS) or None
    chosen = options.metrics(metrics, baseline)
    with usage_errors():
        from attnbench.harness.report.write import write_report

        files = write_report(run, formats=kinds, baseline=baseline, metrics=chosen, out=output_dir)
    print_paths(files, as_json)


def plot(
    run: RunFolder,
    baseline: Baseline = None,
    metrics: Metrics = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where to (default RUN/plots).")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run's figures as PNG and SVG; print their paths."""
    chosen = options.metrics(metrics, baseline)
    with usage_errors():
        from attnbench.harness.report.write import write_plots

        files = write_plots(run, metrics=chosen, out=output_dir, baseline=baseline)
    print_paths(files, as_json)


def print_paths(files: Sequence[Path], as_json: bool) -> None:
    paths = [str(file) for file in files]
    typer.echo(json.dumps({"files": paths}) if as_json else "\n".join(paths))


@contextmanager
def usage_errors() -> Iterator[None]:
    """What records are asked raises ValueError: for a folder without any, a baseline that is not in it."""
    try:
        yield
    except ValueError as error:
        raise RunError(str(error)) from error
