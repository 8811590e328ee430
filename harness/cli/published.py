"""Which runs a command on published records is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.harness.run.errors import RunError

if TYPE_CHECKING:
    from attnbench.harness.publish.rows import PublishedRun

RESULTS = Path("results")


@dataclass(frozen=True)
class Found:
    """Folders of runs, and of conformance runs."""

    runs: list[Path]
    conformance: list[Path]


def find(named: Sequence[Path]) -> Found:
    """All in or below the named folders; RunError where there is none."""
    found = Found([], [])
    for folder in named:
        runs = sorted({path.parent for path in folder.rglob("records*.jsonl")})
        conformance = sorted(path.parent for path in folder.rglob("cases.json"))
        if not (runs or conformance):
            raise RunError(f"{folder} holds no run (records*.jsonl, or cases.json), nor does a folder in it")
        found.runs.extend(runs)
        found.conformance.extend(conformance)
    return found


def load(folders: Sequence[Path]) -> list[PublishedRun]:
    """The runs in these folders, latest first."""
    from attnbench.harness.publish import rows
    from attnbench.harness.report.load import LoadError

    try:
        return rows.load(folders)
    except LoadError as error:
        raise RunError(str(error)) from None
