"""Published rows: the cells of runs, each with an address made of what was measured, and with the rules it holds.

A row's address is the hash of its implementation (version and sources), the problem it solved, and the environment that
solved it. Figures are not part of it: the same content measured again has the same address, which is what makes a
row replayable.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.harness.publish.devices import device_title
from attnbench.harness.publish.families import Family, family_of
from attnbench.harness.publish.integrity import Finding, broken, examine
from attnbench.harness.report.frame import frame
from attnbench.harness.report.load import Run, load_run
from attnbench.harness.run.record import Cell, Group

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 12
REFUSED = "REFUSED"
# What of the environment can move a figure. The command, the date and the run's name cannot.
ENVIRONMENT = ("commit", "dirty", "mode", "python", "torch", "triton", "cuda", "packages")
DEVICE = ("name", "driver", "cudnn", "capability", "sm_count", "max_sm_mhz", "power_limit_w")


@dataclass(frozen=True)
class Row:
    """One published cell. address: ``DIGITS`` hex digits. findings: on the rules of ``integrity``."""

    address: str
    cell: Cell
    family: Family
    findings: tuple[Finding, ...]

    @property
    def refusals(self) -> list[str]:
        return broken(list(self.findings))


@dataclass(frozen=True)
class PublishedRun:
    """A run with its rows, in the order of its cells. slug: its name in addresses, unique within a site."""

    run: Run
    rows: tuple[Row, ...]
    slug: str

    @property
    def device(self) -> str:
        """The name of the machine's device, as rankings are headed."""
        return device_title(self.run.environment)

    @property
    def started(self) -> str:
        return str(self.run.environment.get("started") or "")

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(row.cell.suite for row in self.rows))

    @property
    def plan(self) -> dict[str, Any]:
        """plan.json of the run: groups and options; empty where it is not there."""
        try:
            data = json.loads((self.run.folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def baseline_of(self, row: Row) -> Row | None:
        """What the row's speed is told against: another implementation in the same rounds, None if there was none.

        One that ships with torch where possible, since it is at hand wherever the harness is; then the one that
        completed the most of the run; then the quickest to set up, since it is set up for every verification.
        """
        torch = str(self.run.environment.get("torch") or "").partition("+")[0]
        beside = [
            other
            for other in self.rows
            if other.cell.problem == row.cell.problem
            and other.cell.impl != row.cell.impl
            and other.cell.timing
            and not other.cell.approximate
            and not other.refusals
        ]
        order = {
            other.cell.impl: (
                other.cell.impl_version.partition("+")[0] != torch,
                -self._completed[other.cell.impl],
                other.cell.first_call_ms or 0.0,
                other.cell.impl,
            )
            for other in beside
        }
        return min(beside, key=lambda other: order[other.cell.impl], default=None)

    @cached_property
    def _completed(self) -> Counter[str]:
        return Counter(row.cell.impl for row in self.rows if row.cell.timing)

    @cached_property
    def groups(self) -> dict[str, Group]:
        return {group.group: group for group in self.run.groups}

    @cached_property
    def table(self) -> pd.DataFrame:
        """The run's frame with ``family``; a refused row is not OK, and says why. The rows' own lines come first, then
        what was planned and has no record."""
        table = frame(self.run)
        planned = [problem for plan in self.run.missing for _ in plan.impls for problem in plan.problems]
        table["family"] = [row.family for row in self.rows] + [family_of(problem) for problem in planned]
        for place, row in enumerate(self.rows):
            if row.refusals:
                table.loc[table.index[place], ["status", "reason"]] = [REFUSED, "; ".join(row.refusals)]
        return table


def load(folders: Sequence[Path]) -> list[PublishedRun]:
    """The runs in ``folders``, latest first; LoadError for a folder that holds none."""
    found = [published(load_run(folder)) for folder in dict.fromkeys(path.resolve() for path in folders)]
    found.sort(key=lambda run: (run.started, run.slug), reverse=True)
    taken: dict[str, int] = {}
    for place, run in enumerate(found):
        number = taken[run.slug] = taken.get(run.slug, 0) + 1
        if number > 1:
            found[place] = PublishedRun(run.run, run.rows, f"{run.slug}-{number}")
    return found


def published(run: Run) -> PublishedRun:
    """The rows of one run."""
    devices = {
        entry["id"]: entry
        for entry in run.environment.get("devices") or []
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    }
    seeds = {group.group: group.seed for group in run.groups}
    rows = []
    for cell in run.cells:
        device = devices.get(cell.device, {})
        content = content_of(cell, seeds.get(cell.group), run.environment, device)
        rows.append(Row(address_of(content), cell, family_of(cell.problem), tuple(examine(cell, device))))
    folder = run.folder.resolve()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{folder.parent.name}-{folder.name}".lower()).strip("-")
    return PublishedRun(run, tuple(rows), slug or "run")


def content_of(
    cell: Cell, seed: int | None, environment: dict[str, Any], device: dict[str, Any]
) -> dict[str, Any]:
    """What a row's address is the hash of: implementation, suite case, environment."""
    return {
        "implementation": {"name": cell.impl, "version": cell.impl_version, "source": cell.source},
        "case": {"suite": cell.suite, "case": cell.case, "problem": cell.problem.to_json(), "seed": seed},
        "environment": {name: environment.get(name) for name in ENVIRONMENT},
        "device": {name: device.get(name) for name in DEVICE},
    }


def address_of(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
