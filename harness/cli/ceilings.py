"""``bench ceilings``: what this device can do, beside what its vendor says."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import machine, options
from attnbench.harness.cli.show import print_table
from attnbench.harness.run.errors import make_folder, write_files
from attnbench.harness.run.gpus import visible_gpus

if TYPE_CHECKING:
    from attnbench.harness.limits.ceilings import Sampled


def ceilings(
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default as in run).")] = None,
    seconds: Annotated[float, typer.Option(help="How long to sample, about.", min=0.0)] = 20.0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write ceilings.json, ceilings.md and the figure here.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Raw samples as one JSON document on stdout.")
    ] = False,
) -> None:
    """Sample matrix products, memory at each level, exponentials and launches; print them with their spread."""
    gpus = visible_gpus()
    (chosen,) = machine.choose_devices(options.split([device] if device else None)[:1], gpus)
    if output_dir:
        make_folder(output_dir)

    import torch

    from attnbench.harness.limits import ceiling_table
    from attnbench.harness.limits import ceilings as limits
    from attnbench.harness.run import environment
    from attnbench.harness.run.lock import device_lock
    from attnbench.harness.run.referee import Referee

    facts = Referee(chosen).do_hello()
    with device_lock(str(facts["uuid"])) if "uuid" in facts else nullcontext():
        sampled = limits.measure(
            torch.device(chosen), seconds, lambda text: typer.echo(f"bench: {text}", err=True)
        )
    command = ("bench", *sys.argv[1:])
    ran_on = environment.gather(
        run="ceilings", command=command, suites=(), seed=0, mode="hot", devices=[facts]
    )
    document = limits.to_json(sampled, ran_on)
    if output_dir:
        typer.echo("\n".join(map(str, _write(output_dir, document, sampled))), err=True)
    if as_json:
        typer.echo(json.dumps(document))
    else:
        print_table(f"Ceilings of {chosen}", ceiling_table.COLUMNS, ceiling_table.rows(sampled))


def _write(folder: Path, document: dict[str, Any], sampled: list[Sampled]) -> list[Path]:
    from attnbench.harness.limits import ceiling_table
    from attnbench.harness.report.plots import Plot

    files = {
        "ceilings.json": json.dumps(document, indent=1).encode(),
        "ceilings.md": ceiling_table.markdown(sampled).encode(),
    }
    plot = Plot("ceilings", "Ceilings", lambda: ceiling_table.draw(sampled))
    files |= {f"ceilings.{kind}": content for kind, content in plot.encode("png", "svg").items()}
    return write_files(folder, files)
