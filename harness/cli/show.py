"""``bench list`` and ``bench doctor``: what there is, and what works here."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from attnbench.harness import registry
from attnbench.harness.cli import machine, options
from attnbench.harness.run.gpus import visible_gpus
from attnbench.harness.run.suite import DEVICES, read_suite, suite_names

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def list_(as_json: AsJson = False) -> None:
    """List the suites and the registered implementations, from data and metadata alone."""
    suites = [read_suite(name) for name in suite_names()]
    counts = {suite.name: {kind: len(suite.on(kind)) for kind in DEVICES} for suite in suites}
    found = registry.entries()
    approximations = registry.entries(approximate=True)
    if as_json:
        document = {
            "suites": [{"name": s.name, "why": s.why, "problems": counts[s.name]} for s in suites],
            "implementations": [
                dataclasses.asdict(entry) for registered in found.values() for entry in registered
            ],
            "approximations": [
                dataclasses.asdict(entry) for registered in approximations.values() for entry in registered
            ],
        }
        typer.echo(json.dumps(document, indent=1))
        return
    print_table(
        "Suites",
        ("suite", "problems (cpu)", "problems (cuda)", "why"),
        [(s.name, *(str(counts[s.name][kind]) for kind in DEVICES), s.why) for s in suites],
    )
    print_table(
        "Implementations",
        ("implementation", "distribution", "version", "registered twice" if _conflicts(found) else ""),
        [
            (entry.name, entry.distribution, entry.version, entry.value if len(registered) > 1 else "")
            for registered in found.values()
            for entry in registered
        ],
    )
    if approximations:
        print_table(
            "Approximations",
            ("approximation", "distribution", "version"),
            [
                (entry.name, entry.distribution, entry.version)
                for registered in approximations.values()
                for entry in registered
            ],
        )


def doctor(
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default as in run).")] = None,
    as_json: AsJson = False,
) -> None:
    """Say of each implementation whether it can run on this machine, and if not, why and what would mend it."""
    from attnbench.harness.doctor import examine, machine_facts

    (chosen,) = machine.choose_devices(options.split([device] if device else None)[:1], visible_gpus())
    facts, findings = machine_facts(), examine(chosen)
    if as_json:
        document = {"machine": facts, "implementations": [dataclasses.asdict(found) for found in findings]}
        typer.echo(json.dumps(document, indent=1))
        return
    print_table("Machine", ("fact", "value"), list(facts.items()))
    print_table(
        f"Implementations on {chosen}",
        ("implementation", "version", "state", "why not", "fix"),
        [(found.name, found.version, found.state, found.reason, found.fix) for found in findings],
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; when piped, a line a row with tabs between, so that cut and awk can read it."""
    if not sys.stdout.isatty():
        typer.echo("\n".join("\t".join(row).rstrip("\t") for row in rows))
        return
    from rich.console import Console
    from rich.table import Column, Table

    headed = (Column(name, overflow="fold") for name in columns)  # a long name is cut nowhere
    table = Table(*headed, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def _conflicts(found: dict[str, list[registry.Entry]]) -> bool:
    return any(len(registered) > 1 for registered in found.values())
