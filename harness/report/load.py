"""A run's folder read back: its records, its environment, and every line that could not be understood."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnbench.harness.run import journal
from attnbench.harness.run.record import Cell, Group

ENVIRONMENT = "environment.json"
ENVIRONMENT_SCHEMA = 1


class LoadError(ValueError):
    """There is nothing to report: no such folder, or no records in it."""


@dataclass(frozen=True)
class Run:
    """What one run left. problems: each line or file that is not reported, and why; never silently dropped."""

    folder: Path
    cells: list[Cell]
    groups: list[Group]
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def load_run(folder: Path) -> Run:
    """The run in ``folder`` (records*.jsonl, environment.json). LoadError if it holds no records file.

    What is missing, torn, corrupt or of an unknown schema is named in ``Run.problems``; the rest is still there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoadError(f"{folder} is not a folder")
    if not journal.parts(folder):
        raise LoadError(f"{folder} holds no records*.jsonl: it is not a run's folder")
    records, problems = journal.read(folder)
    environment, trouble = _environment(folder / ENVIRONMENT)
    return Run(
        folder=folder,
        cells=[record for record in records if isinstance(record, Cell)],
        groups=[record for record in records if isinstance(record, Group)],
        environment=environment,
        problems=problems + trouble,
    )


def _environment(path: Path) -> tuple[dict[str, Any], list[str]]:
    unknown = "device, versions and command line are unknown"
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"{path.name}: not there; {unknown}"]
    except (OSError, ValueError) as error:
        return {}, [f"{path.name}: not readable ({error}); {unknown}"]
    if not isinstance(environment, dict):
        return {}, [f"{path.name}: holds a {type(environment).__name__}, not an object; {unknown}"]
    if environment.get("schema") != ENVIRONMENT_SCHEMA:
        schema = environment.get("schema")
        return environment, [f"{path.name}: schema {schema!r} is not {ENVIRONMENT_SCHEMA}; shown as it is"]
    return environment, []
