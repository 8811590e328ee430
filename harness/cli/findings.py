"""``bench findings``: whether what the FlashAttention paper found holds in a run of its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attnbench.harness.cli import left_out
from attnbench.harness.cli.results import RunFolder, usage_errors
from attnbench.harness.cli.show import print_table
from attnbench.harness.run.errors import RunError, make_folder, writing

COLUMNS = ("finding", "direction", "here", "evidence")


def findings(
    run: RunFolder,
    standard: Annotated[str, typer.Option(help="Plays standard attention.")] = "standard",
    flash: Annotated[str, typer.Option(help="Plays FlashAttention.")] = "flash-triton",
    block_sparse: Annotated[str, typer.Option(help="Plays block-sparse FlashAttention.")] = "butterfly",
    output: Annotated[Path | None, typer.Option(help="Also write them here, as Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Ask a run of the suite fa1-paper what the FlashAttention paper found, and say what holds on this card."""
    from attnbench.harness.limits.findings import Roles, rows
    from attnbench.harness.limits.findings import findings as ask
    from attnbench.harness.limits.io_tables import markdown
    from attnbench.harness.report.frame import frame
    from attnbench.harness.report.load import load_run

    with usage_errors():
        loaded = load_run(run)
        table = frame(loaded)
    left_out.tell(run, loaded.problems)
    present = set(table["impl"].str.removesuffix(" (approximate)"))
    for name in (standard, flash, block_sparse):
        if name not in present:
            raise RunError(f"{name!r} is not in this run; it holds {', '.join(sorted(present))}")
    with usage_errors():
        found = ask(table, Roles(standard, flash, block_sparse))
    if output:
        make_folder(output.parent)
        with writing(output):
            output.write_text(markdown(COLUMNS, rows(found)), encoding="utf-8")
        typer.echo(str(output), err=True)
    if as_json:
        typer.echo(json.dumps([vars(one) for one in found]))
        return
    print_table("Findings of the FlashAttention paper", COLUMNS, rows(found))
