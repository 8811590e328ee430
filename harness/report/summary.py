"""What stands at the head of a report: the machine, the command, where the time went, and what a reader must know."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from attnbench.harness.report.load import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Summary:
    """title: one line. facts: name and text. phases: name, seconds, share of the run's wall time. counts: cells by
    status. warnings: each a sentence. environment: every recorded field, flattened to name and text."""

    title: str
    facts: list[tuple[str, str]]
    phases: list[tuple[str, float, float]]
    counts: list[tuple[str, int]]
    warnings: list[str]
    environment: list[tuple[str, str]]


def summarise(run: Run, table: pd.DataFrame) -> Summary:
    """The summary of a run and its frame. Every field of the environment may be missing."""
    environment = run.environment
    suites = ", ".join(dict.fromkeys(table["suite"])) or str(environment.get("suite", ""))
    names = dict.fromkeys(_device_name(device, environment) for device in _devices(environment))
    devices = ", ".join(filter(None, names)) or ", ".join(dict.fromkeys(table["device"]))
    statuses = Counter(table["status"])
    return Summary(
        title=f"attnbench: {suites or 'no suite'} on {devices or 'an unknown device'}",
        facts=_facts(environment, devices),
        phases=_phases(run),
        counts=sorted(statuses.items(), key=lambda item: (item[0] != "OK", item[0])),
        warnings=_warnings(run, table),
        environment=list(_flat(environment)),
    )


def _facts(environment: dict[str, Any], devices: str) -> list[tuple[str, str]]:
    command = environment.get("command")
    commit = environment.get("commit")
    dirty = " with uncommitted changes" if environment.get("dirty") else ""
    versions = [f"{name} {environment[name]}" for name in _VERSIONS if environment.get(name)]
    facts = [
        ("device", devices),
        ("started", str(environment.get("started") or "")),
        ("command", shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")),
        ("commit", f"{commit}{dirty}" if commit else ""),
        ("versions", ", ".join(versions)),
        *(("resumed", str(later.get("started") or "at an unknown time")) for later in _resumed(environment)),
    ]
    return [(name, text) for name, text in facts if text]


_VERSIONS = ("attnbench", "torch", "triton", "cuda", "driver", "python")


def _phases(run: Run) -> list[tuple[str, float, float]]:
    seconds: defaultdict[str, float] = defaultdict(float)
    for group in run.groups:
        for phase, spent in group.phases.items():
            seconds[phase] += spent
    total = sum(seconds.values())
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return [(phase, spent, spent / total) for phase, spent in longest_first if total > 0]


def _warnings(run: Run, table: pd.DataFrame) -> list[str]:
    environment = run.environment
    found = [str(warning) for warning in environment.get("warnings") or []]
    if environment.get("dirty"):
        found.append("the sources had uncommitted changes: the commit does not name what was run")
    found += [
        f"resumed {later.get('started')} on other ground: {difference}"
        for later in _resumed(environment)
        for difference in later.get("differs") or []
    ]
    if run.missing:
        planned = len(run.missing) + len(run.groups)
        found.append(
            f"{len(run.missing)} of {planned} planned groups have no records; bench run --resume completes them: "
            f"{', '.join(plan.group for plan in run.missing)}"
        )
    foreign = Counter(process for group in run.groups for process in group.foreign or ())
    found += [
        f"another process was on the GPU during {n} groups: {process}" for process, n in foreign.items()
    ]
    if untold := sum(group.foreign is None and group.device != "cpu" for group in run.groups):
        found.append(f"whether another process was on the GPU could not be told during {untold} groups")
    timed = table[table["rounds"].notna()]
    causes = Counter(cause for text in timed["throttle"] for cause in text.split(", ") if cause)
    found += [
        f"{count} of {len(timed)} timed cells ran with clocks held down: {cause}"
        for cause, count in causes.items()
    ]
    if unheld := int(timed["unheld"].sum()):
        found.append(
            f"{unheld} samples were thrown away: the stream could not be held until all launches were queued"
        )
    if single := int((timed["rounds"] < 2).sum()):
        found.append(f"{single} of {len(timed)} timed cells have one round, hence no interval")
    of_cells = Counter(warning for cell in run.cells for warning in cell.warnings)
    found += [f"{count} cell{'s' * (count > 1)}: {warning}" for warning, count in of_cells.most_common()]
    return found + _folded(run.problems)


def _folded(problems: list[str]) -> list[str]:
    """Lines in a row that do not count for the same reason, as one sentence: a torn group is many such lines."""
    found = []
    for why, alike in groupby(problems, key=lambda problem: problem.partition(": ")[2]):
        places = [problem.partition(": ")[0] for problem in alike]
        found.append(f"{places[0]}{f' to {places[-1]}' if len(places) > 1 else ''}: {why}")
    return found


def _resumed(environment: dict[str, Any]) -> list[dict[str, Any]]:
    return [later for later in environment.get("resumed") or [] if isinstance(later, dict)]


def _devices(environment: dict[str, Any]) -> list[dict[str, Any]]:
    return [device for device in environment.get("devices") or [] if isinstance(device, dict)]


def _device_name(device: dict[str, Any], environment: dict[str, Any]) -> str:
    name, host = str(device.get("name") or ""), environment.get("host")
    processor = host.get("cpu") if name == "cpu" and isinstance(host, dict) else None
    return f"{name} ({processor})" if processor else name


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [
            pair
            for name, item in value.items()
            for pair in _flat(item, f"{prefix}.{name}" if prefix else str(name))
        ]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [pair for index, item in enumerate(value) for pair in _flat(item, f"{prefix}[{index}]")]
    return [(prefix, " ".join(map(str, value)) if isinstance(value, list) else str(value))]
