"""``bench verify``: one published row, measured again on this machine."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from attnbench.harness.cli import left_out, machine, options, published
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.progress import make_progress

ROW = "The row's address, as a site shows it, or the name of its cell."
RESULTS = "Where published runs lie (default results)."


def verify(
    row: Annotated[str, typer.Argument(metavar="ROW", help=ROW, show_default=False)],
    results: Annotated[list[Path] | None, typer.Option(metavar="DIR", help=RESULTS)] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Compare with this one (default the row's own).")
    ] = None,
    tolerance: Annotated[str, typer.Option(help="How far the ratio may lie from the published one.")] = "5%",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=2)] = 20,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default as in run).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors alone on stderr.")] = False,
) -> None:
    """Measure a published row again: reproduced (exit 0), differs (1), or cannot (3; 5 where it is the machine)."""
    allowed = _share(tolerance)
    gpus = visible_gpus()
    (chosen,) = machine.choose_devices(options.split([device] if device else None)[:1], gpus)
    name = "cpu" if chosen == "cpu" else gpus[int(chosen.partition(":")[2])].name
    loaded = published.load(published.find(results or [published.RESULTS]).runs)
    for one in loaded:
        left_out.tell(one.run.folder, one.run.problems)

    from attnbench.harness.publish import verify as verification

    run, found = verification.find(loaded, row)
    beside = verification.choose_baseline(run, found, baseline)
    with (
        tempfile.TemporaryDirectory(prefix="attnbench-verify-") as folder,
        make_progress(quiet=quiet, verbose=False) as progress,
    ):
        place = verification.Place(chosen, name, Path(folder), progress)
        answer = verification.verify(run, found, beside, place, tolerance=allowed, rounds=rounds)
    if as_json:
        typer.echo(json.dumps(answer.to_json() | {"cell": found.cell.id, "run": str(run.run.folder)}))
    else:
        typer.echo(f"{answer.outcome}: {found.cell.id} ({answer.row}): {answer.reason}")
        for title, ratio in (("published", answer.published), ("here", answer.here)):
            if ratio and ratio.value is not None:
                span = f" ({ratio.low:.4g} to {ratio.high:.4g})" if ratio.low is not None else ""
                typer.echo(f"{title}\t{ratio.value:.4g} of the time of {answer.baseline}{span}")
        for note in answer.notes:
            typer.echo(f"note\t{note}")
    raise typer.Exit(answer.exit_code)


def _share(text: str) -> float:
    """0.05 of ``5%`` or ``0.05``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not share > 0:
        raise RunError(f"--tolerance {text}: write a share above 0, such as 5% or 0.05")
    return share
