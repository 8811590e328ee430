"""``bench mutants``: planted bugs before the conformance suites, and the kill matrix that comes of it."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.harness.cli import options
from attnbench.harness.run.errors import Exit, RunError, unknown_word

if TYPE_CHECKING:
    from attnbench.harness.conform.mutants.matrix import Row

Words = list[str] | None
_select = partial(typer.Option, rich_help_panel="What to examine")
_output = partial(typer.Option, rich_help_panel="How to show it")


def mutants(
    mutant: Annotated[Words, _select(help="Mutants (default all).")] = None,
    suite: Annotated[Words, _select(help="Conformance suites to put them before (default all).")] = None,
    list_mutants: Annotated[
        bool, _select("--list", help="Print the mutants and what is wrong with each; run none.")
    ] = False,
    device: Annotated[str, _select(help="cpu, cuda or cuda:N.")] = "cpu",
    jobs: Annotated[
        int | None, _select(help="Workers side by side (default the number of cores).", min=1)
    ] = None,
    markdown: Annotated[bool, _output("--markdown", help="A Markdown table on stdout.")] = False,
    as_json: Annotated[bool, _output("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show that the suites see: implementations with one planted bug each, by the suites that see them."""
    from attnbench.harness.conform.mutants import catalogue
    from attnbench.harness.conform.mutants.matrix import kill_matrix
    from attnbench.harness.conform.suite import suite_names

    planted = catalogue()
    chosen = [planted[_known("mutant", name, planted)] for name in options.split(mutant)] or list(
        planted.values()
    )
    if list_mutants:
        typer.echo("\n".join("\t".join([m.name, m.breaks, m.killed_by, " ".join(m.cites)]) for m in chosen))
        return
    suites = [
        _known("conformance suite", name, suite_names()) for name in options.split(suite)
    ] or suite_names()

    def tell(row: Row) -> None:
        if not row.killed:
            typer.echo(f"{_state(row)}: {row.mutant.name}: {row.mutant.breaks}", err=True)

    rows = kill_matrix(chosen, suites, device, jobs or os.cpu_count() or 1, tell)
    if as_json:
        typer.echo(json.dumps(_document(rows, suites)))
    elif markdown:
        typer.echo("\n".join(_markdown(rows, suites)))
    else:
        _print(rows, suites)
    raise typer.Exit(Exit.OK if all(row.killed for row in rows) else Exit.CELLS)


def _known(kind: str, name: str, known: Any) -> str:
    if name not in known:
        raise RunError(unknown_word(kind, name, known))
    return name


def _state(row: Row) -> str:
    """``killed`` by the case named for it; or what went wrong."""
    if not row.named.killed:
        return "SURVIVED"
    return "CONTROL FAILED" if row.control.killed else "killed"


def _marks(row: Row, suites: list[str]) -> list[str]:
    """x where a suite sees the mutant, X where no other does, a dot where it does not."""
    alone = len(row.seen_by) == 1
    return [("X" if alone else "x") if row.suites[suite].killed else "." for suite in suites]


def _summary(rows: list[Row]) -> str:
    from attnbench.harness.conform.mutants.matrix import sole_witnesses

    killed = sum(row.killed for row in rows)
    alone = ", ".join(f"{suite} {len(names)}" for suite, names in sorted(sole_witnesses(rows).items()))
    return (
        f"{killed} of {len(rows)} mutants killed by the case named for them, control passed. "
        f"Seen by one suite alone (X): {alone or 'none'}."
    )


def _markdown(rows: list[Row], suites: list[str]) -> list[str]:
    lines = [
        f"| mutant | breaks | case | {' | '.join(suites)} | |",
        "|---|---|---|" + ":-:|" * len(suites) + "---|",
    ]
    for row in rows:
        cells = [row.mutant.name, row.mutant.breaks, row.mutant.killed_by, *_marks(row, suites), _state(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _summary(rows)]


def _document(rows: list[Row], suites: list[str]) -> dict[str, Any]:
    import dataclasses

    return {
        "suites": suites,
        "mutants": {
            row.mutant.name: {
                "breaks": row.mutant.breaks,
                "killed_by": row.mutant.killed_by,
                "control": row.mutant.control,
                "cites": list(row.mutant.cites),
                "killed": row.killed,
                "state": _state(row),
                "named": dataclasses.asdict(row.named),
                "suites": {suite: dataclasses.asdict(sight) for suite, sight in row.suites.items()},
            }
            for row in rows
        },
    }


def _print(rows: list[Row], suites: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("mutant", "case", title="Kill matrix: planted bugs by the suites that see them")
    for suite in suites:  # read downwards, or the table is wider than a terminal
        table.add_column("\n".join(suite), justify="center", vertical="bottom")
    table.add_column("")
    for row in rows:
        state = _state(row)
        table.add_row(
            row.mutant.name, row.mutant.killed_by, *_marks(row, suites), "" if state == "killed" else state
        )
    console = Console(width=None if os.isatty(1) else 200)
    console.print(table)
    console.print(_summary(rows), soft_wrap=True)
