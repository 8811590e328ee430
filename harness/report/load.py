"""A run's folder read back: its records, its environment, and every line that could not be understood."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnbench.harness.problem import Problem
from attnbench.harness.run import journal
from attnbench.harness.run.errors import RunError
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Group

ENVIRONMENT = "environment.json"
PLAN = "plan.json"
COUNTERS = "counters.json"
ENVIRONMENT_SCHEMA = 1


class LoadError(ValueError):
    """There is nothing to report: no such folder, or no records in it."""


@dataclass(frozen=True)
class Run:
    """What one run left. problems: each line or file that is not reported, and why; never silently dropped.

    missing: groups that were planned and have no records, as of a run that was ended early. counters: by implementation
    and problem key, the bytes that ``bench io --counters`` counted into the same folder: dram_read, dram_write, l2.
    """

    folder: Path
    cells: list[Cell]
    groups: list[Group]
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    missing: list[GroupPlan] = field(default_factory=list)
    counters: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)


def load_run(folder: Path) -> Run:
    """The run in ``folder`` (records*.jsonl, environment.json, plan.json). LoadError if it holds no records file.

    What is missing, torn, corrupt or of an unknown schema is named in ``Run.problems``; the rest is still there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoadError(f"{folder} is not a folder")
    if not journal.parts(folder):
        raise LoadError(f"{folder} holds no records*.jsonl: it is not a run's folder")
    records, problems = journal.read(folder)
    environment, trouble = _environment(folder / ENVIRONMENT)
    plans, more_trouble = _plans(folder / PLAN)
    counters, counters_trouble = _counters(folder / COUNTERS)
    groups = [record for record in records if isinstance(record, Group)]
    recorded = {group.group for group in groups}
    return Run(
        folder=folder,
        cells=[record for record in records if isinstance(record, Cell)],
        groups=groups,
        environment=environment,
        problems=problems + trouble + more_trouble + counters_trouble,
        missing=[plan for plan in plans if plan.group not in recorded],
        counters=counters,
    )


def _plans(path: Path) -> tuple[list[GroupPlan], list[str]]:
    """What was asked for; nothing where nobody wrote it down."""
    unknown = "groups without records go unnoticed"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [GroupPlan.from_json(plan) for plan in document["plans"]], []
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, KeyError, TypeError, RunError) as error:
        return [], [f"{path.name}: not readable ({error}); {unknown}"]


def _counters(path: Path) -> tuple[dict[tuple[str, str], dict[str, float]], list[str]]:
    """What was counted; calls that gave no figures are left out."""
    try:
        counted = json.loads(path.read_text(encoding="utf-8"))["counted"]
        return {
            (one["impl"], Problem.from_json(one["problem"]).key): {
                name: one[name] for name in ("dram_read", "dram_write", "l2")
            }
            for one in counted
            if one["dram_read"] is not None
        }, []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, [f"{path.name}: not readable ({error}); there are no counters"]


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
