"""``bench limits``: how far from the limit, in one figure of what other commands wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from attnbench.harness.cli import left_out
from attnbench.harness.cli.results import AsJson, print_paths, usage_errors
from attnbench.harness.run.errors import RunError, make_folder, write_files

One = TypeVar("One")


def limits(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Holds ceilings.json of bench ceilings and counters.json of bench io --counters."
        ),
    ],
    run: Annotated[Path, typer.Option(metavar="RUN", help="The cells under the roofs.")],
    paper: Annotated[Path, typer.Option(metavar="RUN", help="A run of the suite fa1-paper.")],
    output_dir: Annotated[Path | None, typer.Option(help="Where to (default FOLDER).")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw ceilings, roofline, bytes moved and the FlashAttention paper's comparison in one figure, PNG and SVG."""
    from attnbench.harness.limits.ceilings import Sampled
    from attnbench.harness.limits.counters import Counted
    from attnbench.harness.limits.overview import draw_overview
    from attnbench.harness.report.frame import frame
    from attnbench.harness.report.load import load_run
    from attnbench.harness.report.plots import Plot

    sampled = _recorded(folder / "ceilings.json", "ceilings", lambda one: Sampled(**one))
    counted = _recorded(folder / "counters.json", "counted", Counted.from_json)
    with usage_errors():
        runs = [load_run(one) for one in (run, paper)]
        for one in runs:
            left_out.tell(one.folder, one.problems)
        plot = Plot("limits", "Limits", lambda: draw_overview(sampled, counted, *map(frame, runs)))
        encoded = plot.encode("png", "svg")
    target = output_dir or folder
    make_folder(target)
    files = write_files(target, {f"limits.{kind}": content for kind, content in encoded.items()})
    print_paths(files, as_json)


def _recorded(file: Path, name: str, read: Callable[[dict[str, Any]], One]) -> list[One]:
    try:
        return [read(one) for one in json.loads(file.read_text(encoding="utf-8"))[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not what bench writes ({error})") from None
