"""What of a run's folder could not be read: told on stderr by every command that goes on without it.

It is no failure of the command, as it is none of ``bench report``, whose page says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import typer


def tell(folder: Path, problems: Sequence[str]) -> None:
    """problems: ``place: why``, as in ``report.load.Run``; those in a row for one reason are counted in one line."""
    for why, alike in groupby(problems, key=lambda problem: problem.partition(": ")[2]):
        places = [problem.partition(": ")[0] for problem in alike]
        where = places[0] if len(places) == 1 else f"{len(places)} lines, {places[0]} to {places[-1]}"
        typer.echo(f"{folder}: left out: {where}: {why}", err=True)
